"""Blockwise flows: segments, feature modes and parts."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowkit import grids
from flowkit.blockwise import (
    Blockwise,
    Usage,
    copies,
)
from flowkit.exact import GaussianFlow
from flowkit.guidance import Autoguidance, ClassifierFree
from flowkit.likelihood import log_likelihood
from flowkit.nn import DiT
from flowkit.sampling import ADAPTIVE, FIXED, ODESampler
from tests.blockwise.small_flows import (
    FLOWS,
    Line,
    line_flow,
    randomised,
    tiny_dit,
    tiny_mlp,
)

GAUSSIAN = GaussianFlow(2.0, 0.5)


class Trunk:
    """Features that are the state itself, as a buffer of the solver."""

    def features(self, x, t, cond):
        return x


class ExactStack:
    def velocity(self, x, t, cond, h):
        return GAUSSIAN(x, t)


@settings(max_examples=25, deadline=None)
@given(
    inner=st.lists(st.integers(1, 99), min_size=1, max_size=5, unique=True),
    steps=st.integers(1, 5),
    method=st.sampled_from([*FIXED, "dopri5"]),
)
def test_one_field_in_every_block_is_that_field(inner, steps, method):
    edges = [0.0, *(k / 100 for k in sorted(inner)), 1.0]
    flow = Blockwise(Trunk(), [ExactStack() for _ in edges[1:]], edges)
    x0 = torch.randn(5, 2, dtype=torch.float64)
    sampler, stop = ODESampler(grids.blockwise(edges, steps), method), {"callback": lambda *_: None}
    a, b = sampler.solve(flow, x0), sampler.solve(GAUSSIAN, x0, **stop)  # at all times
    assert (a.x - b.x).abs().max() <= 1e-12
    assert a.nfe == b.nfe
    back = sampler.invert(flow, a.x).x
    assert (back - sampler.invert(GAUSSIAN, a.x, **stop).x).abs().max() <= 1e-12


@pytest.mark.parametrize("method", [*FIXED, *ADAPTIVE])
def test_a_grid_without_the_edges_gets_them_and_says_so(method):
    edges = [0.0, 0.35, 0.6, 1.0]
    flow = Blockwise(Trunk(), [ExactStack() for _ in range(3)], edges)
    x0 = torch.randn(5, 2, dtype=torch.float64)
    coarse = torch.tensor([0.0, 0.5, 0.6, 1.0], dtype=torch.float64)
    union = torch.tensor([0.0, 0.35, 0.5, 0.6, 1.0], dtype=torch.float64)
    with pytest.warns(
        UserWarning, match=r"grid must hold the edges .* without \[0.35\]; the solve splits"
    ):
        a = ODESampler(coarse, method).solve(flow, x0, return_path=True)
    fine, stop = ODESampler(union, method), {"callback": lambda *_: None}  # at all times
    b = fine.solve(GAUSSIAN, x0, return_path=True)
    assert a.path.shape[0] == 4
    assert (a.path - b.path[[0, 2, 3, 4]]).abs().max() <= 1e-12
    assert a.nfe == b.nfe
    with pytest.warns(UserWarning, match="the solve splits steps"):
        back = ODESampler(coarse, method).invert(flow, a.x).x
    assert (back - fine.invert(GAUSSIAN, a.x, **stop).x).abs().max() <= 1e-12


def test_a_solve_of_a_part_of_time_minds_the_edges_inside_it_alone():
    flow = Blockwise(Trunk(), [ExactStack() for _ in range(4)], 4)
    part = torch.tensor([0.3, 0.4, 0.5, 0.7], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(ODESampler(part)(flow, x), ODESampler(part)(GAUSSIAN, x))


EULER = {6: 0.389061, 12: 0.441709, 24: 0.470036, 48: 0.484797}


HEUN = {6: 0.503613, 12: 0.501267, 24: 0.500362}


@pytest.mark.parametrize(
    ("method", "steps", "std"),
    [("euler", n, std) for n, std in EULER.items()] + [("heun", n, std) for n, std in HEUN.items()],
)
def test_final_law_of_the_gaussian_field(method, steps, std):
    flow = Blockwise(None, [ExactStack() for _ in range(6)], 6)
    x0 = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    low, high = ODESampler(steps, method)(flow, x0)[:, 0].tolist()
    assert low == pytest.approx(2.0, abs=1e-12)
    assert high - low == pytest.approx(std, abs=1e-5)


def test_every_stage_of_a_step_is_of_the_steps_own_block():
    """Also the stage on the right edge, where time alone would name the next block."""

    class Named:
        def __init__(self, m, seen):
            self.m, self.seen = m, seen

        def velocity(self, x, t, cond, h):
            self.seen.append((self.m, round(t[0].item(), 3)))
            return torch.zeros_like(x)

    seen = []
    flow = Blockwise(None, [Named(m, seen) for m in range(2)], [0.0, 0.5, 1.0])
    ODESampler(2, "heun")(flow, torch.zeros(1, 1))
    assert seen == [(0, 0.0), (0, 0.5), (1, 0.5), (1, 1.0)]
    seen.clear()
    ODESampler(2, "heun").invert(flow, torch.zeros(1, 1))
    assert seen == [(1, 1.0), (1, 0.5), (0, 0.5), (0, 0.0)]


@pytest.mark.parametrize("name", FLOWS)
def test_rows_go_to_the_stacks_of_their_own_times(name):
    make, shape = FLOWS[name]
    flow = randomised(make())
    x, t = torch.randn(9, *shape), torch.rand(9)
    cond = torch.arange(9) % 3 if name == "dit" else None
    v = flow(x, t, cond)
    for i in range(9):
        rows = slice(i, i + 1)
        c = None if cond is None else cond[rows]
        h = flow.trunk.features(x[rows], t[rows], c)
        m = int(t[i] * 3)
        expected = flow.stacks[m].velocity(x[rows], t[rows], c, h)
        torch.testing.assert_close(v[rows], expected, rtol=1e-4, atol=1e-5)
    assert flow.segment_of(torch.tensor([0.0, 1 / 3, 0.5, 1.0])).tolist() == [0, 1, 1, 2]


def test_mappings_of_conditions_are_split_with_the_rows():
    class Sum:
        def velocity(self, x, t, cond, h):
            return x * 0 + cond["a"][:, None] + 10 * h["b"]

    class Features:
        def features(self, x, t, cond):
            return {"b": cond["b"][:, None]}

    flow = Blockwise(Features(), [Sum(), Sum()], 2)
    cond = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([4.0, 5.0, 6.0])}
    v = flow(torch.zeros(3, 1), torch.tensor([0.9, 0.1, 0.7]), cond)
    assert v[:, 0].tolist() == [41.0, 52.0, 63.0]


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("steps", [1, 3])
def test_an_untrained_residual_is_cached_bit_for_bit(name, steps):
    make, shape = FLOWS[name]
    flow, fresh = randomised(make()), make()
    flow.feature_residual.blocks.load_state_dict(fresh.feature_residual.blocks.state_dict())
    x0, cond = torch.randn(4, *shape), torch.tensor([0, 1, 2, 0]) if name == "dit" else None
    sampler, results = ODESampler(grids.blockwise(3, steps)), {}
    for mode in ("full", "cached", "fra"):
        flow.feature_mode = mode
        results[mode] = sampler.solve(flow, x0, cond, return_path=True).path
    assert torch.equal(results["cached"], results["fra"])
    # The first step is with full features; with one step a segment all are.
    assert torch.equal(results["full"][:2], results["fra"][:2])
    assert torch.equal(results["full"], results["fra"]) == (steps == 1)


@pytest.mark.parametrize("name", FLOWS)
def test_a_trained_residual_is_full_bit_for_bit_with_one_step_a_segment(name):
    make, shape = FLOWS[name]
    flow, results = randomised(make(edges=[0.0, 0.2, 0.7, 1.0])), {}
    x0, cond = torch.randn(4, *shape), torch.tensor([0, 1, 2, 0]) if name == "dit" else None
    for steps in (1, 2):
        for mode in ("full", "fra"):
            flow.feature_mode = mode
            results[mode, steps] = ODESampler(grids.blockwise(flow.edges, steps))(flow, x0, cond)
    assert torch.equal(results["full", 1], results["fra", 1])
    assert not torch.equal(results["full", 2], results["fra", 2])


def test_first_steps_of_all_segments_are_full_and_parts_are_called_as_counted():
    flow = randomised(tiny_mlp(feature_mode="fra"))
    n, grid, x0 = 4, grids.blockwise(3, 4), torch.randn(5, 2)
    path = ODESampler(grid).solve(flow, x0, return_path=True).path
    assert flow.usage.calls == {
        "trunk": 3,
        "feature_residual": 3 * (n - 1),
        **{f"stacks.{m}": n for m in range(3)},
    }
    assert flow.usage.rows == {name: 5 * calls for name, calls in flow.usage.calls.items()}
    flow.feature_mode = "full"
    for m in range(3):
        first = ODESampler(grid[m * n : m * n + 2])(flow, path[m * n])
        assert torch.equal(first, path[m * n + 1])
    flow.usage.clear()
    assert flow.usage == Usage()


@pytest.mark.parametrize("method", [*FIXED, "dopri5"])
@pytest.mark.parametrize("mode", ["full", "fra"])
def test_the_exact_residual_gives_full_features(mode, method):
    """In either direction, from inside a segment too, and with a solver's stages on edges."""
    edges = [0.0, 0.2, 0.7, 1.0]
    flow, full = line_flow(edges, mode), line_flow(edges, "full")
    x = torch.randn(4, 2, dtype=torch.float64)
    part = torch.tensor([0.1, 0.15, 0.2, 0.4, 0.7, 0.8, 0.9], dtype=torch.float64)
    for grid in (grids.blockwise(edges, 3), part):
        sampler = ODESampler(grid, method)
        torch.testing.assert_close(sampler(flow, x), sampler(full, x), rtol=0, atol=1e-10)
        torch.testing.assert_close(
            sampler.invert(flow, x).x, sampler.invert(full, x).x, rtol=0, atol=1e-10
        )
    cached = line_flow(edges, "cached")
    assert (ODESampler(grids.blockwise(edges, 3))(cached, x) - sampler(full, x)).abs().max() > 0.01


