"""Where the segments of a `flowkit.nn.blockwise.Blockwise` end."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flowkit.checks import as_grid, check_at_least


def check_edges(edges: Tensor | Sequence[float] | int) -> tuple[float, ...]:
    """Return the ends of segments as floats, increasing from 0 to 1; ``M`` means equal ones.

    >>> check_edges(2)
    (0.0, 0.5, 1.0)
    """
    if isinstance(edges, int):  # not by torch: models are also built on the meta device
        check_at_least(edges, 1, "edges")
        edges = [k / edges for k in range(edges + 1)]
    elif not isinstance(edges, Tensor):
        edges = list(edges)
    times = tuple(as_grid(edges, "edges").tolist())
    if (times[0], times[-1]) != (0.0, 1.0):
        raise ValueError(f"edges must increase from 0 to 1, got {list(times)}")
    return times


def equal_burden(times: Tensor, burden: Tensor, num_segments: int) -> Tensor:
    """Edges between which a burden over time is equal: ``∫ burden dt`` is the same in each segment.

    Args:
        times: Ends ``(K + 1,)`` of K intervals from 0 to 1.
        burden: Positive density ``(K,)`` in each of them, such as a network's loss by time
            (see `flowkit.modules.blockwise.loss_by_time`).
        num_segments: How many.

    Raises:
        ValueError: If the burden is not positive, or there is not one for each interval.

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


def each(value: int | Sequence[int], count: int, name: str) -> list[int]:
    """Return one value per segment, of a number for all or of as many numbers."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} must be a number or one per segment, {count}, got {values}")
    return values
