"""The plans of the annealed iteration with Newton steps, beside POT's and closed properties."""

import math

import numpy as np
import ot
import pytest
import torch

from flowkit.couplings import cost_matrix
from flowkit.couplings.transport import assign, entropic_plan
from tests.couplings.points import normals

# By its full name, since the module and its function share one.
MODULE = "flowkit.couplings.sinkhorn"


def off(plan: torch.Tensor) -> float:
    """Return the larger error of the two marginals."""
    rows, columns = plan.sum(1) - 1 / len(plan), plan.sum(0) - 1 / plan.shape[1]
    return max(rows.norm().item(), columns.norm().item())


@pytest.mark.parametrize("reg", [0.3, 5.0])
@pytest.mark.parametrize(("size", "other"), [(20, 20), (20, 31), (31, 20)])
def test_plans_are_those_of_plain_iterations_in_the_log_domain(size, other, reg):
    x0, x1 = normals(0, 31, 2)
    cost = cost_matrix(x0[:size], x1[:other]).double()
    marginals = np.full(size, 1 / size), np.full(other, 1 / other)
    options = {"method": "sinkhorn_log", "numItermax": 10_000, "stopThr": 1e-12}
    expected = ot.sinkhorn(*marginals, cost.numpy(), reg, **options)
    plan = entropic_plan(cost, reg, max_iters=1000, tol=1e-12)
    np.testing.assert_allclose(plan, expected, rtol=0, atol=1e-9 / size)


# Newton steps: without them, the errors after these iterations are 2e-6 to 1e-4.
@pytest.mark.parametrize(("dim", "reg"), [(2, 0.05), (784, 0.5), (784, 0.05)])
def test_sharp_plans_need_a_few_hundred_iterations(dim, reg):
    """A warning would fail the test. A plan of entropy ``H`` costs at most ``reg H`` too much."""
    x0, x1 = normals(1, 64, dim)
    cost = cost_matrix(x0, x1.tanh()).double()
    plan = entropic_plan(cost, reg, max_iters=400)
    assert off(plan) <= 1e-6
    best = cost[assign(cost), range(64)].mean()
    assert best - 1e-4 <= (plan * cost).sum() <= best + reg * math.log(64)


def test_scalings_beyond_the_range_of_the_kernel_are_absorbed(monkeypatch):
    """Without annealing, potentials start far from the solution, where the kernel holds nothing."""
    cost = torch.from_numpy(np.random.default_rng(1).random((20, 20)))
    expected = entropic_plan(cost, 5e-4, max_iters=1000, tol=1e-9)
    monkeypatch.setattr(f"{MODULE}.STAGES", 0)
    plan = entropic_plan(cost, 5e-4, max_iters=20_000, tol=1e-9)
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-8)
