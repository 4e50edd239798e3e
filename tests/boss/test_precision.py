"""Velocities in half precision: grids, scores and chords against those of float32."""

import pytest
import torch

from flowkit import boss, grids
from flowkit.boss.endpoint import endpoint_grid
from flowkit.boss.precision import precise
from flowkit.exact import GaussianFlow
from flowkit.sampling import ODESampler
from tests.boss.fields import noise, ring

HALF = [torch.float16, torch.bfloat16]
FLOW = GaussianFlow(2.0, 0.3)


def halved(dtype, velocity=FLOW, back=None):
    """A network in half precision, perhaps with outputs converted back."""

    def network(x, t, cond=None):
        assert back is not None or x.dtype == dtype  # states in the network's own type
        return velocity(x.float(), t).to(dtype).to(back or dtype)

    return network


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("back", [None, torch.float32])
def test_grids_are_those_of_float32(dtype, back):
    x0 = noise(128, 2).to(dtype)
    start = x0.float() if back else x0
    costs = boss.step_costs(halved(dtype, back=back), start, 50)
    exact = boss.step_costs(FLOW, x0.float(), 50)
    above = exact > exact[exact.isfinite()].max() / 300
    torch.testing.assert_close(costs[above], exact[above], rtol=0.05, atol=0)
    for num_steps in (4, 8):
        mine, theirs = (boss.bellman_grid(c, 50, num_steps) for c in (costs, exact))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.0201)
        assert (theirs - grids.uniform(num_steps)).abs().max() > 0.1


@pytest.mark.parametrize("method", ["midpoint", "heun"])
def test_costs_of_second_order_steps_are_those_of_float32(method):
    x0 = noise(32, 2).half()
    costs = boss.step_costs(halved(torch.float16), x0, 16, method=method)
    exact = boss.step_costs(FLOW, x0.float(), 16, method=method)
    above = exact > exact[exact.isfinite()].max() / 300
    torch.testing.assert_close(costs[above], exact[above], rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_scores_and_the_choice_are_those_of_float32(dtype):
    x0 = noise(96, 2).to(dtype)
    options = {"fine_steps": 40, "extra_noises": 96}
    found = boss.optimize_grid(halved(dtype), x0, 6, **options)
    exact = boss.optimize_grid(FLOW, x0.float(), 6, **options)
    assert found.winner == exact.winner == "endpoint"
    assert found.scores == pytest.approx(exact.scores, rel=0.15)
    fresh = boss.score_grids(FLOW, noise(512, 2, seed=1), {"a": found.grid, "b": exact.grid})
    assert fresh["a"] <= 1.1 * fresh["b"]
    grid = endpoint_grid(halved(dtype), x0, 40, 6)
    torch.testing.assert_close(grid, found.grids["endpoint"], rtol=0, atol=0.05)
    candidates = {"even": grids.uniform(6), "all": grids.uniform(12)}
    scores = boss.score_grids(halved(dtype), x0, candidates)
    assert scores == pytest.approx(boss.score_grids(FLOW, x0.float(), candidates), rel=0.02)


def test_chords_are_in_float32():
    x0 = noise(8, 2).half()
    batch = boss.segments(halved(torch.float16), x0, 20, 20)
    exact = boss.segments(FLOW, x0.float(), 20, 20)
    torch.testing.assert_close(batch["x1"], exact["x1"], rtol=0, atol=2e-3)
    steps = (batch["x1"] - batch["x0"]) / (batch["t1"] - batch["t0"])[:, None]
    slopes = (exact["x1"] - exact["x0"]) / (exact["t1"] - exact["t0"])[:, None]
    torch.testing.assert_close(steps, slopes, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("back", [None, torch.float32])
def test_nothing_but_round_off_is_said(dtype, back):
    """A field that changes by less than its output shows: the uniform grid, with a warning."""

    def nearly_straight(x, t, cond=None):
        return 1.3 + 0.2 * torch.finfo(dtype).eps * (x[:, :1] + t[:, None]).expand(x.shape)

    x0 = noise(32, 2)
    start = x0 if back else x0.to(dtype)
    with pytest.warns(UserWarning, match="all costs are below the round-off of a velocity in half"):
        costs = boss.step_costs(halved(dtype, nearly_straight, back), start, 20, groups=4)
    assert set(costs.unique().tolist()) == {0.0, torch.inf}
    torch.testing.assert_close(boss.bellman_grid(costs[0], 20, 5), grids.uniform(5))
    # Float32 sees the change.
    costs = boss.step_costs(nearly_straight, x0, 20)
    assert costs[0, -1] > 0


def test_a_constant_half_velocity_is_told_and_a_constant_float_is_not():
    with pytest.warns(UserWarning, match="all costs are below the round-off"):
        boss.step_costs(lambda x, t, c: torch.full_like(x, 1.3), noise(4, 2).bfloat16(), 10)
    costs = boss.step_costs(lambda x, t, c: torch.full_like(x, 1.0), noise(4, 2), 10)
    assert set(costs.unique().tolist()) == {0.0, torch.inf}


def test_the_precision_is_that_of_the_values():
    x0, t = noise(64, 2), torch.full((64,), 0.5)
    for dtype in HALF:
        for back in (None, torch.float32):
            velocity, x = precise(halved(dtype, ring(0.3), back), x0 if back else x0.to(dtype))
            assert x.dtype == torch.float32
            assert velocity(x, t).dtype == torch.float32
            assert velocity.eps == torch.finfo(dtype).eps
            assert velocity.returns_half == (back is None)
    velocity, x = precise(ring(0.3), x0)
    assert velocity.eps > 0  # nothing is known before the first output
    ODESampler(2)(velocity, x)
    assert velocity.eps == 0
    velocity, x = precise(lambda x, t, cond: cond * x, x0)
    assert torch.equal(velocity(x, t, torch.tensor(3.0)), 3 * x)
    velocity, x = precise(ring(0.3), x0.double())
    assert velocity(x, t.double()).dtype == torch.float64