def test_the_trunk_runs_once_a_segment_whatever_the_solver():
    edges = [0.0, 0.2, 0.7, 1.0]
    flow = line_flow(edges, "fra")
    ODESampler(grids.blockwise(edges, 2), "rk4")(flow, torch.zeros(1, 2, dtype=torch.float64))
    assert flow.trunk.calls == [0.0, 0.2, 0.7]


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8), (0.5, 0.55)])
def test_guidance_may_begin_inside_a_segment(interval):
    """The unconditional features start where guidance does; both branches keep their own."""
    edges, x = [0.0, 0.2, 0.7, 1.0], torch.randn(4, 2, dtype=torch.float64)
    cond, sampler = torch.tensor([1.0, 2.0, 3.0, 1.0]), ODESampler(grids.blockwise(edges, 5))
    flows = {mode: line_flow(edges, mode) for mode in ("full", "fra")}
    a, b = (
        sampler.solve(ClassifierFree(f, 2.0, null=0.0, interval=interval), x, cond)
        for f in flows.values()
    )
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-10)
    assert a.rows == b.rows
    assert len(flows["fra"].trunk.calls) <= 6
    a, b = (sampler(Autoguidance(f, f, 1.5), x, cond) for f in flows.values())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["full", "cached", "fra"])
def test_interleaved_solves_do_not_disturb_each_other(mode):
    flow = randomised(tiny_mlp(feature_mode=mode))
    sampler, (a, b) = ODESampler(grids.blockwise(3, 4)), torch.randn(2, 5, 2)
    alone, other = sampler(flow, a), []

    def solve_another(step, t, x):
        other.append(sampler(flow, b))

    together = sampler.solve(flow, a, callback=solve_another).x
    assert torch.equal(together, alone)
    assert all(torch.equal(x, sampler(flow, b)) for x in other)


