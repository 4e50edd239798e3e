"""Blockwise velocity: every segment of time has its own small network.

The segments are parts of one flow, so a `Blockwise` is a velocity like any other.

Source: *Blockwise Flow Matching: Improving Flow Matching Models For Efficient High-Quality
Generation*, 2025 (arXiv 2510.21167).
"""

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flowkit.blockwise.parts import ReuseErrors, Usage, check_edges
from flowkit.checks import check_at_least, check_choice, expand_like
from flowkit.sampling.solvers import CLOSE
from flowkit.types import Cond

MODES = ("full", "cached", "fra")


class DriftLimit(NamedTuple):
    """Limit of the predicted error of reused features, see `Blockwise.refresh_beyond`.

    ``errors``: for each mode, the measured errors of each segment. ``tolerance``: largest predicted
    error, relative to the size of the features.
    """

    errors: Mapping[str, Sequence[ReuseErrors]]
    tolerance: float

    def exceeded(self, mode: str, segment: int, start: float, end: float) -> bool:
        """Return whether features of the part ``start`` of a segment are too old at ``end``."""
        known = self.errors.get(mode)
        return known is not None and known[segment].largest(start, end) > self.tolerance


class Blockwise(nn.Module):
    """Velocity ``v(x, t, cond) = stack_m(x, t, cond, h)`` for times in segment ``m``.

    The features are ``h = trunk(x, t, cond)``.

    The parts are any objects with these methods:

    - ``trunk.features(x, t, cond) -> h``: the semantic features ``(B, *)``, or ``None`` without a
      trunk.
    - ``stack.velocity(x, t, cond, h) -> (B, *)``: one stack per segment.
    - ``feature_residual(x, t, cond) -> (B, *)`` with the shape of ``h``. If its attribute
      ``sees_start`` is true, the features at the start of the segment are its fourth argument.

    In a solve, all evaluations of a step use the stack of the segment that contains the *step*,
    also an evaluation at the right end of the step. The features depend on ``feature_mode``. Let
    ``s`` be the time of the first evaluation in a segment, and ``c(t)`` the part of the segment
    before ``t``:

    - ``"full"``: ``F(x_t, t)``. The trunk runs in every evaluation.
    - ``"cached"``: ``F(x_s, s)``. The trunk runs once per segment.
    - ``"fra"``: ``F(x_s, s) − c(s) R(x_s, s) + c(t) R(x_t, t)``. The trunk runs once per segment,
      and the small ``feature_residual`` ``R`` runs in every evaluation. At the start of a segment
      ``c(s) = 0``, which gives the published equation. The middle term allows a solve (or a
      guidance interval) to start or to turn back inside a segment.

    Outside of a solve, features are always full, and each row uses the stack of its own time.
    Caches belong to the solve. ``usage`` counts the calls of the parts since ``usage.clear()``.

    Args:
        trunk: Features for all segments, or ``None`` if each stack is a complete network.
        stacks: One stack per segment. One object may serve several segments, which then share
            weights.
        edges: The ``M + 1`` ends of the segments from 0 to 1, or the number ``M`` of equal
            segments.
        feature_residual: The feature residual ``R``, or ``None``.
        feature_mode: Mode of the features in a solve; the attribute may change later.

    Raises:
        ValueError: If ``edges`` do not increase from 0 to 1, ``stacks`` are not one per segment, or
            the mode needs a part that is missing.

    >>> net = nn.Linear(2, 2)
    >>> class Stack:
    ...     def velocity(self, x, t, cond, h):
    ...         return net(x)
    >>> flow = Blockwise(None, [Stack(), Stack()], edges=[0.0, 0.3, 1.0])
    >>> flow(torch.zeros(5, 2), torch.rand(5)).shape
    torch.Size([5, 2])
    """

    trunk: Any
    stacks: Any
    feature_residual: Any

    def __init__(
        self,
        trunk: Any,
        stacks: Sequence[Any],
        edges: Tensor | Sequence[float] | int,
        feature_residual: Any = None,
        feature_mode: str = "full",
    ) -> None:
        super().__init__()
        self.edges: tuple[float, ...] = check_edges(edges)
        if len(stacks) != self.num_segments:
            raise ValueError(
                f"stacks must hold one per segment, {self.num_segments}, got {len(stacks)}"
            )
        # The trunk comes first: a deep copy must copy the trunk before the stacks that refer to it.
        self.trunk = trunk
        modules = all(isinstance(stack, nn.Module) for stack in stacks)
        self.stacks = nn.ModuleList(stacks) if modules else list(stacks)
        self.feature_residual = feature_residual
        self.feature_mode = feature_mode
        self.drift_limit: DriftLimit | None = None
        self.usage = Usage()

    @property
    def num_segments(self) -> int:
        """Number of segments ``M``."""
        return len(self.edges) - 1

    @property
    def feature_mode(self) -> str:
        """Mode of the features in a solve: ``"full"``, ``"cached"`` or ``"fra"``."""
        return self._feature_mode

    @feature_mode.setter
    def feature_mode(self, mode: str) -> None:
        check_choice(mode, MODES, "feature_mode")
        for name, needed in (("trunk", mode != "full"), ("feature_residual", mode == "fra")):
            if needed and getattr(self, name) is None:
                fix = "; train one in the second stage" if name != "trunk" else ""
                raise ValueError(f"{name} must be given for feature_mode {mode!r}, got None{fix}")
        self._feature_mode = mode

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``, from full features."""
        return self.velocity(x, t, cond, self.features(x, t, cond))

    def features(self, x: Tensor, t: Tensor, cond: Cond = None) -> Any:
        """Return the trunk's features of a whole batch; ``None`` without a trunk."""
        if self.trunk is None:
            return None
        self.usage.add("trunk", len(x))
        return self.trunk.features(x, t, cond)

    def residual(self, x: Tensor, t: Tensor, cond: Cond, start: Tensor) -> Tensor:
        """Return ``R(x, t, cond)``, for features ``start`` at the start of the segment."""
        self.usage.add("feature_residual", len(x))
        seen = (start,) if getattr(self.feature_residual, "sees_start", False) else ()
        return self.feature_residual(x, t, cond, *seen)

    def velocity(
        self, x: Tensor, t: Tensor, cond: Cond, h: Any, segment: Tensor | int | None = None
    ) -> Tensor:
        """Return the velocity ``(B, *)`` for given features.

        Args:
            x: States ``(B, *)``.
            t: Times ``(B,)``.
            cond: Conditions.
            h: Features of the batch.
            segment: Segment of the whole batch, or of each row ``(B,)``; ``None`` means the segment
                of ``t``.
        """
        if isinstance(segment, int):
            self.usage.add(f"stacks.{segment}", len(x))
            return self.stacks[segment].velocity(x, t, cond, h)
        owner = self.segment_of(t) if segment is None else segment
        counts = torch.bincount(owner, minlength=self.num_segments).tolist()
        if max(counts) == len(x):
            return self.velocity(x, t, cond, h, counts.index(len(x)))
        order, parts = owner.argsort(stable=True), []
        for m, rows in enumerate(order.split(counts)):
            if len(rows):
                x_m, t_m, cond_m, h_m = _rows((x, t, cond, h), rows)
                # a copy, since stacks may share an output buffer
                parts.append(self.velocity(x_m, t_m, cond_m, h_m, m).clone())
        return torch.cat(parts)[order.argsort()]

    def segment_of(self, t: Tensor) -> Tensor:
        """Return the segments ``(B,)`` of times; an inner edge belongs to the right segment."""
        inner = torch.tensor(self.edges[1:-1], dtype=t.dtype, device=t.device)
        return torch.bucketize(t.contiguous(), inner, right=True)

    def fraction(self, t: Any, segment: Any) -> Any:
        """Return ``c(t)``, the part of a segment before ``t``, as a float or tensor like ``t``."""
        if isinstance(segment, Tensor):
            edges = torch.tensor(self.edges, dtype=t.dtype, device=t.device)
            left, right = edges[segment], edges[segment + 1]
        else:
            left, right = self.edges[segment : segment + 2]
        return (t - left) / (right - left)

    def bind(self, cond: Cond = None, grid: Tensor | None = None) -> "BlockwiseSolve":
        """Prepare one solve; warn if the grid misses an edge."""
        if grid is not None:
            low, high = float(grid[0]), float(grid[-1])
            missing = [
                edge
                for edge in self.edges
                if low + CLOSE < edge < high - CLOSE and bool(((grid - edge).abs() > CLOSE).all())
            ]
            if missing:
                warnings.warn(
                    "grid must hold the edges between segments, got one without "
                    f"{[round(edge, 6) for edge in missing]}; the solve splits steps at these "
                    "edges",
                    stacklevel=3,
                )
        return BlockwiseSolve(self, self.feature_mode, self.drift_limit)

    def refresh_beyond(self, errors: Mapping[str, Sequence[ReuseErrors]], tolerance: float) -> None:
        """Let solves run the trunk again where reused features are predicted to be too old.

        The prediction is the largest error that `flowkit.blockwise.feature_drift` measured between
        the times of the trunk's last call and of the current evaluation, see `ReuseErrors.largest`.
        It needs no call of the trunk. The true error of a solve can be larger: its states are not
        those of the measurement.

        Args:
            errors: Measured errors of each segment, by mode: ``feature_drift(...).pairs``.
            tolerance: Largest predicted error, relative to the size of the features, at least 0.

        Raises:
            ValueError: If ``tolerance`` is negative, or a mode has not one entry per segment.
        """
        check_at_least(tolerance, 0, "tolerance")
        for mode, known in errors.items():
            if len(known) != self.num_segments:
                raise ValueError(
                    f"errors must hold one entry per segment, {self.num_segments}, got "
                    f"{len(known)} for {mode}"
                )
        self.drift_limit = DriftLimit(errors, tolerance)


