"""Drift of reused features, and their refreshing."""

import math

import pytest
import torch

from flowkit import grids
from flowkit.blockwise import (
    Blockwise,
    DriftLimit,
    ReuseErrors,
    copies,
    feature_drift,
)
from flowkit.nn import MLP
from flowkit.sampling import ODESampler
from tests.blockwise.small_flows import Line, line_flow


def test_drift_of_linear_features_is_known():
    """Cached features of ``A + t B`` are off by ``(t − e) B``, approximated ones not at all."""
    edges = [0.0, 0.5, 1.0]
    flow = line_flow(edges, "full")
    grid = grids.blockwise(edges, 4)
    drift = feature_drift(flow, torch.randn(6, 2, dtype=torch.float64), grid)
    a, b = flow.trunk.a, flow.trunk.b
    gap = grid[:-1] - torch.tensor([0.0] * 4 + [0.5] * 4)
    size = (a + grid[:-1, None] * b).square().mean(1).sqrt()
    torch.testing.assert_close(drift.errors["cached"], gap * b.square().mean().sqrt() / size)
    assert drift.errors["fra"].max() < 1e-12
    assert drift.segment.tolist() == [0] * 4 + [1] * 4
    torch.testing.assert_close(drift.fraction, 2 * gap)
    for segment, known in enumerate(drift.pairs["cached"]):
        torch.testing.assert_close(torch.tensor(known.fractions), torch.linspace(0, 1, 5))
        t = edges[segment] + 0.5 * torch.linspace(0, 1, 5, dtype=torch.float64)
        apart = (t - t[:, None]).abs() * b.square().mean().sqrt()
        size = (a + t[:, None] * b).square().mean(1).sqrt()
        torch.testing.assert_close(known.errors, apart / size, rtol=1e-12, atol=1e-12)
    assert all(known.errors.max() < 1e-12 for known in drift.pairs["fra"])
    lines = drift.table().splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["segment", "from", "cached", "fra"]
    for m, line in enumerate(lines[1:]):  # without the first step, which reuses nothing
        later = drift.errors["cached"][4 * m + 1 : 4 * m + 4]
        expected = [m, edges[m], later.mean().item(), later.max().item(), 0, 0]
        assert [float(cell) for cell in line.split()] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match=r"trunk must be a network to measure .*, got None"):
        feature_drift(Blockwise(None, copies(MLP((2,)), 2), 2), torch.zeros(1, 2), 2)


def test_drift_is_that_along_the_field_that_is_solved():
    """Features are the state: after ``(t − e)`` of velocity 3 they are off by as much threefold."""

    class State(Line):
        def features(self, x, t, cond):
            return x

    edges = [0.0, 0.5, 1.0]
    flow = Blockwise(State(edges), [Line(edges)] * 2, edges)
    x0, grid = torch.ones(6, 2).double(), grids.uniform(8)
    drift = feature_drift(flow, x0, grid, velocity=lambda x, t, cond: torch.full_like(x, 3))
    gap = grid[:-1] - torch.tensor([0.0] * 4 + [0.5] * 4)
    torch.testing.assert_close(drift.errors["cached"], 3 * gap / (1 + 3 * grid[:-1]))


class Growing:
    """Features ``1 + g(c)`` in each half of time; stacks keep the largest error of features."""

    def __init__(self, growth):
        self.growth, self.calls, self.worst = growth, [], 0.0

    def _at(self, t):
        c = torch.where(t == 1, 1.0, (2 * t).frac())
        return (1 + self.growth(c))[:, None].expand(-1, 2)

    def features(self, x, t, cond):
        self.calls.append(t[0].item())
        return self._at(t)

    def velocity(self, x, t, cond, h):
        now = self._at(t)
        self.worst = max(self.worst, ((h - now).abs() / now).max().item())
        return torch.ones_like(x)


GROWTH = {
    "c^2": lambda c: c**2,
    "c^4": lambda c: c**4,
    "exp": lambda c: torch.expm1(4 * c) / math.expm1(4),
}


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("tolerance", [0.05, 0.2])
def test_errors_that_grow_faster_than_time_stay_below_the_tolerance(growth, method, tolerance):
    """For any number of steps, also where most of the growth comes after a refresh."""
    trunk, x = Growing(GROWTH[growth]), torch.zeros(2, 2, dtype=torch.float64)
    flow = Blockwise(trunk, [trunk] * 2, 2, None, "cached")
    flow.refresh_beyond(feature_drift(flow, x, grids.blockwise(flow.edges, 8)).pairs, tolerance)
    for steps in (8, 12, 16, 40):
        trunk.calls, trunk.worst = [], 0.0
        ODESampler(grids.blockwise(flow.edges, steps), method)(flow, x)
        assert trunk.worst <= tolerance + 1e-12
        assert len(trunk.calls) < 2 * steps * (2 if method == "heun" else 1)
        if steps == 8 and method == "euler":  # the measured times: no call too many
            values, kept, fewest = 1 + trunk.growth(torch.arange(8).double() / 8), 1.0, 2
            for value in values.tolist():
                if abs(value - kept) / value > tolerance + 1e-12:
                    kept, fewest = value, fewest + 2
            assert len(trunk.calls) == fewest


