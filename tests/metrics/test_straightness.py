"""Wasserstein distance and path energy against closed forms."""

import math
from collections import namedtuple

import pytest
import scipy.linalg
import torch

from flowkit.metrics import (
    normalized_path_energy,
    path_energy,
    wasserstein2,
)
from tests.metrics.samples import F64, normal


def test_wasserstein_on_the_line_is_the_sorted_distance():
    a, b = normal(50, 1), 2 * normal(50, 1, seed=1) + 1
    exact = (a.sort(0).values - b.sort(0).values).square().mean().sqrt().item()
    assert wasserstein2(a, b) == pytest.approx(exact, rel=1e-10)
    assert wasserstein2(b, a) == pytest.approx(exact, rel=1e-10)


def test_wasserstein_of_equal_sizes_is_an_assignment():
    a, b = normal(30, 2, 2), normal(30, 2, 2, seed=1)
    cost = torch.cdist(a.flatten(1), b.flatten(1)).square().numpy()
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    assert wasserstein2(a, b) == pytest.approx(cost[rows, columns].mean() ** 0.5, rel=1e-9)


def test_wasserstein_of_unequal_sizes_and_translations():
    a = normal(7, 3)
    assert wasserstein2(a, a.repeat(3, 1)) == pytest.approx(0, abs=1e-7)
    # A single point: the plan is forced.
    exact = a.square().sum(1).mean().sqrt().item()
    assert wasserstein2(a, torch.zeros(1, 3)) == pytest.approx(exact, rel=1e-10)
    shift = torch.tensor([3.0, 0.0, 4.0])
    assert wasserstein2(a, a + shift) == pytest.approx(5, rel=1e-10)


def test_wasserstein_errors():
    message = r"b must hold points \(M, \*\) of the shape of a \(4, 2\), got \(4, 3\)"
    with pytest.raises(ValueError, match=message):
        wasserstein2(normal(4, 2), normal(4, 3))
    for a, b in ((normal(0, 2), normal(4, 2)), (normal(4, 2), normal(0, 2))):
        with pytest.raises(ValueError, match=r"b must hold points .* got \(\d, 2\)"):
            wasserstein2(a, b)
    with pytest.raises(ValueError, match="a must be finite"):
        wasserstein2(torch.full((2, 2), math.inf), normal(2, 2))


def test_path_energy_of_straight_lines_is_their_squared_length():
    x0, x1 = normal(40, 2, 3), normal(40, 2, 3, seed=1)
    grid = torch.tensor([0.0, 0.1, 0.5, 0.6, 1.0], dtype=F64)
    path = torch.stack([x0 + t * (x1 - x0) for t in grid])
    exact = (x1 - x0).square().sum((1, 2)).mean().item()
    assert path_energy(path, grid) == pytest.approx(exact, rel=1e-12)
    assert normalized_path_energy(exact, w2=exact**0.5) == pytest.approx(0, abs=1e-12)
    # Samples of one number: 1² and 3².
    assert path_energy(torch.tensor([[0.0, 1.0], [1.0, 4.0]]), 1) == 5
    # On part of the time axis the same way costs more.
    assert path_energy(path[[0, -1]], [0.25, 0.75]) == pytest.approx(2 * exact, rel=1e-12)


def test_path_energy_of_a_circle_converges_from_below():
    """Angular velocity π/2 on the unit circle: energy π²/4."""

    def energy(steps):
        angle = torch.linspace(0, math.pi / 2, steps + 1, dtype=F64)
        path = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
        return path_energy(path, steps)

    for steps in (1, 10, 40):  # chords of length 2 sin(π / 4n)
        exact = (2 * steps * math.sin(math.pi / (4 * steps))) ** 2
        assert energy(steps) == pytest.approx(exact, rel=1e-12)
        assert exact < math.pi**2 / 4
    quarter_circle, w2 = math.pi**2 / 4, 2**0.5
    assert normalized_path_energy(quarter_circle, w2) == pytest.approx(math.pi**2 / 8 - 1)


def test_path_energy_takes_solutions_and_says_how_to_get_a_path():
    Solved = namedtuple("Solved", "x path")
    path = normal(3, 5, 2)
    assert path_energy(Solved(path[-1], path), 2) == path_energy(path, 2)
    with pytest.raises(ValueError, match=r"path, got None; solve with return_path=True"):
        path_energy(Solved(path[-1], None), 2)
    with pytest.raises(
        ValueError, match=r"path \(4, B, \*\) for a grid of 4 times, got shape \(3,"
    ):
        path_energy(path, 3)
    with pytest.raises(ValueError, match="w2 must be positive and finite, got 0"):
        normalized_path_energy(1.0, 0.0)
    with pytest.raises(ValueError, match="path_energy must be at least 0, got -1"):
        normalized_path_energy(-1.0, 1.0)
