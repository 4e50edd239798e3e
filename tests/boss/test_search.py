"""The recommended grid, its scores, and segments for straightening."""

from functools import partial

import pytest
import torch

from flowkit import boss, grids
from flowkit.boss import endpoint, search
from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.sampling import MeanVelocity, ODESampler
from tests.boss.fields import F64, linear_in_time, noise, ring

EXACT = {
    "ring, std 0.1": (ring(0.1), {4: 0.85, 6: 1.02, 8: 1.02, 12: 1.02, 25: 1.02}),
    "ring, std 0.3": (ring(0.3), {4: 0.92, 6: 0.92, 8: 0.92, 12: 0.92, 25: 0.92}),
    "Gaussian": (GaussianFlow(2.0, 0.1), {4: 1 / 2.7, 6: 1 / 3.3, 8: 1 / 3.5, 12: 0.25, 25: 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("flow", "limits"), EXACT.values(), ids=EXACT)
def test_the_recommended_grid_against_uniform_on_fresh_noise(flow, limits):
    x0 = noise(1536, 2)
    costs = boss.step_costs(flow, x0[:1024], 100)
    for num_steps, limit in limits.items():
        found = boss.optimize_grid(flow, x0, num_steps, costs=costs, extra_noises=512)
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
    x0 = noise(31, 2)  # no multiple of three
    stated = boss.search_rows(31, num_steps, method=method, fine_steps=20, extra_noises=7)
    assert {type(count) for count in stated.values()} == {int}
    if num_steps in (1, 20):  # there is only one such grid
        assert stated["endpoint"] == 0
    field = Counting(ring(0.3))
    costs = boss.step_costs(field, x0[:20], 20, method=method)
    assert field.rows == stated["costs"]
    if method == "euler":
        assert stated["costs"] == 20 * 20
    field.rows = 0
    options = {"method": method, "fine_steps": 20, "costs": costs, "extra_noises": 7}
    boss.optimize_grid(field, x0, num_steps, **options)
    assert field.rows <= stated["endpoint"] + stated["scores"]
    assert field.rows >= stated["scores"]
    field.rows = 0
    boss.endpoint_grid(field, x0[:20], 20, num_steps, method=method)
    of_endpoint = field.rows
    field.rows = 0
    boss.optimize_grid(field, x0, num_steps, **options)
    assert field.rows == of_endpoint + stated["scores"]
    assert stated["scores"] == (11 + 7) * (20 + 3 * num_steps) * (1 if method == "euler" else 2)


@pytest.mark.parametrize("num_steps", [1, 3, 9])
def test_the_search_for_steps_by_means_takes_the_rows_that_it_states(num_steps):
    def mean(x, t, cond=None):
        field.rows += len(x)
        return torch.sin(2 * x) - t[:, :1] * t[:, 1:] * x

    field = Counting(None)
    velocity, x0 = MeanVelocity(mean), noise(31, 2)
    stated = boss.search_rows(31, num_steps, method="mean", fine_steps=12, extra_noises=7)
    costs = boss.step_costs(velocity, x0[:20], 12)
    assert field.rows == stated["costs"] == 20 * (12 + 12 + 12 * 13 // 2)
    field.rows = 0
    boss.optimize_grid(velocity, x0, num_steps, fine_steps=12, costs=costs, extra_noises=7)
    assert stated["scores"] <= field.rows <= stated["endpoint"] + stated["scores"]


@pytest.mark.parametrize("num_steps", [2, 5, 19])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_without_moves_the_stated_rows_of_the_endpoint_grid_are_exact(
    num_steps, method, monkeypatch
):
    """The search alone may end early; the dynamic program and the first grids never do."""
    for module in (endpoint, search):
        monkeypatch.setattr(module, "SEARCH_WALKS", 0)
    field = Counting(ring(0.3))
    boss.endpoint_grid(field, noise(6, 2), 20, num_steps, method=method)
    stated = boss.search_rows(9, num_steps, method=method, fine_steps=20)["endpoint"]
    rest = 6 * (num_steps - 1) * (1 if method == "euler" else 2)  # of a search over its budget
    assert stated - rest == field.rows


@pytest.mark.parametrize("seed", range(4))
def test_a_search_that_ends_within_a_solve_takes_no_more_rows_than_stated(seed):
    field = Counting(ring(0.1))
    boss.endpoint_grid(field, noise(6, 2, seed=seed), 20, 9, method="heun")
    assert field.rows <= boss.search_rows(9, 9, method="heun", fine_steps=20)["endpoint"]


def scored_by_hand(flow, x0, found, extra, cond=None, fine=20):
    """RMSE of all grids on the last third of ``x0`` and on further rows."""
    rows = torch.cat([x0[len(x0) * 2 // 3 :], extra])
    cond = None if cond is None else torch.cat([cond[len(x0) * 2 // 3 :], cond.repeat(9)])
    cond = None if cond is None else cond[: len(rows)]
    return boss.score_grids(flow, rows, found.grids, cond, reference=ODESampler(fine))


@pytest.mark.parametrize("extra_noises", [0, 5, 12, 31])
def test_scores_are_of_the_last_third_and_of_extra_noises(extra_noises):
    """The noises have the shape of x0, and the conditions of its rows in turn."""

    def flow(x, t, cond):
        return GaussianFlow(2.0, 0.2)(x, t) * cond[:, None]

    x0, cond = noise(12, 2, dtype=F64), torch.linspace(0.1, 1, 12, dtype=F64)
    generator = torch.Generator().manual_seed(5)
    options = {"fine_steps": 20, "extra_noises": extra_noises}
    found = boss.optimize_grid(flow, x0, 3, cond, generator=generator, **options)
    generator.manual_seed(5)
    extra = [torch.randn(12, 2, generator=generator).double() for _ in range(3)]
    expected = scored_by_hand(flow, x0, found, torch.cat(extra)[:extra_noises], cond)
    assert found.scores == pytest.approx(expected, rel=1e-9)
    # Without a generator: a fixed stream, which leaves the global generator alone
    state = torch.get_rng_state()
    first, second = (boss.optimize_grid(flow, x0, 3, cond, **options).scores for _ in range(2))
    assert first == second
    assert (first == found.scores) == (extra_noises == 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_other_starts_than_noise_are_judged_by_themselves():
    """Starts of another distribution, and states on the way: none can be drawn."""
    flow, ends = ring(0.3), torch.linspace(0.3, 1, 21, dtype=F64)
    for x0, fine in ((noise(48, 2) + 1, 20), (noise(48, 2), ends)):
        found = boss.optimize_grid(flow, x0, 3, fine_steps=fine)
        expected = scored_by_hand(flow, x0, found, x0[:0], fine=fine)
        assert found.scores == pytest.approx(expected, rel=1e-5)
    x0 = noise(48, 2)
    found = boss.optimize_grid(flow, x0, 3, fine_steps=20)
    extra = boss.optimize_grid(flow, x0, 3, fine_steps=20, extra_noises=2048)
    assert found.scores == extra.scores


RARE = MixtureFlow(
    torch.tensor([0.99, 0.01]), torch.tensor([[0.0, 0.0], [12.0, 0.0]]), torch.tensor([0.5, 0.3])
)


@pytest.mark.slow
def test_rare_losses_do_not_make_a_grid_worse_than_uniform():
    """A far mode of weight .01: most grids of 96 noises are worse, and few searches return one."""
    flow, fresh, worse, better = RARE, noise(40_000, 2, seed=1), 0, 0
    target = ODESampler(25)(flow, fresh)

    def error(grid):
        return (ODESampler(grid)(flow, fresh) - target).square().mean().sqrt().item()

    uniform = error(grids.uniform(4))
    for seed in range(30):
        found = boss.optimize_grid(flow, noise(96, 2, seed=2 + seed), 4, fine_steps=25)
        ratio = error(found.grid) / uniform
        worse += ratio > 1.01
        better += ratio < 0.99
    assert worse <= 1
    assert better >= 3


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


def breaks_at(time):
    def velocity(x, t, cond=None):
        return x / torch.where(t > time, 0.0, 1.0)[:, None]

    return velocity


def converged(**options):
    return boss.converged_costs(ring(0.3), lambda a, b: (noise(b, 2), None), 10, 2, **options)


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
            lambda: boss.bellman_interval(torch.zeros(4, 3, 3), torch.tensor([0, 1.5]), 1),
            r"fine_grid must lie in \[0, 1\]",
        ),
        (
            lambda: boss.converged_costs(ring(0.3), noise, torch.tensor([0, 1.5]), 1),
            r"fine_grid must lie in \[0, 1\]",
        ),
        (
            lambda: boss.search_rows(31, 4, method="rk9"),
            "method must be one of",
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
            lambda: boss.step_costs(breaks_at(0.45), noise(8, 2), 10, method="heun"),
            "states of the reference must be finite, got NaN or infinite values at t = 0.5",
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
            "the number of noises in x0 must be at",
        ),
        (
            lambda: boss.optimize_grid(ring(0.3), noise(8, 2), 3, extra_noises=-1),
            "extra_noises must be at least 0, got -1",
        ),
        (
            lambda: boss.optimize_grid(
                ring(0.3), noise(8, 2), 3, fine_steps=torch.linspace(0.5, 1, 9), extra_noises=4
            ),
            "extra_noises must be 0 for a grid that starts at t = 0.5, got 4; its states are not",
        ),
        (
            lambda: boss.bellman_interval(torch.zeros(4, 11, 11), 10, 2, level=1.0),
            r"level must lie in \(0, 1\), got 1.0",
        ),
        (
            lambda: boss.bellman_interval(torch.zeros(4, 11, 11), 10, 2, level=0.0),
            r"level must lie in \(0, 1\), got 0.0",
        ),
        (
            lambda: boss.bellman_interval(torch.zeros(4, 11, 11), 10, 2, resamples=39),
            "resamples must be at least 40 for an interval of level 0.95, got 39",
        ),
        (
            partial(converged, limit=32),
            "limit must be at least 64, got 32",
        ),
        (
            partial(converged, tolerance=0),
            "tolerance must be positive and finite, got 0",
        ),
        (lambda: boss.score_grids(ring(0.3), noise(5, 2), {}), "grids must hold at least one grid"),
        (
            lambda: boss.score_grids(
                ring(0.3), noise(5, 2), {"a": grids.uniform(2), "b": torch.tensor([0, 0.5])}
            ),
            "grids must run from 0 to 1 like the first grid, got 0 to 0.5 for 'b'",
        ),
        (
            partial(converged, start=8),
            "start must be at least 16, got 8",
        ),
        (
            partial(converged, start=40),
            "start must be a multiple of 16, got 40",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_a_number_of_steps_is_an_integer():
    with pytest.raises(TypeError, match=r"num_steps must be an integer, got 4.0"):
        boss.bellman_grid(torch.zeros(11, 11), 10, 4.0)
    with pytest.raises(TypeError, match=r"resamples must be an integer, got 60.0"):
        boss.bellman_interval(torch.zeros(4, 11, 11), 10, 2, resamples=60.0)
    with pytest.raises(TypeError, match=r"extra_noises must be an integer, got 9.0"):
        boss.optimize_grid(ring(0.3), noise(8, 2), 3, extra_noises=9.0)


def test_a_velocity_that_is_not_finite_is_refused():
    def breaks(limit):
        return lambda x, t, cond=None: torch.where(x.abs() > limit, torch.nan, -x)

    for limit, message in ((1, "velocity must be finite"), (3.2, "the solution .* must be finite")):
        with pytest.raises(ValueError, match=message):
            boss.optimize_grid(breaks(limit), noise(60, 2).clamp(-3, 3), 3, fine_steps=20)


def test_a_grid_in_use_must_be_beaten():
    """By the other grids: a good one wins, a bad one does not."""
    flow, x0 = GaussianFlow(2.0, 0.1), noise(96, 2)
    best = boss.optimize_grid(flow, x0, 4).grid
    bad = torch.tensor([0, 0.01, 0.02, 0.03, 1.0], dtype=F64)
    for grid, winners in ((best, ["baseline"]), (bad, ["bellman", "endpoint"])):
        found = boss.optimize_grid(flow, x0, 4, baseline=grid)
        assert found.winner in winners
        assert list(found.grids) == ["baseline", "bellman", "endpoint"]
        assert torch.equal(found.grids["baseline"], grid)
    with pytest.raises(ValueError, match="baseline must have 4 steps, got 3"):
        boss.optimize_grid(flow, x0, 4, baseline=torch.linspace(0, 1, 4))
