"""Inversion of Euler's steps: corrections as fixed-point iterations."""

from itertools import pairwise

import pytest
import torch

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
    x1, n = torch.ones(1, 1, dtype=torch.float64), 5
    exact = x1 / (1 - 1 / n) ** n
    errors = [
        (ODESampler(n).invert(decay, x1, correct=m).x - exact).abs().item() for m in range(1, 8)
    ]
    for worse, better in pairwise(errors[1:]):
        assert better == pytest.approx(worse / n, rel=0.35)
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
