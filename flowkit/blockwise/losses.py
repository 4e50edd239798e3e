"""The losses of blockwise flow matching, for any training loop.

Source: *Blockwise Flow Matching: Improving Flow Matching Models For Efficient High-Quality
Generation*, 2025 (arXiv 2510.21167). Segments are restrictions of one path, so the target is its
velocity ``u_t = dx_t/dt``, on curved paths too; the published chord between a segment's ends is
that velocity on a linear path alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkit.blockwise.flow import Blockwise
from flowkit.checks import check_at_least, check_choice, check_same_shape, expand_like
from flowkit.couplings import Coupling, Independent
from flowkit.losses import Drop, draw_pairs, draw_states, flow_matching_loss, time_dtype
from flowkit.paths import Linear, Path
from flowkit.times import Stratified, Times, Uniform
from flowkit.types import Batch, Cond, Pairs
from flowkit.velocity import Velocity


class SegmentDraw(NamedTuple):
    """A batch at times of its segments: what both stages train on."""

    pairs: Pairs
    x_t: Tensor
    t: Tensor
    u: Tensor
    cond: Cond
    segment: Tensor
    mask: Tensor | None


class SegmentMean(NamedTuple):
    """``mean`` over the segments that occur, their own means ``values``, and which they are."""

    mean: Tensor
    values: Tensor
    segments: Tensor


def blockwise_loss(flow: Blockwise, draw: SegmentDraw) -> tuple[dict[str, Tensor], Any]:
    """Stage 1: the mean over segments of each one's mean of ``‖v(x_t, t, cond) − u‖²``.

    The trunk sees the whole batch at once, each stack the rows of its segment. A segment counts
    the same however many rows it has.

    Args:
        flow: To train.
        draw: See `draw_segments`.

    Returns:
        ``loss``, ``explained`` as in `flowkit.losses.flow_matching_loss` and ``segment_<m>``, each
        one's loss; and the features, for an alignment loss.
    """
    h = flow.features(draw.x_t, draw.t, draw.cond)
    v = flow.velocity(draw.x_t, draw.t, draw.cond, h, draw.segment)
    check_same_shape(v, draw.u, ("velocity(x, t, cond, h)", "x"))
    loss, energy = (
        _segment_squares(x, draw.segment, draw.pairs.log_weight, draw.mask)
        for x in (v - draw.u, draw.u)
    )
    terms = {"loss": loss.mean, "explained": 1 - loss.mean.detach() / energy.mean}
    return terms | _by_segment(loss), h


def residual_loss(
    flow: Blockwise,
    draw: SegmentDraw,
    path: Path = Linear(),
    generator: torch.Generator | None = None,
    compare: str = "features",
) -> dict[str, Tensor]:
    """Stage 2: the mean over segments of ``‖F(x_s, s) + c(t) R(x_t, t) − F(x_t, t)‖²``.

    ``x_s``, at the segment's start ``s``, and ``x_t`` are of the same pair, with the same dropped
    condition. Only the feature residual ``R`` gets gradients. Pairs' weights count; a mask does
    not, since features have other elements.

    Args:
        flow: With a trunk and a feature residual.
        draw: See `draw_segments`.
        path: The one of the draw.
        generator: Draws ``x_s`` where the path has noise of its own.
        compare: ``"features"``, or ``"velocity"`` for what the stacks make of them.

    Returns:
        ``loss``; ``ratio``, the features' mean square error in units of that of the features at
        the start, which is 1 for an untrained ``R``; and ``segment_<m>``.
    """
    check_choice(compare, ("features", "velocity"), "compare")
    pairs, x_t, t, _, cond, segment, _ = draw
    with torch.no_grad():
        edges = torch.tensor(flow.edges[:-1], dtype=t.dtype, device=t.device)
        s = edges[segment]
        start = flow.features(path.sample(pairs.x0, pairs.x1, s, generator).x_t, s, cond)
        target = flow.features(x_t, t, cond)
    residual = flow.residual(x_t, t, cond, start)
    check_same_shape(residual, target, ("feature_residual(x, t, cond)", "the trunk's features"))
    estimate = start + expand_like(flow.fraction(t, segment), residual) * residual
    error = estimate - target
    ratio = error.detach().square().mean() / (start - target).square().mean()
    if compare == "velocity":
        with torch.no_grad():
            target = flow.velocity(x_t, t, cond, target, segment)
        error = flow.velocity(x_t, t, cond, estimate, segment) - target
    loss = _segment_squares(error, segment, pairs.log_weight)
    return {"loss": loss.mean, "ratio": ratio} | _by_segment(loss)


def draw_segments(
    flow: Blockwise,
    batch: Batch,
    path: Path = Linear(),
    coupling: Coupling = Independent(),
    times: Times = Uniform(),
    drop_cond: Drop | None = None,
    generator: torch.Generator | None = None,
    *,
    segments: Sequence[int] | None = None,
    turn: int = 0,
) -> SegmentDraw:
    """Draw noise, pairs, a segment and a time for each row, and conditions to drop.

    Rows are dealt out to the segments in turn: call ``turn`` (0, 1, 2, …) of the same batch size
    starts where the last one ended, so that also batches smaller than the number of segments
    reach all of them. Within a segment times are stratified where ``times`` is uniform, and
    otherwise drawn from its restriction to the segment.

    Args:
        flow: Whose segments.
        batch: See `flowkit.types.Batch`; without ``t0`` and ``t1``.
        path: Where pairs are at time ``t``.
        coupling: Which ``x0`` goes with which ``x1``, over the whole batch.
        times: Density of ``t`` within segments.
        drop_cond: Applied to the condition before the velocity sees it.
        generator: Draws everything.
        segments: Only these; None for all.
        turn: How many such draws came before.

    Raises:
        ValueError: If the batch holds chords (``t0``, ``t1``), a mask meets a coupling that moves
            ``x1``, or ``times`` never reach a segment.
    """
    if {"t0", "t1"} & set(batch):
        raise ValueError(
            "batch must hold no t0 and t1, got chords, which are not the velocity of "
            f"{type(path).__name__}() within a segment; train a Straightening instead"
        )
    pairs = draw_pairs(batch, coupling, generator)
    count, device, dtype = len(pairs.x1), pairs.x1.device, time_dtype(pairs.x1)
    active = torch.tensor(segments or range(flow.num_segments), device=device)
    dealt = torch.arange(count, device=device) + turn * count
    shuffled = torch.randperm(count, generator=generator, device=device)
    segment = active[dealt % len(active)][shuffled]
    if isinstance(times, Uniform | Stratified):
        t = _stratified(flow, segment, dtype, generator)
    else:
        t = _restricted(flow, segment, times, generator).to(dtype)
    states = draw_states(pairs, t, path, drop_cond, generator)
    return SegmentDraw(pairs, *states, segment, batch.get("mask"))


def _stratified(flow: Blockwise, segment: Tensor, dtype: torch.dtype, generator) -> Tensor:
    """One uniform time from each of as many equal slices of a segment as it has rows."""
    counts = torch.bincount(segment, minlength=flow.num_segments)
    order = segment.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[segment[order]]
    rank = torch.empty_like(segment)
    rank[order] = torch.arange(len(segment), device=segment.device) - first
    offset = torch.rand(segment.shape, dtype=dtype, device=segment.device, generator=generator)
    edges = torch.tensor(flow.edges, dtype=dtype, device=segment.device)
    left, right = edges[segment], edges[segment + 1]
    t = left + (right - left) * (rank + offset) / counts[segment]
    return t.minimum(torch.nextafter(right, left))  # a rounded time is not of the next segment


def _restricted(flow: Blockwise, segment: Tensor, times: Times, generator) -> Tensor:
    """Draws of ``times`` that fall into each row's segment."""
    t = torch.full(segment.shape, torch.nan, device=segment.device)
    for _ in range(100):
        open_rows = t.isnan()
        if not bool(open_rows.any()):
            return t
        draws = times(4 * max(64, len(segment)), segment.device, generator)
        owner = flow.segment_of(draws)
        for m in segment[open_rows].unique().tolist():
            rows, found = (open_rows & (segment == m)).nonzero()[:, 0], draws[owner == m]
            t[rows[: len(found)]] = found[: len(rows)].to(t)
    missed = sorted(set(segment[t.isnan()].tolist()))
    raise ValueError(f"times must reach every segment, got {times}, which missed {missed}")


