"""Grids by end-point error."""

import math
from itertools import combinations, product

import pytest
import torch

from flowkit import boss, grids
from flowkit.boss.endpoint import _program, _Search
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


def in_pieces(ends, values):
    """A velocity of time alone, constant between the numbers of tenths ``ends``."""

    def velocity(x, t, cond=None):
        piece = sum((10 * t + 0.5 >= end).long() for end in ends)
        return torch.tensor(values, dtype=x.dtype)[piece][:, None].expand(x.shape)

    return velocity


@pytest.mark.parametrize("path", [*combinations(range(1, 10), 1), *combinations(range(1, 10), 2)])
def test_the_program_finds_the_path_without_error(path):
    """A velocity that is constant along each step of one path: all other paths end elsewhere."""
    knots = [0, *path, 10]
    velocity, fine = in_pieces(path, [1.0, -math.pi, 20.9][: len(path) + 1]), grids.uniform(10)
    x0, reference = torch.zeros(2, 1, dtype=F64), ODESampler(fine)
    assert _program(velocity, x0, None, fine, "euler", reference, len(path) + 1) == knots
    torch.testing.assert_close(boss.endpoint_grid(velocity, x0, fine, len(path) + 1), fine[knots])


@pytest.mark.parametrize("start", [[0, 21, 22, 23, 24], [0, 6, 12, 18, 24]])
def test_the_search_ends_where_no_move_helps(start):
    """Of any time, the first and the last of the inner ones included."""
    flow, x0, fine = GaussianFlow(2.0, 0.2), noise(64, 2, dtype=F64), grids.uniform(24)
    target = ODESampler(fine)(flow, x0)
    search = _Search(flow, x0, None, fine, "euler", target)
    found = search.improve(start)
    least = search.error(found)
    assert least < search.error(start)
    for i, move in product(range(1, 4), (-1, 1)):
        trial = [*found[:i], found[i] + move, *found[i + 1 :]]
        if found[i - 1] < trial[i] < found[i + 1]:
            assert search.error(trial) >= least


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
