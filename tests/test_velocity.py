"""The protocol of one solve: every subset of what a velocity may offer, through everything."""

import functools
import re
from itertools import chain, combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowkit import grids
from flowkit.boss import endpoint_grid, optimize_grid, score_grids, step_costs
from flowkit.flowopt import FlowOpt, step_bound
from flowkit.guidance import Autoguidance, ClassifierFree
from flowkit.likelihood import log_likelihood
from flowkit.sampling import ODESampler
from flowkit.velocity import BoundVelocity, Velocity, bind

OFFERS = ("bind", "begin_step", "edges", "rows")
SUBSETS = list(chain.from_iterable(combinations(OFFERS, k) for k in range(len(OFFERS) + 1)))
COND = torch.tensor([1, 2, 1])
ROWS = 7  # counted at each call by a velocity that counts


def plain(x, t, cond=None):
    """``dx/dt = c(1 + t) − x``, elementwise, so that rounding is the same in any batch."""
    pull = 0 if cond is None else (cond.to(x) * (1 + t))[:, None]
    return pull - x


def offering(subset, edge=0.5):
    """The same field with some attributes, on the velocity or on what ``bind`` returns."""
    log = SimpleNamespace(steps=[], binds=[], calls=[])

    class Field:
        def __init__(self, cond=None):
            self.cond = cond
            if "rows" in subset:
                self.rows = 0
            if "edges" in subset:
                self.edges = [edge]
            if "begin_step" in subset:
                self.begin_step = lambda left, right: log.steps.append((left, right))

        def __call__(self, x, t, cond=None):
            log.calls.append((len(x), t[0].item()))
            if "rows" in subset:
                self.rows += ROWS
            return plain(x, t, self.cond if "bind" in subset and self.cond is not None else cond)

    class Binding(nn.Module):
        def forward(self, x, t, cond=None):
            return plain(x, t, cond)

        def bind(self, cond, grid):
            log.binds.append((cond, grid))
            return Field(cond)

    return (Binding() if "bind" in subset else Field()), log


def takes_part(subset):
    return "bind" in subset or "begin_step" in subset


