"""Argument checks: what passes, and the wording of what does not."""

import ast
import inspect
import math
import warnings
from pathlib import Path

import pytest
import torch

import flowkit
from flowkit import checks


def test_as_grid_of_a_number_is_uniform():
    assert torch.equal(checks.as_grid(4), torch.tensor([0, 0.25, 0.5, 0.75, 1]).double())


def test_as_grid_keeps_the_times_in_float64():
    times = torch.tensor([0.1, 0.2, 0.7])
    assert torch.equal(checks.as_grid(times), times.double())
    assert checks.as_grid([0, 1]).dtype == torch.float64


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([0.0, 0.5, 0.5], r"grid must increase strictly, got \[0.0, 0.5, 0.5\]"),
        ([1.0, 0.0], "grid must increase strictly"),
        ([0.0, math.nan, 1.0], "grid must increase strictly"),
        ([0.0, 5.0], r"grid must lie in \[0, 1\], got \[0.0, 5.0\]"),
        ([-0.1, 1.0], r"grid must lie in \[0, 1\]"),
        ([0.0], r"grid must be a 1-D tensor of at least 2 times, got shape \(1,\)"),
        ([[0.0, 1.0]], r"grid must be a 1-D tensor of at least 2 times, got shape \(1, 2\)"),
        (0, "grid must be at least 1, got 0"),
    ],
)
def test_as_grid_refuses(grid, message):
    with pytest.raises(ValueError, match=message):
        checks.as_grid(grid)


def test_as_grid_refuses_a_flag():
    with pytest.raises(TypeError, match="grid must be a number of steps or a tensor of times"):
        checks.as_grid(True)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (
            torch.tensor([-1.0, 5.0]),
            ValueError,
            r"t must lie in \[0, 1\], got values in \[-1.0, 5.0\]; "
            "flowkit's time is 0 at noise, 1 at data",
        ),
        (torch.tensor([0.5, math.nan]), ValueError, r"t must lie in \[0, 1\]"),
        (torch.tensor([0.5]), ValueError, r"t must have shape \(2,\), got \(1,\)"),
        (torch.tensor(0.5), ValueError, r"t must have shape \(2,\), got \(\)"),
        (torch.tensor([0, 1]), TypeError, "t must be a floating-point tensor, got torch.int64"),
    ],
)
def test_check_times_refuses(t, error, message):
    with pytest.raises(error, match=message):
        checks.check_times(t, 2)


def test_check_times_takes_both_ends_and_an_empty_batch():
    checks.check_times(torch.tensor([0.0, 1.0]), 2)
    checks.check_times(torch.empty(0), 0)


def test_check_same_shape_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match=r"x0 must have the shape of x1, \(3, 2\), got \(1, 2\)"):
        checks.check_same_shape(torch.zeros(1, 2), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.check_at_least(0, 1, "n"), "n must be at least 1, got 0"),
        (lambda: checks.check_at_least(math.nan, 1, "n"), "n must be at least 1, got nan"),
        (lambda: checks.check_integer(0, "n", 1), "n must be at least 1, got 0"),
        (lambda: checks.check_positive(0, "s"), "s must be positive and finite, got 0"),
        (lambda: checks.check_positive(math.inf, "s"), "s must be positive and finite, got inf"),
        (lambda: checks.check_number(math.nan, "m"), "m must be finite, got nan"),
        (lambda: checks.check_number(-math.inf, "m"), "m must be finite, got -inf"),
        (lambda: checks.check_between(2, 0, 1, "p"), r"p must lie in \[0, 1\], got 2"),
        (lambda: checks.check_choice("c", ("b", "a"), "m"), "m must be one of a, b, got 'c'"),
        (
            lambda: checks.check_labels(torch.tensor([0, 3]), 3),
            r"cond must hold labels in \[0, 2\], got values in \[0, 3\]",
        ),
        (
            lambda: checks.check_finite(torch.tensor([1.0, math.nan]), "x"),
            "x must be finite, got 1 NaN or infinite of 2 values",
        ),
    ],
)
def test_checks_of_numbers(check, message):
    with pytest.raises(ValueError, match=message):
        check()


