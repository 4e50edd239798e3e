"""BOSS: costs, dynamic programs, scores and segments against closed forms and brute force."""

import math
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit import boss, grids
from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.guidance import ClassifierFree
from flowkit.sampling import ODESampler

F64 = torch.float64


def ring(std, dtype=torch.float32):
    angles = 2 * math.pi * torch.arange(8, dtype=dtype) / 8
    means = 4 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return MixtureFlow(torch.ones(8, dtype=dtype), means, torch.full((8,), std, dtype=dtype))


def noise(count, *shape, seed=0, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_in_time(x, t, cond=None):
    return (2 * t[:, None]).expand(x.shape).to(x.dtype)


def random_costs(n, seed):
    costs = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return costs.masked_fill(~torch.ones(n, n).bool().triu(1), torch.inf)


def path_cost(costs, fine, grid):
    knots = [int((fine == t).nonzero()) for t in grid]
    return sum(costs[j, k].item() for j, k in pairwise(knots))


# --- costs ---------------------------------------------------------------------------------------


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


def test_costs_of_a_guided_field_see_its_conditions():
    def net(x, t, cond):
        return cond[:, None] * x

    guided = ClassifierFree(net, 2.0, 0.0)
    x0, cond = noise(10, 3, dtype=F64), torch.linspace(-1, 1, 10, dtype=F64)
    fine = grids.uniform(6)
    states = ODESampler(fine).solve(guided, x0, cond, return_path=True).path
    costs = boss.step_costs(guided, x0, fine, cond, chunk_size=3)
    torch.testing.assert_close(costs, direct_costs(guided, fine, states, cond=cond))
    named = ClassifierFree(lambda x, t, cond: net(x, t, cond["a"]), 2.0, {"a": 0.0})
    torch.testing.assert_close(
        boss.step_costs(named, x0, fine, {"a": cond}, chunk_size=3), costs, rtol=1e-12, atol=1e-14
    )


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


# --- Bellman's program -------------------------------------------------------------------------


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


# --- how sure ------------------------------------------------------------------------------------


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


# --- the end point -------------------------------------------------------------------------------


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


EXACT = {
    "ring, std 0.1": (ring(0.1), {4: 0.85, 6: 1.02, 8: 1.02, 12: 1.02, 25: 1.02}),
    "ring, std 0.3": (ring(0.3), {4: 0.92, 6: 0.92, 8: 0.92, 12: 0.92, 25: 0.92}),
    "Gaussian": (GaussianFlow(2.0, 0.1), {4: 1 / 2.7, 6: 1 / 3.3, 8: 1 / 3.5, 12: 0.25, 25: 0.1}),
}


@pytest.mark.parametrize(("flow", "limits"), EXACT.values(), ids=EXACT)
def test_the_recommended_grid_against_uniform_on_fresh_noise(flow, limits):
    x0 = noise(1536, 2)
    costs = boss.step_costs(flow, x0[:1024], 100)
    for num_steps, limit in limits.items():
        found = boss.optimize_grid(flow, x0, num_steps, costs=costs)
        fresh = boss.score_grids(
            flow, noise(4096, 2, seed=1), {"found": found.grid, "uniform": grids.uniform(num_steps)}
        )
        assert fresh["found"] <= limit * fresh["uniform"]
        assert found.grid is found.grids[found.winner]
        assert set(found.scores) == set(found.grids) == {"uniform", "bellman", "endpoint"}
        assert found.scores[found.winner] <= found.scores["uniform"]


def test_of_grids_that_are_all_exact_the_uniform_one_is_recommended():
    found = boss.optimize_grid(lambda x, t, cond: torch.full_like(x, 1.3), noise(12, 2), 5)
    assert found.winner == "uniform"
    for grid in found.grids.values():
        torch.testing.assert_close(grid, grids.uniform(5))


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


def test_scores_are_errors_to_the_reference_per_element():
    x0 = noise(50, 3)
    scores = boss.score_grids(
        linear_in_time, x0, {"one": grids.uniform(1), "two": grids.uniform(2)}
    )
    # Euler's n steps end at x0 + (n − 1)/n, the reference's 100 at x0 + 0.99
    assert scores == pytest.approx({"one": 0.99, "two": 0.49}, rel=1e-5)
    exact = ODESampler(100, "midpoint")
    scores = boss.score_grids(linear_in_time, x0, {"two": grids.uniform(2)}, reference=exact)
    assert scores == pytest.approx({"two": 0.5}, rel=1e-5)
    # the reference's own error
    fine = {"fine": grids.uniform(100)}
    scores = boss.score_grids(linear_in_time, x0, fine, reference=exact)
    assert scores == pytest.approx({"fine": 0.01}, rel=1e-3)


class Counting:
    def __init__(self, velocity):
        self.velocity, self.rows = velocity, 0

    def __call__(self, x, t, cond=None):
        self.rows += len(x)
        return self.velocity(x, t, cond)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 19, 20])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_search_takes_the_rows_that_it_states(num_steps, method):
    x0 = noise(30, 2)
    stated = boss.search_rows(30, num_steps, method=method, fine_steps=20)
    field = Counting(ring(0.3))
    costs = boss.step_costs(field, x0[:20], 20, method=method)
    assert field.rows == stated["costs"]
    if method == "euler":
        assert stated["costs"] == 20 * 20
    field.rows = 0
    boss.optimize_grid(field, x0, num_steps, method=method, fine_steps=20, costs=costs)
    assert field.rows <= stated["endpoint"] + stated["scores"]
    assert field.rows >= stated["scores"]


