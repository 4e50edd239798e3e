"""Drift of reused features, and their refreshing."""

import pytest
import torch

from flowkit import grids
from flowkit.blockwise import (
    Blockwise,
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
    slopes = drift.errors["cached"][[1, 2, 3, 5, 6, 7]] / drift.fraction[[1, 2, 3, 5, 6, 7]]
    expected = [slopes[:3].max().item(), slopes[3:].max().item()]
    assert drift.rates()["cached"] == pytest.approx(expected)
    lines = drift.table().splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["segment", "from", "cached", "fra"]
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


@pytest.mark.parametrize(
    ("tolerance", "anchors"),
    [(0.0, [0, 1, 2, 3, 4, 5, 6, 7]), (0.3, [0, 2, 4, 5, 6, 7]), (10.0, [0, 4])],
)
def test_features_are_refreshed_where_drift_is_predicted(tolerance, anchors):
    """Rates 1 and 2 a segment: at .3, after more than .3 and .15 of a segment."""
    edges, grid = [0.0, 0.5, 1.0], grids.uniform(8)
    x = torch.randn(3, 2, dtype=torch.float64)
    for mode in ("cached", "fra"):
        flow = line_flow(edges, mode)
        flow.refresh_beyond({mode: [1.0, 2.0]}, tolerance)
        result = ODESampler(grid)(flow, x)
        assert [round(8 * t) for t in flow.trunk.calls] == anchors
        if mode == "fra":  # refreshing changes nothing where the residual is exact
            full = ODESampler(grid)(line_flow(edges, "full"), x)
            torch.testing.assert_close(result, full, rtol=0, atol=1e-12)
    flow.trunk.calls.clear()
    ODESampler(grid).invert(flow, x)
    starts = [8, 7, 6, 5, 4, 3, 2, 1] if tolerance == 0 else [8, 4] if tolerance == 10 else None
    assert starts is None or [round(8 * t) for t in flow.trunk.calls] == starts
