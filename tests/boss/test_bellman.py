"""Bellman's program against brute force and known optima, and how sure its grids are."""

import math
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit import boss, grids
from tests.boss.fields import F64, linear_in_time, noise, ring


def random_costs(n, seed):
    costs = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return costs.masked_fill(~torch.ones(n, n).bool().triu(1), torch.inf)


def path_cost(costs, fine, grid):
    knots = [int((fine == t).nonzero()) for t in grid]
    return sum(costs[j, k].item() for j, k in pairwise(knots))


@pytest.mark.parametrize("n", range(2, 12))
def test_the_program_finds_what_brute_force_finds(n):
    """All subsets of up to 10 fine steps, for every number of steps."""
    fine = grids.power(n - 1, 1.3)
    for seed, num_steps in product(range(3), range(1, n)):
        costs = random_costs(n, 100 * n + seed)
        grid = boss.bellman_grid(costs, fine, num_steps)
        least = min(
            path_cost(costs, fine, fine[[0, *inner, n - 1]])
            for inner in combinations(range(1, n - 1), num_steps - 1)
        )
        assert len(grid) == num_steps + 1
        assert abs(path_cost(costs, fine, grid) - least) < 1e-12


@given(seed=st.integers(0, 10**6), num_steps=st.integers(1, 12), scale=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=30)
def test_the_path_does_not_change_with_what_is_alike_on_all_paths(seed, num_steps, scale):
    costs, fine = random_costs(13, seed), grids.uniform(12)
    grid = boss.bellman_grid(costs, fine, num_steps)
    potential = noise(13, seed=seed, dtype=F64)
    along = potential[None, :] - potential[:, None]
    for changed in (scale * costs, costs + scale, costs + along):
        assert torch.equal(boss.bellman_grid(changed, fine, num_steps), grid)


@pytest.mark.parametrize(("num_steps", "value"), [(4, 0.0144), (5, 0.00722), (10, 0.00081)])
def test_known_optimum_of_a_velocity_linear_in_time(num_steps, value):
    fine = grids.uniform(100)
    costs = boss.step_costs(linear_in_time, torch.zeros(1, 1, dtype=F64), fine)
    grid = boss.bellman_grid(costs, fine, num_steps)
    torch.testing.assert_close(grid, grids.uniform(num_steps))
    assert path_cost(costs, fine, grid) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("num_steps", "tolerance"), [(4, 0.03), (8, 0.02)])
def test_known_knots_of_a_growing_velocity(num_steps, tolerance):
    def growing(x, t, cond=None):
        return (torch.exp(4 * t) / 4)[:, None].expand(x.shape)

    costs = boss.step_costs(growing, torch.zeros(1, 1, dtype=F64), 400)
    grid = boss.bellman_grid(costs, 400, num_steps)
    expected = 0.5 * torch.log1p(grids.uniform(num_steps) * (math.e**2 - 1))
    torch.testing.assert_close(grid, expected, rtol=0, atol=tolerance)
    assert (grid - grids.uniform(num_steps)).abs().max() > 0.1  # uniform would not do


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 10, 20, 25, 50, 100])
def test_of_equal_grids_the_most_even_is_taken(num_steps):
    costs = boss.step_costs(lambda x, t, cond: torch.full_like(x, 1.3), noise(4, 2), 100)
    torch.testing.assert_close(boss.bellman_grid(costs, 100, num_steps), grids.uniform(num_steps))


def test_equal_grids_where_the_steps_do_not_divide():
    costs = torch.zeros(11, 11, dtype=F64)
    steps = boss.bellman_grid(costs, 10, 4).diff()
    assert sorted((10 * steps).round().int().tolist()) == [2, 2, 3, 3]


def test_one_step_and_all_steps():
    costs, fine = random_costs(8, 0), grids.power(7, 2.0)
    assert torch.equal(boss.bellman_grid(costs, fine, 1), fine[[0, -1]])
    assert torch.equal(boss.bellman_grid(costs, fine, 7), fine)


def test_the_interval_covers_the_value_of_many_noises():
    flow, fine = ring(0.3, F64), grids.uniform(20)
    many = boss.step_costs(flow, noise(8000, 2, seed=1, dtype=F64), fine)
    truth = path_cost(many, fine, boss.bellman_grid(many, fine, 4))
    covered = 0
    for seed in range(20):
        x0 = noise(320, 2, seed=100 + seed, dtype=F64)
        costs = boss.step_costs(flow, x0, fine, groups=32)
        generator = torch.Generator().manual_seed(seed)
        found = boss.bellman_interval(costs, fine, 4, resamples=60, generator=generator)
        low, high = found.value_interval
        covered += low <= truth <= high
        assert torch.equal(found.grid, boss.bellman_grid(costs.mean(0), fine, 4))
        assert (found.knots_interval[0] <= found.grid).all()
        assert (found.grid <= found.knots_interval[1]).all()
        assert found.value == pytest.approx(path_cost(costs.mean(0), fine, found.grid))
    assert covered >= 15


def test_without_spread_the_interval_is_a_point():
    costs = boss.step_costs(linear_in_time, torch.zeros(32, 1, dtype=F64), 100, groups=16)
    found = boss.bellman_interval(costs, 100, 4)
    assert found.value_interval == pytest.approx((found.value, found.value))
    torch.testing.assert_close(found.knots_interval, found.grid.expand(2, 5))


def test_noises_grow_until_the_grid_is_steady():
    flow, asked = ring(0.3), []

    def draw(first, count):
        asked.append((first, count))
        return noise(4096, 2)[first : first + count], None

    def grow(**options):
        asked.clear()
        return boss.converged_costs(
            flow, draw, 20, 4, generator=torch.Generator().manual_seed(0), **options
        )

    costs, found = grow(tolerance=0.1, limit=4096)
    low, high = found.value_interval
    assert high - low <= 0.2 * found.value
    assert found.knots_interval.diff(dim=0).mean() <= 0.1
    assert asked[:2] == [(0, 64), (64, 64)]
    assert sum(count for _, count in asked) == 4 * len(costs) < 4096
    whole = boss.step_costs(flow, noise(4096, 2)[: 4 * len(costs)], 20)
    torch.testing.assert_close(costs.mean(0), whole, rtol=1e-5, atol=1e-7)
    costs, _ = grow(tolerance=1e-6, limit=300)
    assert 4 * len(costs) == 256
    costs, _ = boss.converged_costs(
        linear_in_time, lambda first, count: (torch.zeros(count, 1), None), 20, 4
    )
    assert len(costs) == 16
