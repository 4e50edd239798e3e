"""How far reused features drift from what the trunk would say."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flowkit.blockwise.flow import Blockwise, BlockwiseSolve
from flowkit.checks import as_grid
from flowkit.types import Cond
from flowkit.velocity import Velocity


class Drift(NamedTuple):
    """Errors of reused features along a solve, by step.

    ``times (n,)`` where steps begin; ``segment (n,)``; ``fraction (n,)`` of the segment before
    them; ``errors``: for ``"cached"`` and, with a feature residual, ``"fra"``, the root mean
    square error ``(n,)`` in units of the features' own root mean square.
    """

    times: Tensor
    segment: Tensor
    fraction: Tensor
    errors: dict[str, Tensor]

    def rates(self) -> dict[str, list[float]]:
        """Errors per whole segment, ``M`` for each mode: the largest ``error / fraction``.

        Segments of a single step, whose features are never reused, have rate 0.
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
        """A row per segment: mean and largest error of each mode."""
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
    """Measure cached and approximated features along Euler steps made with full features.

    Args:
        flow: With a trunk; its ``feature_mode`` does not matter.
        x0: States ``(B, *)`` at the first time.
        grid: From 0 to 1, the edges included; or a number of uniform steps.
        cond: Their conditions.
        velocity: The field whose path is followed, such as the flow under guidance; None is the
            flow itself.

    Raises:
        ValueError: If the flow has no trunk or the grid not the edges.

    >>> from flowkit.blockwise.mlp import BlockwiseMLP
    >>> flow = BlockwiseMLP((2,), edges=2, width=16, residual_depth=1).eval()
    >>> drift = feature_drift(flow, torch.randn(8, 2), 8)
    >>> bool((drift.errors["fra"] == drift.errors["cached"]).all())  # an untrained residual
    True
    """
    if flow.trunk is None:
        raise ValueError("trunk must be given for features to drift, got None")
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