def test_predicted_errors_are_those_of_the_shortest_measured_interval_around():
    c = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    ahead = (c - c[:, None]).clamp(min=0)
    known = ReuseErrors(c.tolist(), ahead + 10 * ahead.T)
    found = [known.largest(*p) for p in [(0, 0), (0.25, 0.5), (0.1, 0.2), (0.3, 0.6), (0.6, 0.3)]]
    assert found == [0, 0.25, 0.25, 0.75, 7.5]
    # times in float32 are not exact
    assert known.largest(0.5 + 5e-5, 1.0) == known.largest(0.5 - 5e-5, 1.0) == 0.5
    assert known.largest(0.25, 0.5 + 5e-5) == known.largest(0.25, 0.5 - 5e-5) == 0.25
    hump = ReuseErrors((0.0, 0.5, 1.0), torch.tensor([[0, 3.0, 1], [0, 0, 2], [0, 0, 0]]))
    assert hump.largest(0.0, 1.0) == 3  # the largest error on the way
    assert ReuseErrors((), torch.empty(0, 0)).largest(0.0, 0.1) == math.inf
    assert ReuseErrors((0.0, 0.5), torch.zeros(2, 2)).largest(0.2, 0.6) == math.inf
    assert ReuseErrors((0.5, 1.0), torch.zeros(2, 2)).largest(0.2, 0.6) == math.inf


def test_the_limit_is_of_the_mode_and_allows_errors_up_to_it():
    apart = ReuseErrors(
        (0.0, 0.5, 1.0), torch.tensor([[0, 0.25, 0.5], [0.25, 0, 0.25], [0.5, 0.25, 0]])
    )
    limit = DriftLimit({"fra": [apart]}, 0.25)
    assert not limit.exceeded("fra", 0, 0.0, 0.5)
    assert limit.exceeded("fra", 0, 0.0, 0.6)
    assert not limit.exceeded("cached", 0, 0.0, 1.0)


def test_segments_that_were_not_measured_are_refreshed_always():
    flow = line_flow([0.0, 0.5, 1.0], "cached")
    x = torch.zeros(2, 2, dtype=torch.float64)
    second = torch.linspace(0.5, 1, 5, dtype=torch.float64)
    drift = feature_drift(flow, x, second)
    assert drift.segment.tolist() == [1] * 4
    whole = feature_drift(flow, x, grids.blockwise(flow.edges, 4))
    known, same = drift.pairs["cached"][1], whole.pairs["cached"][1]
    torch.testing.assert_close(known.errors, same.errors)
    early = feature_drift(flow, x, torch.tensor([0.0, 0.125, 0.25])).pairs["cached"]
    assert early[0].fractions == [0, 0.25, 0.5]
    torch.testing.assert_close(early[0].errors, whole.pairs["cached"][0].errors[:3, :3])
    assert early[1].largest(0, 0) == math.inf
    flow.refresh_beyond(drift.pairs, 100.0)
    flow.trunk.calls.clear()
    ODESampler(grids.uniform(8))(flow, x)
    assert [round(8 * t) for t in flow.trunk.calls] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"errors must hold one entry per segment, 2, got 1 for c"):
        flow.refresh_beyond({"cached": drift.pairs["cached"][:1]}, 0.1)
    with pytest.raises(ValueError, match="tolerance must be at least 0, got -1"):
        flow.refresh_beyond(drift.pairs, -1)


@pytest.mark.parametrize(
    ("tolerance", "anchors"),
    [(0.0, [0, 1, 2, 3, 4, 5, 6, 7]), (0.3, [0, 2, 4, 5, 6, 7]), (10.0, [0, 4])],
)
def test_features_are_refreshed_where_drift_is_predicted(tolerance, anchors):
    """Errors ``c`` and ``2 c``: at .3, after more than .3 and .15 of a segment."""
    edges, grid = [0.0, 0.5, 1.0], grids.uniform(8)
    x, c = torch.randn(3, 2, dtype=torch.float64), torch.linspace(0, 1, 5)
    gap = (c - c[:, None]).abs()
    for mode in ("cached", "fra"):
        flow = line_flow(edges, mode)
        flow.refresh_beyond({mode: [ReuseErrors(c.tolist(), k * gap) for k in (1, 2)]}, tolerance)
        result = ODESampler(grid)(flow, x)
        assert [round(8 * t) for t in flow.trunk.calls] == anchors
        if mode == "fra":  # refreshing changes nothing where the residual is exact
            full = ODESampler(grid)(line_flow(edges, "full"), x)
            torch.testing.assert_close(result, full, rtol=0, atol=1e-12)
    flow.trunk.calls.clear()
    ODESampler(grid).invert(flow, x)
    starts = {0.0: [8, 7, 6, 5, 4, 3, 2, 1], 0.3: [8, 7, 6, 5, 4, 2], 10.0: [8, 4]}[tolerance]
    assert [round(8 * t) for t in flow.trunk.calls] == starts
