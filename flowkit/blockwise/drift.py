"""Drift of reused features: their error against the trunk's current features."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flowkit.blockwise.flow import Blockwise, BlockwiseSolve
from flowkit.blockwise.parts import ReuseErrors
from flowkit.checks import as_grid
from flowkit.sampling.solvers import CLOSE
from flowkit.types import Cond
from flowkit.velocity import Velocity


class Drift(NamedTuple):
    """Errors of reused features along a solve, by step.

    ``times (n,)``: starts of the steps. ``segment (n,)``: segment of each step. ``fraction (n,)``:
    part of the segment before the step. ``errors``: root mean square errors ``(n,)`` by mode,
    ``"cached"`` and, with a feature residual, ``"fra"``, in units of the root mean square of the
    features; the trunk runs at the start of the segment. ``pairs``: for each mode and segment, the
    errors between all times of the segment, its end included, for `Blockwise.refresh_beyond`.
    """

    times: Tensor
    segment: Tensor
    fraction: Tensor
    errors: dict[str, Tensor]
    pairs: dict[str, list[ReuseErrors]]

    def table(self) -> str:
        """Return a table as text, with the mean and largest error of each segment and mode."""
        rows = [f"{'segment':>7} {'from':>6} " + "".join(f"{m:>17}" for m in self.errors)]
        for m in self.segment.unique().tolist():
            mine = (self.segment == m) & (self.fraction > 1e-6)
            cells = ""
            for errors in self.errors.values():
                e = errors[mine] if bool(mine.any()) else errors.new_zeros(1)
                cells += f"{e.mean().item():>8.4f} {e.max().item():>8.4f}"
            rows.append(f"{m:>7} {self.times[self.segment == m][0].item():>6.3f} " + cells)
        return "\n".join(rows)


@torch.no_grad()
def feature_drift(
    flow: Blockwise,
    x0: Tensor,
    grid: Tensor | int,
    cond: Cond = None,
    *,
    velocity: Velocity | None = None,
) -> Drift:
    """Measure the errors of cached and approximated features along Euler steps with full features.

    The features of each time are reused at all later times of the segment. So the errors are known
    for a trunk that runs anywhere in a segment. Reuse at earlier times, as in a solve from data to
    noise, counts as the same error.

    Args:
        flow: Blockwise flow with a trunk; its ``feature_mode`` has no effect.
        x0: States ``(B, *)`` at the first time.
        grid: Times with all edges of the flow, or a number of uniform steps.
        cond: Conditions of the states.
        velocity: Velocity of the Euler steps, for example the flow with guidance; ``None`` means
            the flow itself.

    Returns:
        Errors of ``"cached"`` and, with a feature residual, of ``"fra"`` features.

    Raises:
        ValueError: If the flow has no trunk or the grid misses an edge.

    >>> from flowkit.blockwise.mlp import BlockwiseMLP
    >>> flow = BlockwiseMLP((2,), edges=2, width=16, residual_depth=1).eval()
    >>> drift = feature_drift(flow, torch.randn(8, 2), 8)
    >>> bool((drift.errors["fra"] == drift.errors["cached"]).all())  # a new residual is zero
    True
    """
    if flow.trunk is None:
        raise ValueError("trunk must be a network to measure the drift of features, got None")
    times, solve = as_grid(grid), BlockwiseSolve(flow, "full")
    modes = ("cached",) if flow.feature_residual is None else ("cached", "fra")
    unknown = ReuseErrors((), torch.empty(0, 0))
    pairs = {mode: [unknown] * flow.num_segments for mode in modes}
    x, nodes, segments = x0.clone(), [], []
    t = x.new_full((len(x),), times[0].item(), dtype=torch.promote_types(x.dtype, torch.float32))
    h: Any = flow.features(x, t, cond)
    for left, right in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        solve.begin_step(left, right)
        m = cast(int, solve.segment)
        if m not in segments:
            nodes = [_Node(flow.fraction(left, m), x, t, h)]
        segments.append(m)
        v = flow.velocity(x, t, cond, h, m) if velocity is None else velocity(x, t, cond)
        x, t = x + (right - left) * v, torch.full_like(t, right)
        h = flow.features(x, t, cond)
        nodes.append(_Node(flow.fraction(right, m), x, t, h))
        if right > flow.edges[m + 1] - CLOSE or right == times[-1]:
            for mode in modes:
                pairs[mode][m] = _between(BlockwiseSolve(flow, mode), m, nodes, cond)
    known = {mode: [p for p in found if p.fractions] for mode, found in pairs.items()}
    return Drift(
        times[:-1],
        torch.tensor(segments),
        torch.tensor([c for p in known["cached"] for c in p.fractions[:-1]], dtype=torch.float64),
        {mode: torch.cat([p.errors[0, :-1] for p in found]) for mode, found in known.items()},
        pairs,
    )


class _Node(NamedTuple):
    """State ``x``, time ``t (B,)`` and features ``h``, after the part ``fraction`` of a segment."""

    fraction: float
    x: Tensor
    t: Tensor
    h: Tensor


def _between(solve: BlockwiseSolve, segment: int, nodes: list[_Node], cond: Cond) -> ReuseErrors:
    """Measure the errors of features that are reused between the nodes of a segment."""
    solve.segment, anchors = segment, []
    errors = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for j, (_, x, t, h) in enumerate(nodes):
        for i, anchor in enumerate(anchors):
            error = (solve.reused(anchor, x, t, cond) - h).square().mean().sqrt()
            errors[i, j] = errors[j, i] = error.item()
        if j < len(nodes) - 1:
            anchors.append(solve.anchored(h, x, t, cond))
    sizes = torch.stack([node.h.square().mean().sqrt() for node in nodes])
    return ReuseErrors([node.fraction for node in nodes], errors / sizes.to(errors))