def test_features_may_be_the_solvers_own_buffer():
    """Cached ones are those of the segment's start all the same."""

    class Follow:
        def velocity(self, x, t, cond, h):
            return h

    flow = Blockwise(Trunk(), [Follow(), Follow()], 2, feature_mode="cached")
    x0 = torch.ones(1, 1, dtype=torch.float64)
    path = ODESampler(4).solve(flow, x0, return_path=True).path[:, 0, 0]
    assert path.tolist() == [1.0, 1.25, 1.5, 1.875, 2.25]


def test_the_likelihood_is_that_of_the_bound_flow():
    edges = [0.0, 0.4, 1.0]
    sampler, x1 = ODESampler(grids.blockwise(edges, 20), "rk4"), torch.randn(3, 2).double()
    flow = Blockwise(Trunk(), [ExactStack(), ExactStack()], edges)
    value = log_likelihood(sampler, flow, x1, divergence="exact").value
    torch.testing.assert_close(value, GAUSSIAN.log_prob(x1), rtol=0, atol=1e-4)


def test_outside_of_a_solve_features_are_full():
    flow = randomised(tiny_mlp(feature_mode="cached"))
    x, t = torch.randn(5, 2), torch.rand(5)
    v = flow.bind(None)(x, t)
    flow.feature_mode = "full"
    assert torch.equal(v, flow(x, t))


