"""A velocity in blocks: every segment of time has a small network of its own.

The segments are restrictions of one flow, so that a `Blockwise` is a velocity like any other.
Source: *Blockwise Flow Matching: Improving Flow Matching Models For Efficient High-Quality
Generation*, 2025 (arXiv 2510.21167).
"""

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from flowkit.blockwise.parts import Usage, check_edges
from flowkit.checks import check_at_least, check_choice, expand_like
from flowkit.sampling.solvers import CLOSE
from flowkit.types import Cond

MODES = ("full", "cached", "fra")


class Blockwise(nn.Module):
    """``v(x, t, cond) = stack_m(x, t, cond, h)`` in segment ``m``, with ``h = trunk(x, t, cond)``.

    The parts are anything with these methods:

    - ``trunk.features(x, t, cond) -> h``: the semantic features, ``(B, *)`` (None without a trunk),
    - ``stack.velocity(x, t, cond, h) -> (B, *)``: one for each segment,
    - ``feature_residual(x, t, cond) -> (B, *)`` shaped like ``h``; one whose attribute
      ``sees_start`` is true is called with the start's features as fourth argument.

    In a solve every stage of a step uses the block of the segment in which the *step* lies, also a
    stage on its right end, and features follow ``feature_mode``. With ``s`` the first evaluation
    in a segment and ``c(t)`` the fraction of the segment before ``t``, they are

    - ``"full"``: ``F(x_t, t)``, the trunk at every evaluation;
    - ``"cached"``: ``F(x_s, s)``, the trunk once a segment;
    - ``"fra"``: ``F(x_s, s) − c(s) R(x_s, s) + c(t) R(x_t, t)``, trunk once, then the small
      ``feature_residual`` R. As published at the start of a segment, where ``c(s) = 0``; the
      middle term lets a solve (or a guidance interval) begin or turn back anywhere.

    Outside of a solve features are always full, and each row goes to the stack of its own time.
    Caches belong to the solve; ``usage`` counts what the parts did since it was cleared.

    Args:
        trunk: Features for all segments, or None where each stack is a whole network.
        stacks: One per segment. An object may serve several: they then share their weights.
        edges: The ``M + 1`` ends of the segments, from 0 to 1; ``M`` means equal segments.
        feature_residual: R above.
        feature_mode: Of solves; may be changed later.

    Raises:
        ValueError: If edges do not increase from 0 to 1, stacks are not one per segment, or the
            mode needs a part that is missing.

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
        # First, so that a copy of the whole copies the trunk before the stacks that refer to it.
        self.trunk = trunk
        modules = all(isinstance(stack, nn.Module) for stack in stacks)
        self.stacks = nn.ModuleList(stacks) if modules else list(stacks)
        self.feature_residual = feature_residual
        self.feature_mode = feature_mode
        self.reach: dict[str, tuple[float, ...]] = {}
        self.usage = Usage()

    @property
    def num_segments(self) -> int:
        """M, the number of segments."""
        return len(self.edges) - 1

    @property
    def feature_mode(self) -> str:
        """Where a solve takes features from: ``"full"``, ``"cached"`` or ``"fra"``."""
        return self._feature_mode

    @feature_mode.setter
    def feature_mode(self, mode: str) -> None:
        check_choice(mode, MODES, "feature_mode")
        for name, needed in (("trunk", mode != "full"), ("feature_residual", mode == "fra")):
            if needed and getattr(self, name) is None:
                fix = "; the second stage of training makes one" if name != "trunk" else ""
                raise ValueError(f"{name} must be given for feature_mode {mode!r}, got None{fix}")
        self._feature_mode = mode

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``, from full features."""
        return self.velocity(x, t, cond, self.features(x, t, cond))

    def features(self, x: Tensor, t: Tensor, cond: Cond = None) -> Any:
        """The trunk's features of a whole batch; None without a trunk."""
        if self.trunk is None:
            return None
        self.usage.add("trunk", len(x))
        return self.trunk.features(x, t, cond)

    def residual(self, x: Tensor, t: Tensor, cond: Cond, start: Tensor) -> Tensor:
        """``R(x, t, cond)`` beside the features ``start`` of the segment's start."""
        self.usage.add("feature_residual", len(x))
        seen = (start,) if getattr(self.feature_residual, "sees_start", False) else ()
        return self.feature_residual(x, t, cond, *seen)

    def velocity(
        self, x: Tensor, t: Tensor, cond: Cond, h: Any, segment: Tensor | int | None = None
    ) -> Tensor:
        """Velocity ``(B, *)`` given features.

        Args:
            x: States ``(B, *)``.
            t: Times ``(B,)``.
            cond: Conditions.
            h: Features of the batch.
            segment: Of the batch, or of each row ``(B,)``; None looks it up by ``t``.
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
                parts.append(self.velocity(x_m, t_m, cond_m, h_m, m))
        return torch.cat(parts)[order.argsort()]

    def segment_of(self, t: Tensor) -> Tensor:
        """Segments ``(B,)`` of times; an inner edge belongs to the segment on its right."""
        inner = torch.tensor(self.edges[1:-1], dtype=t.dtype, device=t.device)
        return torch.bucketize(t.contiguous(), inner, right=True)

    def fraction(self, t: Any, segment: Any) -> Any:
        """``c(t)``, how much of a segment lies before ``t``; floats or tensors."""
        if isinstance(segment, Tensor):
            edges = torch.tensor(self.edges, dtype=t.dtype, device=t.device)
            left, right = edges[segment], edges[segment + 1]
        else:
            left, right = self.edges[segment : segment + 2]
        return (t - left) / (right - left)

    def bind(self, cond: Cond = None, grid: Tensor | None = None) -> "BlockwiseSolve":
        """Prepare for one solve; a grid without the edges is warned about."""
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
                    f"{[round(edge, 6) for edge in missing]}; they are added: steps over them "
                    "are made in two parts",
                    stacklevel=3,
                )
        return BlockwiseSolve(self, self.feature_mode, self.reach.get(self.feature_mode))

    def refresh_beyond(self, rates: Mapping[str, Sequence[float]], tolerance: float) -> None:
        """Let solves run the trunk again where features are predicted to be off by more.

        Features carried over a fraction ``c`` of segment ``m`` are predicted to be off by
        ``rates[mode][m] · c``; see `flowkit.blockwise.Drift.rates`. Checked at each step's start.

        Args:
            rates: Errors per whole segment, ``M`` for each mode.
            tolerance: The largest predicted error, as a share of the features' size.
        """
        check_at_least(tolerance, 0, "tolerance")
        self.reach = {
            mode: tuple(tolerance / max(rate, 1e-12) for rate in values)
            for mode, values in rates.items()
        }


@dataclass
class _Anchor:
    """Where features were computed, and ``base = F − c R`` there, to which FRA adds ``c R``."""

    features: Any
    base: Any
    fraction: float


class BlockwiseSolve:
    """A `Blockwise` during one solve: the segment of the step, and the features it reuses.

    Args:
        flow: What it serves.
        mode: The feature mode.
        reach: For each segment, the largest fraction of it that features are carried over.
    """

    def __init__(self, flow: Blockwise, mode: str, reach: Sequence[float] | None = None) -> None:
        self.flow, self.mode, self.reach = flow, mode, reach
        self.segment: int | None = None
        self.anchor: _Anchor | None = None

    @property
    def edges(self) -> tuple[float, ...]:
        """Times that no step may lie across."""
        return self.flow.edges

    def begin_step(self, t_left: float, t_right: float) -> None:
        """Take the segment of a step, given by its ends in order of time."""
        edges = self.flow.edges
        segment = bisect_right(edges, (t_left + t_right) / 2) - 1
        if t_left < edges[segment] - CLOSE or t_right > edges[segment + 1] + CLOSE:
            raise ValueError(
                f"a step must lie within one segment of {[round(e, 6) for e in edges]}, got "
                f"{t_left:.6g} to {t_right:.6g}; grids.blockwise(edges, steps) makes such grids"
            )
        if segment != self.segment:
            self.segment, self.anchor = segment, None
        elif self.anchor is not None and self.reach is not None:
            ends = (self.flow.fraction(t, segment) for t in (t_left, t_right))
            gap = min(abs(end - self.anchor.fraction) for end in ends)
            if gap > self.reach[segment]:
                self.anchor = None

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, *)`` by the block of the step."""
        if self.segment is None:  # called by something that takes no steps
            return self.flow(x, t, cond)
        return self.flow.velocity(x, t, cond, self.features(x, t, cond), self.segment)

    def features(self, x: Tensor, t: Tensor, cond: Cond) -> Any:
        """Features as the mode has them."""
        flow, segment = self.flow, cast(int, self.segment)
        if self.mode == "full":
            return flow.features(x, t, cond)
        if self.anchor is None:
            # A copy: the state is the solver's buffer, and features may be the state itself.
            h = tree_map(
                lambda a: a.clone() if isinstance(a, Tensor) else a, flow.features(x, t, cond)
            )
            start = float(t[0])
            fraction, started = flow.fraction(start, segment), start < flow.edges[segment] + CLOSE
            base = h
            if self.mode == "fra" and not started:
                base = h - fraction * flow.residual(x, t, cond, h)
            self.anchor = _Anchor(h, base, 0.0 if started else fraction)
            return h
        if self.mode == "cached":
            return self.anchor.features
        residual = flow.residual(x, t, cond, self.anchor.features)
        c = flow.fraction(expand_like(t, residual), segment)
        return self.anchor.base + (c * residual).to(residual.dtype)


def _rows(tree: Any, rows: Tensor) -> Any:
    return tree_map(lambda a: None if a is None else a[rows], tree)