@pytest.mark.parametrize("value", [3.0, math.nan, True, "3", None])
def test_only_integers_are_integers(value):
    with pytest.raises(TypeError, match=f"n must be an integer, got {value!r}"):
        checks.check_integer(value, "n", 1)
    checks.check_integer(torch.arange(3).numpy()[2], "n", 1)
    checks.check_integer(-3, "n")


@pytest.mark.parametrize("value", ["abc", "1", None])
def test_words_are_no_numbers(value):
    for check in (
        lambda: checks.check_at_least(value, 1, "n"),
        lambda: checks.check_positive(value, "n"),
        lambda: checks.check_number(value, "n"),
        lambda: checks.check_between(value, 0, 1, "n"),
    ):
        with pytest.raises(TypeError, match=f"n must be a number, got {value!r}"):
            check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_are_integers(dtype):
    with pytest.raises(TypeError, match="cond must hold integer labels, got torch"):
        checks.check_labels(torch.ones(2, dtype=dtype), 3)


@checks.renamed_arguments(since="0.2.0", removed_in="0.4.0", edges="boundary_share", colour="color")
def paint(boundary_share: float = 0.5, *, color: str = "red") -> tuple[float, str]:
    """Paint."""
    return boundary_share, color


class Painter:
    @checks.renamed_arguments(since="0.2.0", removed_in="0.4.0", edges="boundary_share")
    def __init__(self, boundary_share: float):
        self.boundary_share = boundary_share


def test_an_old_name_works_with_one_warning_that_names_the_new():
    message = (
        r"^edges is named boundary_share since flowkit 0.2.0; flowkit 0.4.0 will not take edges$"
    )
    with pytest.warns(FutureWarning, match=message) as caught:
        assert paint(edges=0.25) == (0.25, "red")
    (warning,) = caught
    assert warning.filename == __file__  # of the line that has to be changed
    with pytest.warns(FutureWarning) as caught:
        assert paint(edges=0.25, colour="blue") == (0.25, "blue")
    assert [str(w.message).split()[0] for w in caught] == ["edges", "colour"]
    with pytest.warns(FutureWarning, match=message):
        assert Painter(edges=0.75).boundary_share == 0.75


def test_new_names_work_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paint(0.1, color="blue") == paint(boundary_share=0.1, color="blue") == (0.1, "blue")
        assert Painter(0.1).boundary_share == 0.1


def test_an_argument_under_both_names_or_under_neither_is_an_error():
    with pytest.raises(TypeError, match="boundary_share must be given once, got edges as well"):
        paint(boundary_share=0.1, edges=0.2)
    with (
        pytest.warns(FutureWarning),
        pytest.raises(TypeError, match="multiple values for argument 'boundary_share'"),
    ):
        paint(0.1, edges=0.2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'corners'"):
        paint(corners=0.1)


def test_a_function_with_old_names_looks_as_if_it_had_none():
    assert list(inspect.signature(paint).parameters) == ["boundary_share", "color"]
    assert list(inspect.signature(Painter).parameters) == ["boundary_share"]
    assert (paint.__name__, paint.__doc__) == ("paint", "Paint.")


def _overdue(source, version):
    """The versions in which old names of a file should have gone by now."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    named = (call for call in calls if ast.unparse(call.func).endswith("renamed_arguments"))
    ends = [ast.literal_eval(k.value) for c in named for k in c.keywords if k.arg == "removed_in"]
    return [end for end in ends if _numbers(end) <= _numbers(version)]


def _numbers(version):
    return [int(part) for part in version.split(".")]


def test_old_names_are_gone_in_the_version_that_was_announced():
    example = inspect.getsource(paint)
    assert _overdue(example, "0.3.9") == _overdue(example, "0.2.10") == []
    assert _overdue(example, "0.4.0") == _overdue(example, "0.10.0") == ["0.4.0"]
    for file in Path(flowkit.__file__).parent.rglob("*.py"):
        assert not _overdue(file.read_text(), flowkit.__version__), file
