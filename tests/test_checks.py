"""Argument checks: what passes, and the wording of what does not."""

import math

import pytest
import torch

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
        (lambda: checks.check_positive(0, "s"), "s must be positive and finite, got 0"),
        (lambda: checks.check_positive(math.inf, "s"), "s must be positive and finite, got inf"),
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


@pytest.mark.parametrize("value", ["abc", "1", None])
def test_words_are_no_numbers(value):
    for check in (
        lambda: checks.check_at_least(value, 1, "n"),
        lambda: checks.check_positive(value, "n"),
        lambda: checks.check_between(value, 0, 1, "n"),
    ):
        with pytest.raises(TypeError, match=f"n must be a number, got {value!r}"):
            check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_are_integers(dtype):
    with pytest.raises(TypeError, match="cond must hold integer labels, got torch"):
        checks.check_labels(torch.ones(2, dtype=dtype), 3)
