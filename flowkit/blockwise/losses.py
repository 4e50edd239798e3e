"""Losses of blockwise flow matching, for any training loop.

The segments are parts of one path, so the target is the velocity ``u_t = dx_t/dt`` of the path,
also for curved paths. The published target, the chord between the ends of a segment, equals this
velocity on a linear path only.

Source: *Blockwise Flow Matching: Improving Flow Matching Models For Efficient High-Quality
Generation*, 2025 (arXiv 2510.21167).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkit.blockwise.flow import Blockwise
from flowkit.checks import at_least_float32, check_choice, check_same_shape, expand_like
from flowkit.couplings import Coupling, Independent
from flowkit.losses import Drop, draw_pairs, draw_states, explained_share, pair_weights
from flowkit.paths import Linear, Path
from flowkit.times import Stratified, Times, Uniform, inside
from flowkit.types import Batch, Cond, Pairs


class SegmentDraw(NamedTuple):
    """Batch of training samples with a segment and a time for each row, for both stages.

    ``pairs``: the pairs. ``x_t``, ``t``, ``u``: states ``(B, *)``, times ``(B,)`` and target
    velocities ``(B, *)``. ``cond``: conditions, some of them dropped. ``segment``: segments
    ``(B,)``. ``mask``: mask of the batch, or ``None``.
    """

    pairs: Pairs
    x_t: Tensor
    t: Tensor
    u: Tensor
    cond: Cond
    segment: Tensor
    mask: Tensor | None


class SegmentMean(NamedTuple):
    """Mean over segments, and the means of the single segments.

    ``mean``: mean of ``values``. ``values (S,)``: mean of each segment that occurs.
    ``segments (S,)``: numbers of these segments.
    """

    mean: Tensor
    values: Tensor
    segments: Tensor


def blockwise_loss(flow: Blockwise, draw: SegmentDraw) -> tuple[dict[str, Tensor], Any]:
    """Compute the loss of stage 1: the flow-matching loss with equal weight for each segment.

    The loss is the mean over segments of the mean of ``‖v(x_t, t, cond) − u‖²`` in the segment.
    The trunk runs once for the whole batch; each stack runs for the rows of its segment. All
    segments count equally, whatever their numbers of rows are.

    Args:
        flow: The trained flow.
        draw: Training samples, see `draw_segments`.

    Returns:
        Two values. The first is a dictionary with ``loss``, ``explained`` (as in
        `flowkit.losses.flow_matching_loss`) and ``segment_<m>``, the loss of segment ``m``. The
        second is the features, for an alignment loss.

    Raises:
        ValueError: If the velocity has another shape than the target.

    >>> from flowkit.blockwise.mlp import BlockwiseMLP
    >>> flow = BlockwiseMLP((2,), edges=2, width=16)
    >>> terms, h = blockwise_loss(flow, draw_segments(flow, {"x1": torch.randn(8, 2)}))
    >>> sorted(terms), h.shape
    (['explained', 'loss', 'segment_0', 'segment_1'], torch.Size([8, 16]))
    """
    h = flow.features(draw.x_t, draw.t, draw.cond)
    v = flow.velocity(draw.x_t, draw.t, draw.cond, h, draw.segment)
    check_same_shape(v, draw.u, ("velocity(x, t, cond, h)", "x"))
    u = draw.u.to(at_least_float32(draw.u.dtype))
    loss, energy = (
        _segment_squares(x, draw.segment, draw.pairs, draw.mask) for x in (_difference(v, u), u)
    )
    terms = {"loss": loss.mean, "explained": explained_share(loss.mean, energy.mean)}
    return terms | _by_segment(loss), h


def residual_loss(
    flow: Blockwise,
    draw: SegmentDraw,
    path: Path = Linear(),
    generator: torch.Generator | None = None,
    compare: str = "features",
) -> dict[str, Tensor]:
    """Compute the loss of stage 2: the mean over segments of the residual's squared error.

    The error is ``‖F(x_s, s) + c(t) R(x_t, t) − F(x_t, t)‖²``. Here ``s`` is the start of the
    segment. The states ``x_s`` and ``x_t`` come from the same pair and have the same condition.
    Only the feature residual ``R`` receives gradients. The weights of pairs count. A mask has no
    effect, because features have other elements than the state.

    Args:
        flow: Flow with a trunk and a feature residual.
        draw: Training samples, see `draw_segments`.
        path: Path of the training samples.
        generator: Source of ``x_s``, if the path adds noise.
        compare: ``"features"``, or ``"velocity"`` to compare the velocities that the stacks compute
            from the features.

    Returns:
        A dictionary with ``loss``; ``ratio``, the mean square error of the features in units of
        that of the features at the start (1 for a new ``R``); and ``segment_<m>``, the loss of
        segment ``m``.

    Raises:
        ValueError: If ``compare`` is unknown or the residual has another shape than the features.

    >>> from flowkit.blockwise.mlp import BlockwiseMLP
    >>> flow = BlockwiseMLP((2,), edges=2, width=16, residual_depth=1)
    >>> residual_loss(flow, draw_segments(flow, {"x1": torch.randn(8, 2)}))["ratio"]
    tensor(1.)
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
    error = _difference(estimate, target)
    ratio = error.detach().square().mean() / _difference(start, target).square().mean()
    if compare == "velocity":
        with torch.no_grad():
            target = flow.velocity(x_t, t, cond, target, segment)
        error = _difference(flow.velocity(x_t, t, cond, estimate, segment), target)
    loss = _segment_squares(error, segment, pairs)
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
    count, device, dtype = len(pairs.x1), pairs.x1.device, at_least_float32(pairs.x1.dtype)
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


