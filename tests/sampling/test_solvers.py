"""Steps of the solvers by hand: Adams-Bashforth on any grid, and inversion of Euler's steps."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowkit import grids
from flowkit.exact import MixtureFlow
from flowkit.sampling import ODESampler

RING = MixtureFlow(
    torch.ones(3).double(),
    torch.tensor([[2.0, 0], [-1, 1], [0, -2]]).double(),
    torch.full((3,), 0.8),
)


def decay(x, t, cond=None):
    return -x


class Stops:
    """A velocity with edges that remembers the steps it is told."""

    def __init__(self, edges):
        self.edges, self.steps = edges, []

    def begin_step(self, left, right):
        self.steps.append((left, right))

    def __call__(self, x, t, cond=None):
        return -x


def test_edges_are_stops_of_their_own_unless_the_grid_has_them():
    """Those outside of the solve do not count; a grid in float32 has an edge up to rounding."""
    grid = torch.tensor([0.1, 0.3, 0.7]).double()
    same = 0.3 + 1e-8
    field = Stops([0.0, 0.05, 0.1, same, 0.32, 0.7, 0.71, 1.0])
    ODESampler(grid).solve(field, torch.ones(1, 1))
    ODESampler(grid).invert(field, torch.ones(1, 1))
    low, middle, high = grid.tolist()
    steps = [(low, middle), (middle, 0.32), (0.32, high)]
    assert field.steps == [*steps, *steps[::-1]]


@given(inner=st.sets(st.integers(1, 99), min_size=1, max_size=8))
def test_ab2_is_exact_for_velocities_linear_in_time(inner):
    """On any grid: the line through the last two velocities is the velocity itself."""
    grid = [0.0, *(k / 100 for k in sorted(inner)), 1.0]
    sampler, x = ODESampler(grid, "ab2"), torch.ones(1, 1, dtype=torch.float64)
    found = sampler.solve(lambda x, t, c: (3 - 4 * t)[:, None], x, return_path=True)
    exact = [1 + 3 * t - 2 * t**2 for t in grid]
    torch.testing.assert_close(found.path.flatten(), torch.tensor(exact).double())
    back = sampler.invert(lambda x, t, c: (3 - 4 * t)[:, None], found.x)
    torch.testing.assert_close(back.x, x)


def test_ab2_steps_by_hand():
    """Weights of Adams and Bashforth for steps h after k: 1 + h/2k and −h/2k."""
    x, t, (v, k) = 1.0, 0.0, (None, None)
    grid = [0.0, 0.1, 0.4, 0.5, 1.0]
    for end in grid[1:]:
        h, w = end - t, -x * (1 + t)
        if v is None:
            x += h * -(x + h / 2 * w) * (1 + t + h / 2)
        else:
            x += h * ((1 + h / (2 * k)) * w - h / (2 * k) * v)
        t, v, k = end, w, h
    field = lambda x, t, cond: -x * (1 + t)[:, None]  # noqa: E731
    found = ODESampler(grid, "ab2")(field, torch.ones(1, 1).double()).item()
    assert found == pytest.approx(x, rel=1e-14)


@pytest.mark.parametrize("corrections", [1, 2, 5])
def test_each_correction_costs_a_call_a_step(corrections):
    calls = []

    def field(x, t, cond=None):
        calls.append(t[0].item())
        return RING(x, t)

    grid = grids.shifted(6, 2.0)
    solution = ODESampler(grid).invert(field, RING.means, correct=corrections)
    assert solution.nfe == len(calls) == 1 + 6 * corrections
    # each step is undone with the velocity at the time that it started from
    starts = grid.flip(0)[1:].repeat_interleave(corrections)
    torch.testing.assert_close(torch.tensor(calls[1:]).double(), starts)


def test_corrections_converge_to_the_inverse_of_the_very_steps():
    """Euler's step under v = −x is x (1 − h); each correction leaves a factor −h of the error."""
    x1, n = torch.ones(1, 1, dtype=torch.float64), 20
    exact = 1 / (1 - 1 / n) ** n
    errors = []
    for m in range(1, 8):
        x, v = 1.0, -1.0
        for _ in range(n):
            for _ in range(m):
                v = -(x - v / n)  # at the point that the last velocity leads back to
            x -= v / n
        found = ODESampler(n).invert(decay, x1, correct=m).x.item()
        assert found == pytest.approx(x, rel=1e-14)
        errors.append(abs(found - exact))
    for worse, better in pairwise(errors[1:]):
        assert better == pytest.approx(worse / n, rel=0.05)
    assert ODESampler(n)(decay, ODESampler(n).invert(decay, x1, correct=25).x).item() == (
        pytest.approx(1, abs=1e-14)
    )


def test_fixed_points_invert_a_nonlinear_flow():
    x1 = RING.means + 0.2
    sampler = ODESampler(20)
    errors = [
        (sampler(RING, sampler.invert(RING, x1, correct=m).x) - x1).abs().max().item()
        for m in (0, 1, 2, 40)
    ]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[3] < 1e-12


def test_true_is_one_correction_and_false_is_none():
    sampler, x1 = ODESampler(5), RING.means
    for flag, number in ((True, 1), (False, 0)):
        a, b = (sampler.invert(RING, x1, correct=c).x for c in (flag, number))
        assert torch.equal(a, b)


def test_corrections_that_make_no_sense():
    with pytest.raises(ValueError, match="correct must be at least 0, got -1"):
        ODESampler(5).invert(RING, RING.means, correct=-1)
    with pytest.raises(ValueError, match="correct must be False for method 'heun', got 2"):
        ODESampler(5, "heun").invert(RING, RING.means, correct=2)