def x0():
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_sampler(subset):
    velocity, log = offering(subset, edge=0.6)
    assert isinstance(velocity, Velocity)
    sampler = ODESampler(4)
    solution = sampler.solve(velocity, x0(), COND)
    split = takes_part(subset) and "edges" in subset
    times = [0.0, 0.25, 0.5, 0.6, 0.75, 1.0] if split else [0.0, 0.25, 0.5, 0.75, 1.0]
    # Euler's steps by hand
    x = x0()
    for left, right in pairwise(times):
        x = x + (right - left) * plain(x, torch.full((3,), left), COND)
    torch.testing.assert_close(solution.x, x)
    assert solution.nfe == len(times) - 1
    counted = takes_part(subset) and "rows" in subset
    assert solution.rows == solution.nfe * (ROWS if counted else 3)
    steps = list(pairwise(times)) if "begin_step" in subset else []
    torch.testing.assert_close(torch.tensor(log.steps), torch.tensor(steps))
    if "bind" in subset:
        ((cond, grid),) = log.binds
        assert torch.equal(cond, COND)
        assert torch.equal(grid, grids.uniform(4))


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_inverting_sampler(subset):
    """Steps are told by their left and right ends, and the grid stays increasing."""
    velocity, log = offering(subset)
    sampler = ODESampler(2, "heun")
    assert torch.equal(sampler.invert(velocity, x0(), COND).x, sampler.invert(plain, x0(), COND).x)
    assert log.steps == ([(0.5, 1.0), (0.0, 0.5)] if "begin_step" in subset else [])
    if "bind" in subset:
        assert torch.equal(log.binds[0][1], grids.uniform(2))


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_adaptive_sampler(subset, method):
    velocity, log = offering(subset)
    solution = ODESampler(2, method).solve(velocity, x0(), COND)
    # d/dt (x − c t) = −(x − c t) for the pull c (1 + t)
    exact = COND[:, None] + x0() * torch.exp(torch.tensor(-1.0))
    torch.testing.assert_close(solution.x, exact, atol=1e-4, rtol=1e-4)
    assert solution.nfe == len(log.calls)
    assert log.steps == ([(0.0, 0.5), (0.5, 1.0)] if "begin_step" in subset else [])


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_classifier_free_guidance(subset):
    velocity, log = offering(subset)
    solution = ODESampler(2).solve(ClassifierFree(velocity, 2.5, null=0), x0(), COND)
    x = x0()
    for left in (0.0, 0.5):  # v_null + 2.5 (v − v_null) has 2.5 times the pull
        x = x + 0.5 * plain(x, torch.full((3,), left), 2.5 * COND)
    torch.testing.assert_close(solution.x, x)
    assert solution.nfe == 2
    if "bind" in subset:  # one binding for each condition, each is told its steps
        assert [cond.tolist() for cond, _ in log.binds] == [COND.tolist(), [0, 0, 0]]
        assert solution.rows == 4 * (ROWS if "rows" in subset else 3)
        told = [(0.0, 0.5)] * 2 + [(0.5, 1.0)] * 2
    else:  # one call with both conditions
        counted = takes_part(subset) and "rows" in subset
        assert solution.rows == 2 * (ROWS if counted else 6)
        told = [(0.0, 0.5), (0.5, 1.0)]
    assert log.steps == (told if "begin_step" in subset else [])


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_autoguidance_and_guidance_of_guidance(subset):
    velocity, log = offering(subset)
    guided = Autoguidance(ClassifierFree(velocity, 2.0, null=0), plain, scale=3.0)
    solution = ODESampler(2).solve(guided, x0(), COND)
    x = x0()
    for left in (0.0, 0.5):  # pulls: 1 + 3 (2 − 1) = 4
        x = x + 0.5 * plain(x, torch.full((3,), left), 4 * COND)
    torch.testing.assert_close(solution.x, x)
    weak = 2 * 3
    if "bind" in subset:
        assert solution.rows == weak + 4 * (ROWS if "rows" in subset else 3)
    else:
        counted = takes_part(subset) and "rows" in subset
        assert solution.rows == weak + 2 * (ROWS if counted else 6)
    assert bool(log.steps) == ("begin_step" in subset)


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_likelihood(subset):
    velocity, log = offering(subset)
    sampler = ODESampler(4, "rk4")
    found = log_likelihood(sampler, velocity, x0(), COND, divergence="exact")
    # x1 = e^{-1} x0 + c, so log p(x1) = log N(x0) + d
    start = (x0() - COND[:, None]) * torch.e
    exact = torch.distributions.Normal(0, 1).log_prob(start).sum(1) + 2
    torch.testing.assert_close(found.value, exact.double(), atol=1e-3, rtol=1e-3)
    expected = log_likelihood(sampler, plain, x0(), COND, divergence="exact")
    assert torch.equal(found.value, expected.value)
    # The last of three solves halves the steps again, unless one would lie across the edge.
    split = takes_part(subset) and "edges" in subset
    solves = [grids.uniform(n).tolist() for n in (4, 2, 2 if split else 1)]
    assert found.nfe == len(log.calls) == 4 * sum(len(times) - 1 for times in solves)
    steps = [step for times in solves for step in [*pairwise(times)][::-1]]
    assert log.steps == (steps if "begin_step" in subset else [])


@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_boss(subset):
    velocity, _ = offering(subset)
    noise = torch.randn(24, 2, generator=torch.Generator().manual_seed(2))
    cond = torch.arange(24) % 3
    for method in ("euler", "heun"):
        costs = [step_costs(v, noise, 8, cond, method=method) for v in (velocity, plain)]
        assert torch.equal(*costs)
    # The best middle time by brute force: an edge is a stop that costs no step of the grid.
    stops = {0.5} if takes_part(subset) and "edges" in subset else set()
    reference = ODESampler(8)(plain, noise, cond)
    errors = {}
    for middle in grids.uniform(8).tolist()[1:-1]:
        times = torch.tensor(sorted({0.0, middle, 1.0} | stops))
        error = ODESampler(times)(plain, noise, cond) - reference
        errors[middle] = error.square().mean().item()
    best = min(errors, key=errors.__getitem__)
    assert best == (0.25 if stops else 0.5)
    assert endpoint_grid(velocity, noise, 8, 2, cond).tolist() == [0.0, best, 1.0]
    # Edges at a time of every grid, so that they add no step.
    candidates = {"uniform": grids.uniform(2), "late": grids.uniform(4)}
    scores = [score_grids(v, noise, candidates, cond) for v in (velocity, plain)]
    assert scores[0] == scores[1]


