"""Grids by end-point error."""

from itertools import combinations

import pytest
import torch

from flowkit import boss, grids
from flowkit.exact import GaussianFlow
from flowkit.sampling import ODESampler
from tests.boss.fields import F64, noise, ring


def test_the_local_costs_mislead_where_errors_heal():
    """On a contracting flow Bellman's grid beats uniform; on the ring it is far worse."""
    flow, fine = GaussianFlow(2.0, 0.1), grids.uniform(100)
    costs = boss.step_costs(flow, noise(1024, 2), fine)
    x0 = noise(2048, 2, seed=1)
    for num_steps, ratio in ((4, 2.7), (6, 3.3), (8, 3.5)):
        candidates = {
            "uniform": grids.uniform(num_steps),
            "bellman": boss.bellman_grid(costs, fine, num_steps),
        }
        scores = boss.score_grids(flow, x0, candidates)
        assert scores["uniform"] / scores["bellman"] >= ratio
    costs = boss.step_costs(ring(0.1), noise(1024, 2), fine)
    candidates = {"uniform": grids.uniform(6), "bellman": boss.bellman_grid(costs, fine, 6)}
    scores = boss.score_grids(ring(0.1), x0, candidates)
    assert scores["bellman"] > 1.5 * scores["uniform"]


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_the_end_point_grid_is_near_the_best_of_all(method):
    """All grids of 3 steps on 12: brute force over the error at the end."""
    flow, x0, fine = GaussianFlow(2.0, 0.2), noise(256, 2, dtype=F64), grids.uniform(12)
    every = {str(inner): fine[[0, *inner, 12]] for inner in combinations(range(1, 12), 2)}
    reference = ODESampler(fine, method)
    scores = boss.score_grids(flow, x0, every, method=method, reference=reference)
    grid = boss.endpoint_grid(flow, x0, fine, 3, method=method)
    mine = boss.score_grids(flow, x0, {"mine": grid}, method=method, reference=reference)["mine"]
    assert mine <= sorted(scores.values())[1] + 1e-12  # the best but one, or the best
    assert mine < scores["(4, 8)"]


def test_steps_that_diverge_are_not_taken():
    """Large early steps overflow; the program passes them by."""

    def explosive(x, t, cond=None):
        return torch.where(x > 3, 1e30 * x.square(), 20 * (t[:, None] < 0.2) * torch.ones_like(x))

    x0 = torch.full((8, 1), -1.5)
    grid = boss.endpoint_grid(explosive, x0, 20, 6)
    assert ODESampler(grid)(explosive, x0).isfinite().all()
    assert not ODESampler(6)(explosive, x0).isfinite().all()


def test_second_order_methods_get_grids_of_their_own():
    flow, x0, fine = GaussianFlow(2.0, 0.1), noise(192, 1), 24
    for method in ("midpoint", "heun"):
        found = boss.optimize_grid(flow, x0, 4, method=method, fine_steps=fine)
        scores = boss.score_grids(flow, noise(512, 1, seed=1), found.grids, method=method)
        assert scores[found.winner] < 0.8 * scores["uniform"]


def test_a_part_of_the_way():
    part = torch.linspace(0.3, 0.8, 26, dtype=F64)
    found = boss.optimize_grid(ring(0.3), noise(60, 2), 4, fine_steps=part)
    for grid in found.grids.values():
        assert (grid[0], grid[-1]) == (part[0], part[-1])
    assert boss.score_grids(ring(0.3), noise(60, 2), {"part": part})["part"] < 0.1