def segment_mean(values: Tensor, segment: Tensor, counts: Tensor | None = None) -> SegmentMean:
    """Mean over segments of the mean of each one's values.

    Args:
        values: ``(B,)``.
        segment: Of each, ``(B,)``.
        counts: How much each counts ``(B,)``, where values are sums; 1 by default. A segment that
            nothing counts in has mean 0.

    >>> segment = torch.arange(10) % 6
    >>> segment_mean(segment.float(), segment).mean  # 2.1 over the batch
    tensor(2.5000)
    """
    present, owner = segment.unique(return_inverse=True)
    counts = torch.ones_like(values) if counts is None else counts
    sums, sizes = (
        values.new_zeros(len(present)).index_add(0, owner, x.to(values)) for x in (values, counts)
    )
    means = sums / torch.where(sizes > 0, sizes, 1)
    return SegmentMean(means.mean(), means, present)


def _by_segment(loss: SegmentMean) -> dict[str, Tensor]:
    values = zip(loss.segments.tolist(), loss.values.detach().unbind(), strict=True)
    return {f"segment_{m}": value for m, value in values}


def _segment_squares(
    x: Tensor, segment: Tensor, log_weight: Tensor | None = None, mask: Tensor | None = None
) -> SegmentMean:
    """Mean squares of each segment's elements, weighted, of those that the mask counts."""
    squares, counts = x.square(), None
    if mask is None:
        rows = squares.flatten(1).mean(1)
    else:
        rows = (squares * mask).flatten(1).sum(1)
        counts = mask.expand(x.shape).flatten(1).sum(1)
    if log_weight is not None:
        rows = rows * log_weight.exp().to(rows)
    return segment_mean(rows, segment, counts)


