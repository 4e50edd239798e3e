"""Costs, exact assignments and entropic plans."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm
from torch.testing import assert_close

from flowkit.couplings import (
    MinibatchOT,
    cost_matrix,
)
from flowkit.couplings.transport import COSTS, assign, entropic_plan, paired, potentials
from tests.couplings.points import normals, seeded, seeds


def eight_gaussians_to_moons(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    noise, other = normals(seed, batch, 2)
    angle = torch.arange(batch) % 8 * math.pi / 4
    half = torch.arange(batch) % 2
    turn = torch.linspace(0, math.pi, batch) + half * math.pi
    moons = torch.stack([turn.cos() + half, turn.sin() + 0.5 * half], 1)
    return 5 * torch.stack([angle.cos(), angle.sin()], 1) + 0.3 * noise, 3 * moons + 0.1 * other


@pytest.mark.parametrize("name", sorted(COSTS))
@pytest.mark.parametrize("dim", [3, 40])
def test_named_costs_are_their_formulas(name, dim):
    x0, x1 = normals(0, 31, dim)
    difference = x0.double()[:, None] - x1.double()
    expected = {
        "euclidean": difference.square().sum(-1).sqrt(),
        "sqeuclidean": difference.square().sum(-1),
        "cityblock": difference.abs().sum(-1),
        "inner": -2 * x0.double() @ x1.double().T,
    }[name]
    matrix = cost_matrix(x0, x1, name)
    assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-4)
    assert_close(cost_matrix(x0, x1, COSTS[name]), matrix, rtol=1e-5, atol=1e-4)
    assert_close(paired(x0, x1, name), matrix.diagonal(), rtol=1e-5, atol=1e-4)


def test_a_cost_function_need_not_be_symmetric_and_is_evaluated_in_parts():
    x0, x1 = torch.arange(5.0)[:, None].expand(5, 2**23), torch.ones(3, 2**23)
    matrix = cost_matrix(x0, x1, lambda a, b: 2 * a[..., 0] - b[..., 0])
    assert matrix.tolist() == [[-1.0] * 3, [1.0] * 3, [3.0] * 3, [5.0] * 3, [7.0] * 3]


def test_coincident_points_far_from_the_origin_are_at_distance_zero():
    x = torch.randn(64, 2, generator=seeded(0)) + 1000
    assert cost_matrix(x, x, "euclidean").diagonal().abs().max() == 0


HARD = {
    "plane": lambda: normals(1, 500, 2),
    "images": lambda: normals(2, 300, 3, 16, 16),
    "8 gaussians to moons": lambda: eight_gaussians_to_moons(600, 3),
    "lattice full of ties": lambda: (
        torch.randint(4, (300, 2), generator=seeded(4)).float(),
        torch.randint(4, (300, 2), generator=seeded(5)).float(),
    ),
    "coincident": lambda: (torch.ones(40, 3), torch.zeros(40, 3)),
    "line": lambda: tuple(x * torch.tensor([1.0, 0.0]) for x in normals(6, 300, 2)),
    "outliers": lambda: (normals(7, 300, 2)[0] ** 15, normals(7, 300, 2)[1] ** 9),
    "far from the origin": lambda: tuple(x + 1000 for x in normals(8, 300, 2)),
    "tiny": lambda: tuple(1e-12 * x for x in normals(9, 100, 2)),
    "huge": lambda: tuple(1e14 * x for x in normals(9, 100, 2)),
}


@pytest.mark.parametrize("kind", HARD)
def test_the_reduction_by_potentials_leaves_the_optimum_exact(kind):
    x0, x1 = HARD[kind]()
    pairs = MinibatchOT().pair(x0, x1)
    assert_close(*(p.flatten(1).unique(dim=0, return_counts=True)[1] for p in (x0, pairs.x0)))

    a, b = x0.flatten(1).double().numpy(), x1.flatten(1).double().numpy()
    cost = ot.dist(a, b, metric="sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    ours = np.square(pairs.x0.flatten(1).double().numpy() - b).sum()
    assert ours == pytest.approx(cost[rows, columns].sum(), rel=2e-6)


def test_an_assignment_is_optimal_for_the_cost_in_float64():
    # Entries that float32 cannot tell apart: the potentials may be rough, the optimum may not.
    rng = np.random.default_rng(0)
    cost = 1000 + 1e-6 * rng.random((200, 200))
    ours = assign(torch.from_numpy(cost)).numpy()
    rows, columns = linear_sum_assignment(cost)
    assert cost[ours, rows].sum() == cost[rows, columns].sum()


@pytest.mark.parametrize("size", [40, 100])
def test_a_large_constant_of_one_row_or_column_takes_no_digits_of_the_others(size):
    """A difference of float32 with the constant would keep steps of 0.06."""
    cost = torch.rand(size, size, generator=seeded(0))
    cost[3] = -1e6
    for matrix in (cost, cost.T):
        assert (assign(matrix).numpy() == linear_sum_assignment(matrix.double().T)[1]).all()


def test_minima_alone_make_the_potentials_without_stages():
    cost = cost_matrix(*normals(1, 30, 2)).numpy()
    f, g = potentials(cost, 0, 5)
    assert (f == cost.min(1)).all()
    np.testing.assert_allclose(g, (cost - f[:, None]).min(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "dim"), [(256, 8), (512, 2)])
def test_the_solver_gets_a_matrix_that_is_nearly_zero_on_the_optimum(size, dim, monkeypatch):
    """A tenth of what minima of rows and columns leave; without it, the search takes its time."""
    seen = []
    monkeypatch.setattr(
        "scipy.optimize.linear_sum_assignment",
        lambda matrix: seen.append(matrix) or linear_sum_assignment(matrix),
    )
    cost = cost_matrix(*normals(1, size, dim))
    best = assign(cost).numpy(), np.arange(size)
    f, g = potentials(cost.numpy(), 0, 0)
    left = (cost.numpy() - f[:, None] - g)[best].mean()
    assert np.abs(seen[0][best]).mean() < 0.1 * left
    assign(cost[:40, :40])
    assert (seen[1].min(0) == 0).all()  # small ones: minima of columns alone


@pytest.mark.parametrize("entry", [1e30, -1e30])
def test_an_overflowing_kernel_costs_time_but_not_exactness(entry):
    cost = torch.rand(64, 64, generator=seeded(0))
    cost[3] = entry * torch.rand(64, generator=seeded(1))
    rows, columns = linear_sum_assignment(cost.double())
    assert cost[assign(cost), rows].double().sum() == cost[rows, columns].double().sum()


@pytest.mark.parametrize("reg", [0.5, 4.0, 20.0])
def test_entropic_plan_between_normals_has_the_correlation_of_the_closed_form(reg):
    # The plan is normal, with off-diagonal precision ρ / (1 − ρ²) = 2 / reg.
    x = torch.from_numpy(norm.ppf((np.arange(400) + 0.5) / 400))
    plan = entropic_plan((x[:, None] - x).square(), reg, max_iters=1000)
    rho = math.sqrt(1 + (reg / 4) ** 2) - reg / 4
    assert x @ plan @ x / x.square().mean() == pytest.approx(rho, abs=0.004)


@given(seed=seeds, reg=st.floats(0.5, 20))
@settings(max_examples=15, deadline=None)
def test_entropic_plan_has_uniform_marginals(seed, reg):
    plan = entropic_plan(cost_matrix(*normals(seed, 24, 2)), reg, max_iters=5000)
    uniform = torch.full((24,), 1 / 24, dtype=torch.float64)
    assert_close(plan.sum(0), uniform, rtol=0, atol=1e-6)
    assert_close(plan.sum(1), uniform, rtol=0, atol=1e-6)


def test_entropic_plans_reach_the_tolerance_in_the_iterations_that_are_allowed():
    cost = cost_matrix(*normals(0, 30, 2)).double()
    plan = entropic_plan(cost, 0.3, 1000, tol=1e-12)
    assert (plan.sum(0) - 1 / 30).norm() <= 1e-12
    assert (plan.sum(1) - 1 / 30).norm() <= 1e-12
    with pytest.warns(UserWarning, match=r"more than 1e-12 after 5 iterations at reg 0.3"):
        entropic_plan(cost, 0.3, 5, tol=1e-12)


def test_bad_cost_functions():
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"samples of the same shape as x1, \(3,\), got \(2,\)"):
        cost_matrix(x, torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"cost must map .* got \(4, 4, 2\) for 4 by 4 points"):
        MinibatchOT(lambda a, b: a - b).pair(x, x)
    with pytest.raises(ValueError, match="cost must be finite, got NaN or infinite values"):
        MinibatchOT(lambda a, b: torch.nan * (a - b).sum(-1)).pair(x, x)