def test_boss_searches_a_grid_for_a_velocity_that_is_bound():
    noise = torch.randn(24, 2, generator=torch.Generator().manual_seed(2))
    cond = torch.arange(24) % 3
    velocity, _ = offering(("bind", "begin_step", "rows"))
    found, expected = (optimize_grid(v, noise, 3, cond, fine_steps=12) for v in (velocity, plain))
    assert torch.equal(found.grid, expected.grid)
    assert found.scores == expected.scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subset", SUBSETS, ids="-".join)
def test_flowopt(subset, dtype):
    """Also in half precision, where another wrapper rounds states for the network."""
    velocity, log = offering(subset)
    flowopt = FlowOpt(ODESampler(2), step_size=0.5, num_iters=3)
    source, target = COND, COND + 1
    found = flowopt(velocity, x0().to(dtype), source, target)
    calls = len(log.calls)
    expected = flowopt(plain, x0().to(dtype), source, target)
    assert torch.equal(found.x, expected.x)
    assert torch.equal(found.trace, expected.trace)
    assert found.nfe == expected.nfe == calls
    assert bool(log.steps) == ("begin_step" in subset)
    generator = [torch.Generator().manual_seed(3) for _ in range(2)]
    bounds = [
        step_bound(v, ODESampler(2), x0(), COND, generator=g)
        for v, g in zip((velocity, plain), generator, strict=True)
    ]
    assert torch.equal(bounds[0].bound, bounds[1].bound)


def test_attributes_of_strangers_are_their_own():
    """A graph network has edges, a table rows: neither belongs to the protocol."""

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.edges = torch.tensor([[0, 1], [1, 2]])
            self.rows = "abc"

        def forward(self, x, t, cond=None):
            return -x

    solution = ODESampler(2).solve(Graph(), torch.ones(3, 2))
    torch.testing.assert_close(solution.x, torch.full((3, 2), 0.25))
    assert (solution.nfe, solution.rows) == (2, 6)


def test_bound_velocities_count_each_solve():
    velocity, _ = offering(("bind", "rows"))
    bound = bind(velocity, COND, grids.uniform(2))
    assert isinstance(bound, BoundVelocity)
    assert isinstance(bound, Velocity)
    for _ in range(2):
        solution = ODESampler(2).solve(bound, x0(), COND)
        assert (solution.nfe, solution.rows) == (2, 2 * ROWS)
    assert (bound.nfe, bound.rows) == (4, 4 * ROWS)


def test_a_wrapped_velocity_shares_steps_edges_and_rows():
    velocity, log = offering(OFFERS)
    bound = bind(velocity, COND)
    outer = bound.wrapped(lambda x, t, cond=None: 2 * bound(x, t, cond))
    outer.begin_step(0.0, 0.5)
    x, t = x0(), torch.zeros(3)
    assert torch.equal(outer(x, t, COND), 2 * plain(x, t, COND))
    assert log.steps == [(0.0, 0.5)]
    assert outer.edges == (0.5,)
    assert (outer.nfe, outer.rows, bound.rows) == (1, ROWS, ROWS)


class _WithEdges:
    def __init__(self, edges):
        self.edges = edges

    def begin_step(self, left, right): ...

    def __call__(self, x, t, cond=None):
        return x