@dataclass(frozen=True)
class _Within:
    low: float
    high: float

    def __call__(self, batch: int, device: Any = None, generator: Any = None) -> Tensor:
        return self.low + (self.high - self.low) * Stratified()(batch, device, generator)


@torch.no_grad()
def loss_by_time(
    velocity: Velocity,
    batch: Batch,
    num_intervals: int = 20,
    path: Path = Linear(),
    coupling: Coupling = Independent(),
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Measure the flow-matching loss of a velocity in equal intervals of time.

    It is what `flowkit.blockwise.equal_burden` cuts into equal shares. It includes the part that no
    network can remove; where that matters, pass the difference to a larger network's loss.

    Args:
        velocity: A trained one.
        batch: Data; every interval sees all of it.
        num_intervals: How many.
        path: As in training.
        coupling: As in training.
        generator: Draws noise and times.

    Returns:
        Ends of the intervals ``(K + 1,)`` and their losses ``(K,)``.

    >>> from flowkit.exact import GaussianFlow
    >>> times, loss = loss_by_time(GaussianFlow(2.0, 0.5), {"x1": 2 + torch.randn(99, 2) / 2}, 5)
    >>> times.shape, loss.shape
    (torch.Size([6]), torch.Size([5]))
    """
    check_at_least(num_intervals, 1, "num_intervals")
    ends = torch.linspace(0, 1, num_intervals + 1, dtype=torch.float64)
    losses = [
        flow_matching_loss(
            velocity, batch, path, coupling, _Within(low, high), generator=generator
        )["loss"].cpu()
        for low, high in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]
    return ends, torch.stack(losses)
