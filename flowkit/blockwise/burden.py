"""Burden over time: the loss of a velocity by time, and segments of equal burden."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flowkit.blockwise.parts import check_edges
from flowkit.checks import as_grid, check_at_least
from flowkit.couplings import Coupling, Independent
from flowkit.losses import flow_matching_loss
from flowkit.paths import Linear, Path
from flowkit.times import Device, Stratified
from flowkit.types import Batch
from flowkit.velocity import Velocity


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

    `flowkit.blockwise.equal_burden` divides time by this loss. The loss includes a part that no
    network can remove. To exclude this part, subtract the loss of a larger network.

    Args:
        velocity: A trained velocity.
        batch: Data; every interval uses the whole batch.
        num_intervals: Number of intervals ``K``, at least 1.
        path: Path, as in training.
        coupling: Coupling, as in training.
        generator: Source of noise and times.

    Returns:
        Ends of the intervals ``(K + 1,)`` and their losses ``(K,)``.

    Raises:
        ValueError: If ``num_intervals`` is below 1.

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


@dataclass(frozen=True)
class _Within:
    """Stratified times in the interval [``low``, ``high``)."""

    low: float
    high: float

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` times."""
        return self.low + (self.high - self.low) * Stratified()(batch, device, generator)


def equal_burden(times: Tensor, burden: Tensor, num_segments: int) -> Tensor:
    """Return edges of segments with equal ``∫ burden dt``.

    Args:
        times: Ends ``(K + 1,)`` of ``K`` intervals from 0 to 1.
        burden: Positive density ``(K,)`` in each interval, such as a network's loss by time (see
            `flowkit.blockwise.loss_by_time`).
        num_segments: Number of segments ``M``, at least 1.

    Returns:
        Edges ``(M + 1,)`` in float64.

    Raises:
        ValueError: If ``times`` do not increase from 0 to 1, the burden is not positive and finite,
            or there is not one number per interval.

    >>> equal_burden(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([3.0, 1.0]), 2)
    tensor([0.0000, 0.3333, 1.0000], dtype=torch.float64)
    """
    check_at_least(num_segments, 1, "num_segments")
    ends = torch.tensor(check_edges(times), dtype=torch.float64)
    density = torch.as_tensor(burden, dtype=torch.float64, device="cpu")
    if density.shape != (len(ends) - 1,):
        raise ValueError(
            f"burden must hold one number per interval, {len(ends) - 1}, got {tuple(density.shape)}"
        )
    if not bool((density > 0).all()) or not bool(density.isfinite().all()):
        raise ValueError(f"burden must be positive and finite, got {density.tolist()}")
    total = torch.cat([density.new_zeros(1), (density * ends.diff()).cumsum(0)])
    wanted = torch.arange(1, num_segments, dtype=torch.float64) / num_segments * total[-1]
    k = torch.searchsorted(total, wanted).clamp(1, len(density)) - 1
    inner = ends[k] + (wanted - total[k]) / density[k]
    return as_grid(torch.cat([ends[:1], inner, ends[-1:]]), "edges")