@dataclass
class _Anchor:
    """Features ``F`` of the last trunk call, and ``base = F − c R`` for later ``base + c R``."""

    features: Any
    base: Any
    fraction: float


class BlockwiseSolve:
    """State of a `Blockwise` in one solve: the segment of the step, and the reused features.

    Args:
        flow: The blockwise flow.
        mode: The feature mode.
        limit: Limit of the reuse of features; ``None`` means reuse in the whole segment.
    """

    def __init__(self, flow: Blockwise, mode: str, limit: DriftLimit | None = None) -> None:
        self.flow, self.mode, self.limit = flow, mode, limit
        self.segment: int | None = None
        self.anchor: _Anchor | None = None

    @property
    def edges(self) -> tuple[float, ...]:
        """Times inside which every step must lie."""
        return self.flow.edges

    def begin_step(self, t_left: float, t_right: float) -> None:
        """Set the segment of a step from ``t_left`` to ``t_right``, with ``t_left < t_right``.

        Raises:
            ValueError: If the step crosses an edge.
        """
        edges = self.flow.edges
        segment = bisect_right(edges, (t_left + t_right) / 2) - 1
        if t_left < edges[segment] - CLOSE or t_right > edges[segment + 1] + CLOSE:
            raise ValueError(
                f"a step must lie within one segment of {[round(e, 6) for e in edges]}, got "
                f"{t_left:.6g} to {t_right:.6g}; grids.blockwise(edges, steps) makes such grids"
            )
        if segment != self.segment:
            self.segment, self.anchor = segment, None

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` of the stack of the current step."""
        if self.segment is None:  # the caller begins no steps
            return self.flow(x, t, cond)
        return self.flow.velocity(x, t, cond, self.features(x, t, cond), self.segment)

    def features(self, x: Tensor, t: Tensor, cond: Cond) -> Any:
        """Return the features of the current mode."""
        if self.mode == "full":
            return self.flow.features(x, t, cond)
        if self.anchor is None or self._too_old(self.anchor, t):
            h = self.flow.features(x, t, cond)
            self.anchor = self.anchored(h, x, t, cond)
            return self.anchor.features
        return self.reused(self.anchor, x, t, cond)

    def _too_old(self, anchor: _Anchor, t: Tensor) -> bool:
        """Return whether the predicted error of reused features exceeds the limit."""
        if self.limit is None:
            return False
        segment = cast(int, self.segment)
        now = self.flow.fraction(float(t[0]), segment)
        return self.limit.exceeded(self.mode, segment, anchor.fraction, now)

    def anchored(self, h: Any, x: Tensor, t: Tensor, cond: Cond) -> _Anchor:
        """Return what later evaluations reuse of features ``h`` at ``x``, ``t`` and ``cond``."""
        flow, segment = self.flow, cast(int, self.segment)
        # A copy is needed: the state is a buffer of the solver, and features may be the state.
        h = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, h)
        start = float(t[0])
        if start < flow.edges[segment] + CLOSE:
            return _Anchor(h, h, 0.0)
        fraction = flow.fraction(start, segment)
        if self.mode == "cached":
            return _Anchor(h, h, fraction)
        return _Anchor(h, h - fraction * flow.residual(x, t, cond, h), fraction)

    def reused(self, anchor: _Anchor, x: Tensor, t: Tensor, cond: Cond) -> Any:
        """Return features at ``x``, ``t`` and ``cond`` without a call of the trunk."""
        if self.mode == "cached":
            return anchor.features
        residual = self.flow.residual(x, t, cond, anchor.features)
        c = self.flow.fraction(expand_like(t, residual), cast(int, self.segment))
        return anchor.base + (c * residual).to(residual.dtype)


def _rows(tree: Any, rows: Tensor) -> Any:
    """Select rows of all tensors in a structure."""
    return tree_map(lambda a: None if a is None else a[rows], tree)
