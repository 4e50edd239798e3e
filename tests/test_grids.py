"""Sampling-time grids: laws, files and refusals."""

import json
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkit import grids

STEPS = st.integers(1, 200)


def is_grid(grid, num_steps):
    right = (grid.dtype, grid.shape) == (torch.float64, (num_steps + 1,))
    return right and bool((grid.diff() > 0).all()) and (grid[0], grid[-1]) == (0, 1)


@given(n=STEPS, rho=st.floats(0.2, 5), shift=st.floats(0.1, 20))
def test_n_steps_have_n_plus_one_times_from_0_to_1(n, rho, shift):
    for grid in (grids.uniform(n), grids.power(n, rho), grids.shifted(n, shift)):
        assert is_grid(grid, n)


@given(n=STEPS)
def test_neutral_parameters_give_the_uniform_grid(n):
    uniform = torch.tensor([k / n for k in range(n + 1)], dtype=torch.float64)
    for grid in (grids.uniform(n), grids.power(n, 1.0), grids.shifted(n, 1.0)):
        torch.testing.assert_close(grid, uniform, rtol=1e-15, atol=1e-15)


@given(n=STEPS, shift=st.floats(0.1, 20))
def test_shifted_moves_the_noise_level_and_its_inverse_moves_it_back(n, shift):
    sigma = 1 - grids.uniform(n)
    torch.testing.assert_close(
        1 - grids.shifted(n, shift), shift * sigma / (1 + (shift - 1) * sigma)
    )
    s = 1 - grids.shifted(n, shift)
    torch.testing.assert_close(s / shift / (1 + (1 / shift - 1) * s), sigma, rtol=1e-9, atol=1e-12)


def test_power_takes_smaller_steps_near_the_noise():
    torch.testing.assert_close(grids.power(4, 2.0), (torch.arange(5).double() / 4) ** 2)


@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 99), min_size=6, max_size=6, unique=True),
)
def test_blockwise_holds_every_edge_and_is_uniform_between(steps, cuts):
    inner = sorted(cuts)[: len(steps) - 1]
    edges = [0.0, *(c / 100 for c in inner), 1.0]
    grid = grids.blockwise(edges, steps)
    assert is_grid(grid, sum(steps))
    start = 0
    for left, right, n in zip(edges[:-1], edges[1:], steps, strict=True):
        part = grid[start : start + n + 1]
        assert part[0] == left
        assert part[-1] == right
        torch.testing.assert_close(part.diff(), torch.full((n,), (right - left) / n).double())
        start += n


def test_blockwise_with_one_number_of_steps():
    grid = grids.blockwise(torch.linspace(0, 1, 7).double(), 2)
    torch.testing.assert_close(grid, grids.uniform(12))


@given(inner=st.sets(st.floats(1e-6, 1 - 1e-6), max_size=20))
def test_a_saved_grid_is_loaded_bit_for_bit(tmp_path_factory, inner):
    file = tmp_path_factory.mktemp("grids") / "grid.json"
    grid = torch.tensor([0.0, *sorted(inner), 1.0], dtype=torch.float64)
    grids.save(grid, file, method="heun", seeds=[1, 2])
    assert torch.equal(grids.load(file), grid)
    assert json.loads(file.read_text())["provenance"] == {"method": "heun", "seeds": [1, 2]}


def record(**changes):
    return json.dumps(
        {"format": "flowkit-grid", "version": 1, "grid": [0, 1], "provenance": {}} | changes
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "file must be a grid written by flowkit, got .*grid.json"),
        (
            "[0, 1]",
            "file must be a grid written by flowkit, got .*grid.json without the format field",
        ),
        (record(version=2), "version of .*grid.json must be 1, got 2; write the file again"),
        (record(grid=[0, 0.5, 0.5]), "grid in .*grid.json must be .* increasing times: .*strictly"),
        (record(grid=4), "grid in .*grid.json must be a list of increasing times"),
        (record(grid="01"), "grid in .*grid.json must be a list of increasing times"),
        (record(grid=[0, 5]), r"grid in .*grid.json .* lie in \[0, 1\], got \[0.0, 5.0\]"),
        (record(grid=[0, math.nan, 1]), "grid in .*grid.json must be a list of increasing times"),
        ('{"format": "flowkit-grid", "version": 1}', "grid in .*grid.json must be .*: 'grid'"),
        (record(provenance=[1]), r"provenance in .*grid.json must be a mapping, got \[1\]"),
    ],
)
def test_a_file_that_is_no_grid_is_refused_by_name(tmp_path, text, message):
    file = tmp_path / "grid.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        grids.load(file)


def test_what_is_remembered_of_a_grid_is_read_back(tmp_path):
    grids.save(grids.uniform(2), tmp_path / "grid.json", method="heun", scores={"uniform": 0.5})
    assert grids.provenance(tmp_path / "grid.json") == {
        "method": "heun",
        "scores": {"uniform": 0.5},
    }


def test_a_grid_of_another_model_warns(tmp_path):
    file = tmp_path / "grid.json"
    grids.save(grids.uniform(2), file, model_hash="a" * 64, guidance=2.0)
    with pytest.warns(UserWarning, match=r"model_hash 'aaaaaaaaaaaa…', .* got 'bbbbbbbbbbbb…'; m"):
        grid = grids.load(file, {"model_hash": "b" * 64, "guidance": 2.0})
    assert torch.equal(grid, grids.uniform(2))
    with pytest.warns(UserWarning, match=r"used with guidance 2.0, for which .* made, got None"):
        grids.load(file, {"guidance": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grids.load(file, {"model_hash": "a" * 64, "guidance": 2, "method": "euler"})
        grids.load(file)


def test_a_bad_grid_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="grid must increase strictly"):
        grids.save([1.0, 0.0], tmp_path / "grid.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grids.uniform(0), "num_steps must be at least 1, got 0"),
        (lambda: grids.power(3, 0.0), "rho must be positive and finite, got 0.0"),
        (lambda: grids.shifted(3, -1.0), "shift must be positive and finite, got -1.0"),
        (lambda: grids.blockwise([0, 0.5, 1], [1]), "steps must hold one number per segment, 2"),
        (lambda: grids.blockwise([0, 0.5, 1], [1, 0]), "steps must be at least 1, got 0"),
        (lambda: grids.blockwise([0, 0.5, 0.5], 1), "edges must increase strictly"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
