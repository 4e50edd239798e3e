"""Steps for segments under a budget."""

from itertools import pairwise, product

import pytest
import torch

from flowkit import grids
from flowkit.blockwise import Blockwise, allocate_steps
from flowkit.boss import bellman_grid, step_costs
from flowkit.exact import GaussianFlow


class Exact:
    def velocity(self, x, t, cond, h):
        return GaussianFlow(2.0, 0.1)(x, t)


def flow(edges):
    return Blockwise(None, [Exact() for _ in edges[1:]], edges)


@pytest.mark.parametrize("prices", [[(1.0, 1.0)] * 3, [(3.0, 1.0), (2.5, 0.7), (4.0, 2.0)]])
@pytest.mark.parametrize("budget", [9.6, 12.0, 15.3])
def test_the_allocation_is_the_best_of_all(prices, budget):
    edges, k = [0.0, 0.3, 0.8, 1.0], 5
    f, x0, fine = flow(edges), torch.randn(64, 2).double(), grids.blockwise(edges, k)
    found = allocate_steps(f, x0, prices, budget, fine_steps=k)
    costs, best = step_costs(f, x0, fine), (float("inf"), None)
    for steps in product(range(1, k + 1), repeat=3):
        price = sum(a + (n - 1) * b for n, (a, b) in zip(steps, prices, strict=True))
        if price > budget:
            continue
        error = 0.0
        for m, n in enumerate(steps):
            part = slice(m * k, (m + 1) * k + 1)
            times = bellman_grid(costs[part, part], fine[part], n)
            knots = torch.searchsorted(fine, times).tolist()
            error += sum(costs[i, j].item() for i, j in pairwise(knots))
        best = min(best, (error, list(steps)))
    assert (found.error, found.steps) == (pytest.approx(best[0]), best[1])
    assert found.price <= budget
    again = allocate_steps(f, x0, prices, budget, fine_steps=k, costs=costs)
    assert torch.equal(again.grid, found.grid)
    assert set(edges) <= {round(t, 9) for t in found.grid.tolist()}
    counts = [int(((found.grid > a) & (found.grid <= b)).sum()) for a, b in pairwise(edges)]
    assert counts == found.steps


def test_steps_go_where_the_flow_bends():
    """The field of a narrow Gaussian bends near the data."""
    f, x0 = flow([0.0, 0.5, 1.0]), torch.randn(64, 2).double()
    early, late = allocate_steps(f, x0, [(1.0, 1.0)] * 2, 8.0).steps
    assert early + late == 8
    assert late > early


def test_dear_steps_are_taken_less_often():
    f, x0 = flow([0.0, 0.5, 1.0]), torch.randn(64, 2).double()
    even = allocate_steps(f, x0, [(1.0, 1.0), (1.0, 1.0)], 8.0).steps
    dear = allocate_steps(f, x0, [(1.0, 1.0), (4.0, 4.0)], 20.0).steps
    assert dear[1] < even[1]


def test_conditions_reach_the_reference():
    class Scaled:
        def velocity(self, x, t, cond, h):
            return GaussianFlow(2.0, 0.1)(x, t) * cond[:, None]

    f, x0 = Blockwise(None, [Scaled(), Scaled()], 2), torch.randn(16, 2).double()
    cond, fine = torch.full((16,), 0.5).double(), grids.blockwise([0.0, 0.5, 1.0], 4)
    costs = step_costs(f, x0, fine, cond)
    prices = [(1.0, 1.0)] * 2
    found = allocate_steps(f, x0, prices, 5.0, cond, fine_steps=4)
    expected = allocate_steps(f, x0, prices, 5.0, fine_steps=4, costs=costs)
    assert found.error == pytest.approx(expected.error)


def test_every_segment_has_a_price():
    with pytest.raises(ValueError, match="prices must hold one pair per segment, 3, got 2"):
        allocate_steps(flow([0.0, 0.3, 0.5, 1.0]), torch.randn(8, 2), [(3.0, 1.0)] * 2, 60)


def test_costs_are_those_of_the_reference():
    f, x0 = flow([0.0, 0.5, 1.0]), torch.randn(8, 2)
    costs = step_costs(f, x0, grids.blockwise([0.0, 0.5, 1.0], 4))
    with pytest.raises(ValueError, match=r"costs must belong to the 7 times .* got shape \(9, 9\)"):
        allocate_steps(f, x0, [(3.0, 1.0)] * 2, 60, fine_steps=3, costs=costs)


def test_a_budget_must_pay_a_step_each():
    with pytest.raises(ValueError, match=r"budget must pay one step in each segment, 7.0, got 6"):
        allocate_steps(flow([0.0, 0.5, 1.0]), torch.randn(8, 2), [(3.0, 1.0), (4.0, 1.0)], 6)