def _stratified(
    flow: Blockwise, segment: Tensor, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """Draw times, stratified within each segment.

    A segment with ``n`` rows has ``n`` equal slices, and each slice gets one uniform time.
    """
    counts = torch.bincount(segment, minlength=flow.num_segments)
    order = segment.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[segment[order]]
    rank = torch.empty_like(segment)
    rank[order] = torch.arange(len(segment), device=segment.device) - first
    offset = torch.rand(segment.shape, dtype=dtype, device=segment.device, generator=generator)
    edges = torch.tensor(flow.edges, dtype=dtype, device=segment.device)
    left, right = edges[segment], edges[segment + 1]
    t = left + (right - left) * (rank + offset) / counts[segment]
    return inside(t.minimum(torch.nextafter(right, left)))  # rounding must not reach the next one


def _restricted(
    flow: Blockwise, segment: Tensor, times: Times, generator: torch.Generator | None
) -> Tensor:
    """Draw times from the restriction of ``times`` to each row's segment, by rejection."""
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
    """Return the mean over segments of the mean value of each segment.

    Args:
        values: Values ``(B,)``.
        segment: Segment of each value ``(B,)``.
        counts: Weight of each value in the divisor ``(B,)``, for values that are sums; 1 by
            default. A segment whose counts are all 0 has the mean 0.

    >>> segment = torch.arange(10) % 6
    >>> segment_mean(segment.float(), segment).mean  # the mean over the batch is 2.1
    tensor(2.5000)
    """
    present, owner = segment.unique(return_inverse=True)
    counts = torch.ones_like(values) if counts is None else counts
    sums, sizes = (
        values.new_zeros(len(present)).index_add(0, owner, x.to(values)) for x in (values, counts)
    )
    means = sums / torch.where(sizes > 0, sizes, 1)
    return SegmentMean(means.mean(), means, present)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a − b``, in float32 at least."""
    return a.to(at_least_float32(a.dtype)) - b


def _by_segment(loss: SegmentMean) -> dict[str, Tensor]:
    """Return the loss of each segment under the name ``segment_<m>``."""
    values = zip(loss.segments.tolist(), loss.values.detach().unbind(), strict=True)
    return {f"segment_{m}": value for m, value in values}


def _segment_squares(
    x: Tensor, segment: Tensor, pairs: Pairs, mask: Tensor | None = None
) -> SegmentMean:
    """Return the weighted mean square of each segment's elements, over the elements of the mask."""
    squares, counts = x.square(), None
    if mask is None:
        rows = squares.flatten(1).mean(1)
    else:
        mask = mask.to(x.dtype)
        rows = (squares * mask).flatten(1).sum(1)
        counts = mask.expand(x.shape).flatten(1).sum(1)
    if (weight := pair_weights(pairs, rows)) is not None:
        rows = rows * weight
    return segment_mean(rows, segment, counts)
