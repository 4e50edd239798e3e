"""Drift of reused features: their error against the trunk's current features."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flowkit.blockwise.flow import Blockwise, BlockwiseSolve
from flowkit.checks import as_grid
from flowkit.types import Cond
from flowkit.velocity import Velocity


class Drift(NamedTuple):
    """Errors of reused features along a solve, by step.

    ``times (n,)``: starts of the steps. ``segment (n,)``: segment of each step. ``fraction (n,)``:
    part of the segment before the step. ``errors``: root mean square errors ``(n,)`` by mode,
    ``"cached"`` and, with a feature residual, ``"fra"``, in units of the root mean square of the
    features.
    """

    times: Tensor
    segment: Tensor
    fraction: Tensor
    errors: dict[str, Tensor]

    def rates(self) -> dict[str, list[float]]:
        """Return the largest ``error / fraction`` of each segment, ``M`` numbers for each mode.

        This is the error per whole segment. A segment with a single step reuses no features, so its
        rate is 0.
        """
        later, result = self.fraction > 1e-6, {}
        for mode, errors in self.errors.items():
            slopes = errors / self.fraction.clamp_min(1e-6)
            result[mode] = [
                slopes[later & (self.segment == m)].max().item()
                if bool((later & (self.segment == m)).any())
                else 0.0
                for m in range(int(self.segment.max()) + 1)
            ]
        return result

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

    Args:
        flow: Blockwise flow with a trunk; its ``feature_mode`` has no effect.
        x0: States ``(B, *)`` at the first time.
        grid: Times with all edges of the flow, or a number of uniform steps.
        cond: Conditions of the states.
        velocity: Velocity of the Euler steps, for example the flow with guidance; ``None`` means
            the flow itself.

    Returns:
        Errors of ``"cached"`` and, with a feature residual, of ``"fra"`` features at each step.

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
    times = as_grid(grid)
    modes = ("cached",) if flow.feature_residual is None else ("cached", "fra")
    probes = {mode: BlockwiseSolve(flow, mode) for mode in modes}
    x, errors, segments = x0.clone(), {mode: [] for mode in probes}, []
    for left, right in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        t = x.new_full((len(x),), left, dtype=torch.promote_types(x.dtype, torch.float32))
        h: Any = flow.features(x, t, cond)
        for mode, probe in probes.items():
            probe.begin_step(left, right)
            estimate = probe.features(x, t, cond)
            errors[mode].append(((estimate - h).square().mean() / h.square().mean()).sqrt())
        segments.append(cast(int, probes["cached"].segment))
        own = velocity is None
        v = flow.velocity(x, t, cond, h, segments[-1]) if own else velocity(x, t, cond)
        x = x + (right - left) * v
    fractions = [flow.fraction(t, m) for t, m in zip(times.tolist(), segments, strict=False)]
    return Drift(
        times[:-1],
        torch.tensor(segments),
        torch.tensor(fractions, dtype=torch.float64),
        {mode: torch.stack(values).cpu() for mode, values in errors.items()},
    )