def test_a_plain_network_seeds_equal_blocks_that_sample_bit_for_bit_the_same():
    net = randomised(DiT((1, 8, 8), width=32, depth=2, heads=2, num_classes=3))
    flow = Blockwise(None, copies(net, 6), 6)
    x0, cond = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    for sampler in (
        ODESampler(6),
        ODESampler(12, "heun"),
        ODESampler(grids.blockwise(6, 1), "rk4"),
    ):
        assert torch.equal(sampler(flow, x0, cond), sampler(net, x0, cond))
    t = torch.rand(4)
    torch.testing.assert_close(flow(x0, t, cond), net(x0, t, cond), rtol=1e-4, atol=1e-5)
    flow.stacks[2].net.outputs.linear.weight.data.zero_()
    assert not torch.equal(ODESampler(6)(flow, x0, cond), ODESampler(6)(net, x0, cond))


@pytest.mark.parametrize("name", FLOWS)
def test_a_stack_is_replaced_frozen_and_shared_alone(name):
    make, shape = FLOWS[name]
    flow, other = randomised(make()), make()
    x = torch.randn(6, *shape)
    t = torch.tensor([0.1, 0.2, 0.4, 0.5, 0.8, 0.9])
    cond = torch.arange(6) % 3 if name == "dit" else None
    before = flow(x, t, cond)
    own = set(flow.stacks[1].state_dict())
    assert own
    assert all(key.startswith("blocks.") for key in own)

    # replaced: by another's weights, and by another object
    flow.stacks[1].load_state_dict(flow.stacks[0].state_dict())
    after = flow(x, t, cond)
    assert torch.equal(after[[0, 1, 4, 5]], before[[0, 1, 4, 5]])
    assert not torch.equal(after[2:4], before[2:4])
    flow.stacks[1] = copy.deepcopy(flow.stacks[0])
    assert torch.equal(flow(x, t, cond), after)
    assert flow.stacks[1].trunk.module is flow.trunk

    # a copy of the whole is independent of it
    twin = copy.deepcopy(flow)
    assert twin.stacks[1].trunk.module is twin.trunk is not flow.trunk
    assert twin.feature_residual.trunk.module is twin.trunk
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in flow.parameters()}

    # shared: one object in two segments
    shared = Blockwise(flow.trunk, [flow.stacks[0], flow.stacks[1], flow.stacks[0]], 3)
    count = sum(p.numel() for p in flow.stacks[0].parameters())
    whole = sum(p.numel() for p in other.parameters())
    residual = sum(p.numel() for p in other.feature_residual.parameters())
    assert sum(p.numel() for p in shared.parameters()) == whole - residual - count

    # frozen: only the one stack has gradients
    flow.requires_grad_(False)
    flow.stacks[1].requires_grad_(True)
    flow(x, t, cond).square().sum().backward()
    with_gradient = {n for n, p in flow.named_parameters() if p.grad is not None}
    assert with_gradient == {f"stacks.1.{key}" for key in own}