@pytest.mark.parametrize(
    ("edges", "error", "message"),
    [
        ([0.5, 1.5], ValueError, r"edges of a velocity must lie in \[0, 1\], got \[0.5, 1.5\]"),
        ([float("nan")], ValueError, r"must lie in \[0, 1\], got \[nan\]"),
        (3, TypeError, "edges of a velocity must be times, got 3"),
        (["a"], TypeError, "must be times, got"),
    ],
)
def test_bad_edges_are_refused(edges, error, message):
    with pytest.raises(error, match=message):
        bind(_WithEdges(edges))


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match=r"velocity must be callable as velocity\(x, t, cond\)"):
        ODESampler(2)(torch.zeros(1), torch.zeros(1, 2))


def test_a_bind_that_returns_no_velocity_is_refused():
    class Forgets(nn.Module):
        def forward(self, x, t, cond=None):
            return x

        def bind(self, cond, grid):
            self.cond = cond  # and nothing is returned

    with pytest.raises(TypeError, match="bind of Forgets must return a velocity, got NoneType"):
        ODESampler(2)(Forgets(), x0())


def two_arguments(x, t):
    return -x


@pytest.mark.parametrize(
    ("velocity", "found"),
    [(two_arguments, "two_arguments(x, t)"), (nn.Linear(2, 2), "Linear(input: torch.Tensor)")],
)
def test_a_velocity_must_take_state_time_and_condition(velocity, found):
    message = re.escape(f"velocity must be callable as velocity(x, t, cond), got {found}")
    for called in (velocity, ClassifierFree(velocity, 2.0, null=0)):
        with pytest.raises(TypeError, match=message):
            ODESampler(2)(called, x0(), torch.tensor([1, 2, 1]))


def test_a_velocity_may_hide_its_arguments():
    @functools.wraps(two_arguments)
    def wrapped(*arguments):
        return two_arguments(*arguments[:2])

    hooked = nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda _, arguments: arguments[:1])
    for velocity in (wrapped, hooked, functools.partial(lambda k, x, t, c: k * x, -1)):
        assert ODESampler(2)(velocity, x0()).shape == x0().shape


@pytest.mark.parametrize("method", ["euler", "dopri5", "bosh3"])
def test_a_velocity_must_return_a_tensor(method):
    with pytest.raises(TypeError, match=r"must return a tensor of the shape of x, .*, got tuple;"):
        ODESampler(2, method)(lambda x, t, cond: (x, t), x0())


def test_errors_within_a_velocity_stay_as_they_are():
    def fails(x, t, cond):
        return two_arguments(x, t, cond)

    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        ODESampler(2)(fails, x0())


@pytest.mark.parametrize(
    ("cond", "found"), [(3, "int"), ([1, 2, 1], "list"), ({"label": 3}, "a mapping of int")]
)
def test_conditions_of_a_wrong_kind_are_refused(cond, found):
    for velocity in (plain, ClassifierFree(plain, 2.0, null=0), Autoguidance(plain, plain, 2.0)):
        with pytest.raises(TypeError, match=f"cond must be a tensor, .*, got {found};"):
            ODESampler(2)(velocity, x0(), cond)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_solve_that_fails_counts_its_calls(method):
    class Fails(nn.Module):
        calls = 0

        def forward(self, x, t, cond=None):
            self.calls += 1
            if self.calls == 5:
                raise KeyError("the fifth")
            return -x

    velocity = Fails()
    bound = bind(velocity)
    with pytest.raises(KeyError, match="the fifth"):
        ODESampler(8, method)(bound, x0())
    assert (bound.nfe, bound.rows) == (4, 12)  # evaluations that returned


def test_attributes_are_looked_up_in_one_place():
    """Nobody but `flowkit.velocity` asks a velocity for what it may offer."""
    import ast
    from pathlib import Path

    import flowkit

    root = Path(flowkit.__file__).parent
    for file in [*root.rglob("*.py"), *root.parent.joinpath("recipes").glob("*.py")]:
        if file.name == "velocity.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            asks = isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "getattr",
                "hasattr",
            )
            if asks and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                assert node.args[1].value not in OFFERS, f"{file}:{node.lineno}"
