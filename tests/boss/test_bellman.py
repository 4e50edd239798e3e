"""Bellman's program against brute force and known optima, and how sure its grids are."""

import math
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from flowkit import boss, grids
from flowkit.exact import GaussianFlow
from flowkit.sampling import ODESampler
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


def by_hand(costs, fine, num_steps, level, resamples, seed):
    """The interval of the least cost by loops over bootstrap samples and brute force."""
    groups, last = len(costs), len(fine) - 1
    paths = [(0, *inner, last) for inner in combinations(range(1, last), num_steps - 1)]
    along = torch.stack(
        [sum(costs[:, j, k] for j, k in pairwise(path)) for path in paths]
    )  # (paths, groups)

    def least(rows):
        found = along[:, rows][along[:, rows].mean(1).argmin()]
        return found.mean().item(), found.std(correction=0).item() / (groups - 1) ** 0.5

    value, error = least(torch.arange(groups))
    draws = torch.randint(
        groups, (resamples, groups), generator=torch.Generator().manual_seed(seed)
    )
    values, moves = [], []
    for draw in draws:
        other, its_error = least(draw)
        values.append(other)
        moves.append(error * (other - value) / its_error)
    place = int((resamples + 1) * (1 - level) / 2) - 1
    reach = student.ppf((1 + level) / 2, groups - 1) * error
    low = min(value - reach, sorted(values)[place])
    return value, (low, value + max(reach, -sorted(moves)[place]))


@pytest.mark.parametrize("level", [0.95, 0.5])
@pytest.mark.parametrize("scale", [0.02, 1.0, 8.0])
def test_the_interval_is_that_of_its_definition(scale, level):
    """Even, spread and heavy-tailed costs, so that each of the ends' two parts decides once."""
    fine = grids.power(5, 1.3)
    spread = torch.rand(9, 6, 6, generator=torch.Generator().manual_seed(3), dtype=F64)
    costs = random_costs(6, 0) + (scale * spread if scale < 8 else 8 * spread**8)
    generator = torch.Generator().manual_seed(1)
    found = boss.bellman_interval(costs, fine, 3, level=level, resamples=118, generator=generator)
    value, interval = by_hand(costs, fine, 3, level, 118, seed=1)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.value_interval == pytest.approx(interval, rel=1e-9)
    assert torch.equal(found.grid, boss.bellman_grid(costs.mean(0), fine, 3))
    draws = torch.randint(9, (118, 9), generator=torch.Generator().manual_seed(1))
    moved = torch.stack([boss.bellman_grid(costs[draw].mean(0), fine, 3) for draw in draws])
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=F64)
    torch.testing.assert_close(found.knots_interval, moved.quantile(ends, dim=0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flow", "num_steps", "truth_from", "least"),
    [
        (GaussianFlow(2.0, 0.3), 4, torch.tensor([[-1.0] * 2, [1.0] * 2], dtype=F64), 0.945),
        (ring(0.3, F64), 8, noise(80_000, 2, seed=1, dtype=F64), 0.92),
    ],
    ids=["Gaussian", "ring"],
)
def test_intervals_cover_the_least_cost(flow, num_steps, truth_from, least):
    """400 intervals from 16 groups of 4 noises; quantiles of V* alone cover 92 % and 78 %.

    Costs of a Gaussian flow are quadratic in the noise: the noises -1 and 1 have their exact mean.
    """
    fine, repeats = grids.uniform(20), 400
    many = boss.step_costs(flow, truth_from, fine)
    truth = path_cost(many, fine, boss.bellman_grid(many, fine, num_steps))
    x0 = noise(repeats * 64, *truth_from.shape[1:], seed=2, dtype=F64)
    costs = boss.step_costs(flow, x0, fine, groups=repeats * 16)
    generator, covered = torch.Generator().manual_seed(0), 0
    for some in costs.split(16):
        low, high = boss.bellman_interval(some, fine, num_steps, generator=generator).value_interval
        covered += low <= truth <= high
    assert least <= covered / repeats < 0.995


@pytest.mark.parametrize("level", [0.95, 0.5])
def test_the_interval_of_a_time_is_of_quantiles_of_the_resampled_times(level):
    """Costs without a common part, so that the times move."""
    costs = torch.rand(9, 9, 9, generator=torch.Generator().manual_seed(3), dtype=F64)
    generator = torch.Generator().manual_seed(1)
    found = boss.bellman_interval(costs, 8, 3, level=level, resamples=60, generator=generator)
    draws = torch.randint(9, (60, 9), generator=torch.Generator().manual_seed(1))
    moved = torch.stack([boss.bellman_grid(costs[draw].mean(0), 8, 3) for draw in draws])
    for row, share in zip(found.knots_interval, ((1 - level) / 2, (1 + level) / 2), strict=True):
        torch.testing.assert_close(row, moved.quantile(share, dim=0))


def test_two_groups_that_differ_leave_the_upper_end_open():
    """A bootstrap sample of one group alone has no spread: its t value is infinite."""
    costs = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(3), dtype=F64)
    found = boss.bellman_interval(costs, 5, 3, level=0.8, resamples=40)
    assert found.value_interval[1] == math.inf
    boss.bellman_interval(costs, 5, 3, level=0.5, resamples=4)  # the fewest: 2 / (1 - level)
    assert -math.inf < found.value_interval[0] < found.value


def test_without_spread_the_interval_is_a_point():
    costs = boss.step_costs(linear_in_time, torch.zeros(32, 1, dtype=F64), 100, groups=16)
    found = boss.bellman_interval(costs, 100, 4)
    assert found.value_interval == pytest.approx((found.value, found.value), rel=1e-9)
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


def test_noises_grow_until_the_times_are_sure():
    """Two steps in five: 2 + 3 or 3 + 2, as the noise has it, so one of three knots moves by .1."""
    cond = noise(128, dtype=F64)
    fine = torch.linspace(0.5, 1, 6, dtype=F64)  # of length .5: the mean width is .0667 of it

    def tilted(x, t, cond):
        return (t + 0.2 * cond * (t - 0.75) ** 2)[:, None]

    def draw(first, count):
        return torch.zeros(count, 1, dtype=F64), cond[first : first + count]

    for tolerance, count in ((0.068, 64), (0.065, 128)):
        generator = torch.Generator().manual_seed(0)
        costs, _ = boss.converged_costs(
            tilted, draw, fine, 2, tolerance=tolerance, limit=128, generator=generator
        )
        assert 4 * len(costs) == count
    # Without costs the value is certain.
    constant = lambda x, t, cond: torch.ones_like(x)  # noqa: E731
    assert len(boss.converged_costs(constant, draw, fine, 2, limit=128)[0]) == 16


def test_costs_until_steady_are_those_of_the_options():
    x0, cond = noise(64, 2, dtype=F64), noise(64, seed=1, dtype=F64)

    def growing(x, t, cond):
        return cond[:, None] * x * (1 + t[:, None])

    options = {"method": "midpoint", "reference": ODESampler(16, "heun")}
    costs, found = boss.converged_costs(
        growing,
        lambda first, count: (x0, cond),
        8,
        3,
        limit=64,
        generator=torch.Generator().manual_seed(5),
        **options,
    )
    assert torch.equal(costs, boss.step_costs(growing, x0, 8, cond, groups=16, **options))
    again = boss.bellman_interval(costs, 8, 3, generator=torch.Generator().manual_seed(5))
    assert found.value_interval == again.value_interval