def test_bad_input_is_named():
    stacks = [ExactStack(), ExactStack()]
    with pytest.raises(ValueError, match=r"edges must increase from 0 to 1, got \[0.1, 0.5, 1.0\]"):
        Blockwise(None, stacks, [0.1, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"edges must increase from 0 to 1, got \[0.0, 0.5, 0.9\]"):
        Blockwise(None, stacks, [0.0, 0.5, 0.9])
    with pytest.raises(ValueError, match="edges must increase strictly, got"):
        Blockwise(None, stacks, [0.0, 0.5, 0.5, 1.0])
    with pytest.raises(ValueError, match="stacks must hold one per segment, 3, got 2"):
        Blockwise(None, stacks, 3)
    with pytest.raises(ValueError, match="feature_residual must be given for feature_mode 'fra'"):
        Blockwise(Trunk(), stacks, 2, feature_mode="fra")
    with pytest.raises(ValueError, match="trunk must be given for feature_mode 'cached'"):
        Blockwise(None, stacks, 2, feature_mode="cached")
    with pytest.raises(ValueError, match="must be one of cached, fra, full, got 'fast'"):
        Blockwise(None, stacks, 2).feature_mode = "fast"
    bound = Blockwise(None, stacks, 2).bind(None)
    with pytest.raises(ValueError, match=r"a step must lie within one segment of .* 0.4 to 0.6"):
        bound.begin_step(0.4, 0.6)
    with pytest.raises(ValueError, match="stack_depth must be a number or one per segment, 3"):
        tiny_dit(stack_depth=[1, 2])
    with pytest.raises(ValueError, match="stack_depth must be a number or one per segment, 3"):
        tiny_dit(stack_depth=[1, 2, 1, 1])
    with pytest.raises(ValueError, match="width / heads must be a multiple of 4, got 12 / 2"):
        tiny_dit(width=12)


def test_a_residual_sees_the_features_where_the_solve_enters_its_segment():
    class Seeing(Line):
        sees_start = True

        def __call__(self, x, t, cond=None, start=None):
            seen.append((round(t[0].item(), 3), start.clone()))
            return super().__call__(x, t, cond)

    line, seen = Seeing([0.0, 0.5, 1.0]), []
    flow = Blockwise(line, [line] * 2, 2, line, "fra")
    times = torch.tensor([0.2, 0.3, 0.5, 0.75], dtype=torch.float64)
    ODESampler(times)(flow, torch.zeros(1, 2, dtype=torch.float64))
    assert [t for t, _ in seen] == [0.2, 0.3]  # at .5 the features are the trunk's own
    for _, start in seen:
        torch.testing.assert_close(start, line.features(None, times[:1], None))


def test_parts_of_segments_and_segments_of_steps_by_value():
    flow = Blockwise(None, [ExactStack() for _ in range(3)], [0.0, 0.2, 0.7, 1.0])
    t, segment = torch.tensor([0.1, 0.2, 0.45, 0.85]), torch.tensor([0, 1, 1, 2])
    torch.testing.assert_close(flow.fraction(t, segment), torch.tensor([0.5, 0.0, 0.5, 0.5]))
    assert flow.fraction(0.45, 1) == pytest.approx(0.5)
    bound = flow.bind(None)
    bound.begin_step(0.2 - 1e-7, 0.45)  # a time in float32 may lie before its edge
    assert bound.segment == 1
    bound.begin_step(0.45, 0.7 + 1e-7)
    assert bound.segment == 1


def test_nothing_is_warned_about_on_the_edges_own_grid():
    flow = Blockwise(None, copies(nn.Identity(), 6), 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (6, 12, 48):
            flow.bind(None, grids.uniform(n))
            flow.bind(None, grids.blockwise(6, n))
            flow.bind(None, grids.uniform(n).float().double())
    assert not caught