# --- segments ------------------------------------------------------------------------------------


def test_segments_are_the_chords_of_the_teacher():
    flow, x0, grid = ring(0.3, F64), noise(6, 2, dtype=F64), torch.tensor([0.0, 0.333, 0.5, 1.0])
    batch = boss.segments(flow, x0, 100, grid, cond=torch.arange(6))
    teacher = ODESampler(torch.cat([grids.uniform(100), grid.double()]).unique())
    path = teacher.solve(flow, x0, return_path=True).path
    places = [int((teacher.times == t).nonzero()) for t in grid.double()]
    starts, ends = (batch[k].unflatten(0, (6, 3)) for k in ("x0", "x1"))
    torch.testing.assert_close(starts, path[places[:-1]].transpose(0, 1))
    torch.testing.assert_close(ends, path[places[1:]].transpose(0, 1))
    assert torch.equal(starts[:, 1:], ends[:, :-1])
    torch.testing.assert_close(batch["t0"].unflatten(0, (6, 3)), grid[:-1].double().expand(6, 3))
    torch.testing.assert_close(batch["t1"].unflatten(0, (6, 3)), grid[1:].double().expand(6, 3))
    assert batch["cond"].tolist() == [i for i in range(6) for _ in range(3)]


def test_one_segment_is_a_pair_of_noise_and_sample():
    flow, x0 = ring(0.3), noise(6, 2)
    batch = boss.segments(flow, x0, 50, grid=1, cond={"a": torch.arange(6)})
    torch.testing.assert_close(batch["x0"], x0)
    torch.testing.assert_close(batch["x1"], ODESampler(50)(flow, x0))
    assert batch["cond"]["a"].tolist() == list(range(6))


# --- refusals ------------------------------------------------------------------------------------


def breaks_at(time):
    def velocity(x, t, cond=None):
        return x / torch.where(t > time, 0.0, 1.0)[:, None]

    return velocity


BAD_COSTS = torch.zeros(11, 11, dtype=F64)
BAD_COSTS[3, 7] = torch.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: boss.bellman_grid(torch.zeros(101, 101), 100, 200),
            r"num_steps must lie in \[1, 100\] for a grid of 101 times, got 200",
        ),
        (
            lambda: boss.endpoint_grid(ring(0.3), noise(8, 2), 10, 0),
            r"num_steps must lie in \[1, 10\]",
        ),
        (
            lambda: boss.optimize_grid(ring(0.3), noise(8, 2), 101),
            r"num_steps must lie in \[1, 100\]",
        ),
        (
            lambda: boss.bellman_grid(BAD_COSTS, 10, 2),
            r"costs must be finite above the diagonal, got nan for the step from t = 0.3 to 0.7",
        ),
        (
            lambda: boss.bellman_grid(torch.zeros(5, 5), 10, 2),
            r"costs must have the shape of fine_grid, squared, \(11, 11\), got \(5, 5\)",
        ),
        (
            lambda: boss.step_costs(breaks_at(0.45), noise(8, 2), 10),
            "velocity must be finite, got NaN or infinite values at t = 0.5, step 5 of 10",
        ),
        (
            lambda: boss.endpoint_grid(breaks_at(0.45), noise(8, 2), 10, 3),
            "states of the reference must be finite, got NaN or infinite values at t = 0.6",
        ),
        (
            lambda: boss.step_costs(ring(0.3), noise(8, 2), 10, reference=ODESampler(15)),
            r"reference.grid must have the ends of fine_grid .* got no time at t = 0.",
        ),
        (
            lambda: boss.step_costs(
                ring(0.3), noise(8, 2), torch.tensor([0.5, 1.0]), reference=ODESampler(2)
            ),
            r"reference.grid must have the ends .* got no time at t = 0.5",
        ),
        (lambda: boss.step_costs(ring(0.3), noise(8, 2), 10, groups=3), "groups must divide the 8"),
        (
            lambda: boss.step_costs(ring(0.3), noise(8, 2), 10, method="rk4"),
            "method must be one of euler, heun, midpoint, got 'rk4'",
        ),
        (
            lambda: boss.bellman_interval(torch.zeros(11, 11), 10, 2),
            r"costs must have shape \(groups, n, n\) with at least 2 groups, got shape \(11, 11\)",
        ),
        (
            lambda: boss.optimize_grid(ring(0.3), noise(5, 2), 3),
            "number of noises in x0 must be at",
        ),
        (lambda: boss.score_grids(ring(0.3), noise(5, 2), {}), "grids must hold at least one grid"),
        (
            lambda: boss.score_grids(
                ring(0.3), noise(5, 2), {"a": grids.uniform(2), "b": torch.tensor([0, 0.5])}
            ),
            "grids must run from 0 to 1 like the first grid, got 0 to 0.5 for 'b'",
        ),
        (
            lambda: boss.converged_costs(
                ring(0.3), lambda a, b: (noise(b, 2), None), 10, 2, start=8
            ),
            "start must be at least 16, got 8",
        ),
        (
            lambda: boss.converged_costs(
                ring(0.3), lambda a, b: (noise(b, 2), None), 10, 2, start=40
            ),
            "start must be a multiple of 16, got 40",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_number_of_steps_is_an_integer():
    with pytest.raises(TypeError, match=r"num_steps must be an integer, got 4.0"):
        boss.bellman_grid(torch.zeros(11, 11), 10, 4.0)
