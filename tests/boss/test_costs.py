"""Step costs against direct sums, closed forms and finer references."""

import math
from itertools import combinations

import pytest
import torch

from flowkit import boss, grids
from flowkit.guidance import ClassifierFree
from flowkit.sampling import ODESampler
from tests.boss.fields import F64, linear_in_time, noise, ring


def direct_costs(velocity, fine, states, method="euler", cond=None):
    """The definition, with one-step solves."""
    n = len(fine)
    costs = torch.full((n, n), torch.inf, dtype=F64)
    for j, k in combinations(range(n), 2):
        step = ODESampler(fine[[j, k]], method)(velocity, states[j], cond)
        costs[j, k] = (states[k] - step).double().square().flatten(1).sum(1).mean()
    return costs


FINES = {
    "uniform": grids.uniform(12),
    "shifted": grids.shifted(12, 3.0),
    "part": torch.linspace(0.2, 0.7, 9),
}


@pytest.mark.parametrize("fine", FINES.values(), ids=FINES)
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_gram_costs_are_the_direct_ones(fine, chunk_size):
    flow, x0, fine = ring(0.3, F64), noise(17, 2, dtype=F64), fine.double()
    states = ODESampler(fine).solve(flow, x0, return_path=True).path
    costs = boss.step_costs(flow, x0, fine, chunk_size=chunk_size)
    torch.testing.assert_close(costs, direct_costs(flow, fine, states), rtol=1e-10, atol=1e-10)
    assert costs.dtype == F64
    assert (costs.diagonal(1) == 0).all()


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun"])
def test_costs_against_a_finer_reference_of_higher_order(method):
    flow, x0, fine = ring(0.3, F64), noise(9, 2, dtype=F64), grids.uniform(8)
    reference = ODESampler(grids.blockwise(fine, 3), "rk4")
    states = reference.solve(flow, x0, return_path=True).path[::3]
    costs = boss.step_costs(flow, x0, fine, method=method, reference=reference, chunk_size=4)
    expected = direct_costs(flow, fine, states, method)
    torch.testing.assert_close(costs, expected, rtol=1e-10, atol=1e-10)
    assert (costs.diagonal(1) > 1e-12).all()  # such a reference sees the fine grid's own errors


@pytest.mark.parametrize("method", ["midpoint", "heun"])
def test_costs_of_second_order_steps(method):
    flow, x0, fine = ring(0.3, F64), noise(9, 2, dtype=F64), grids.power(8, 1.5)
    states = ODESampler(fine, method).solve(flow, x0, return_path=True).path
    costs = boss.step_costs(flow, x0, fine, method=method)
    torch.testing.assert_close(costs, direct_costs(flow, fine, states, method))


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_costs_of_a_guided_field_see_its_conditions(method):
    def net(x, t, cond):
        return cond[:, None] * x

    guided = ClassifierFree(net, 2.0, 0.0)
    x0, cond = noise(10, 3, dtype=F64), torch.linspace(-1, 1, 10, dtype=F64)
    fine = grids.uniform(6)
    states = ODESampler(fine, method).solve(guided, x0, cond, return_path=True).path
    costs = boss.step_costs(guided, x0, fine, cond, method=method, chunk_size=3)
    torch.testing.assert_close(costs, direct_costs(guided, fine, states, method, cond))
    named = ClassifierFree(lambda x, t, cond: net(x, t, cond["a"]), 2.0, {"a": 0.0})
    of_named = boss.step_costs(named, x0, fine, {"a": cond}, method=method, chunk_size=3)
    torch.testing.assert_close(of_named, costs, rtol=1e-12, atol=1e-14)


def test_costs_by_groups_average_to_the_whole():
    flow, x0 = ring(0.3, F64), noise(24, 2, dtype=F64)
    groups = boss.step_costs(flow, x0, 10, groups=6, chunk_size=5)
    for part, rows in zip(groups, x0.split(4), strict=True):
        torch.testing.assert_close(part, boss.step_costs(flow, rows, 10), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        groups.mean(0), boss.step_costs(flow, x0, 10), rtol=1e-10, atol=1e-12
    )


def test_costs_of_a_velocity_linear_in_time():
    costs = boss.step_costs(linear_in_time, torch.zeros(3, 1, dtype=F64), 100)
    m = torch.arange(101)[None, :] - torch.arange(101)[:, None]
    closed = (1e-8 * m.double() ** 2 * (m - 1).double() ** 2).masked_fill(m <= 0, torch.inf)
    torch.testing.assert_close(costs, closed, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_costs_below_round_off_are_zero(dtype):
    direction = noise(5, 3, dtype=dtype)

    def straight(x, t, cond=None):
        wobble = 4 * torch.finfo(dtype).eps * torch.sin(1e4 * t[:, None])
        return direction[: len(x)] * (1 + wobble)

    costs = boss.step_costs(straight, torch.zeros(5, 3, dtype=dtype), 100)
    assert set(costs.unique().tolist()) == {0.0, math.inf}
