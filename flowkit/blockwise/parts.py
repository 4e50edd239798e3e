"""Building parts of a `flowkit.blockwise.Blockwise` flow: segments, counts, copies."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from flowkit.checks import as_grid, check_at_least
from flowkit.types import Cond

M = TypeVar("M", bound=nn.Module)


@dataclass
class Usage:
    """Counts of the parts of a `Blockwise`: number of calls and of rows, by the part's name.

    >>> usage = Usage()
    >>> usage.add("trunk", rows=8)
    >>> usage.calls["trunk"], usage.rows["trunk"]
    (1, 8)
    """

    calls: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)

    def add(self, part: str, rows: int) -> None:
        """Count one call of a part with a number of rows."""
        self.calls[part] += 1
        self.rows[part] += rows

    def clear(self) -> None:
        """Reset all counts to 0."""
        self.calls.clear()
        self.rows.clear()


class PlainStack(nn.Module):
    """Stack that is a complete network and does not use features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, h: Any) -> Tensor:
        """Return the velocity ``(B, *)`` of the network."""
        return self.net(x, t, cond)


def copies(velocity: nn.Module, num_segments: int) -> list[PlainStack]:
    """Copy one network into the stacks of a blockwise flow.

    ``Blockwise(None, copies(net, 6), 6)`` samples like ``net``.

    Args:
        velocity: The network.
        num_segments: Number of copies, at least 1.

    Raises:
        ValueError: If ``num_segments`` is below 1.

    >>> import torch
    >>> from flowkit.nn import MLP
    >>> from flowkit.blockwise.flow import Blockwise
    >>> net, x, t = MLP((2,)), torch.randn(4, 2), torch.rand(4)
    >>> torch.equal(Blockwise(None, copies(net, 1), edges=1)(x, t), net(x, t))
    True
    """
    check_at_least(num_segments, 1, "num_segments")
    return [PlainStack(copy.deepcopy(velocity)) for _ in range(num_segments)]


class Part(Generic[M]):
    """Reference to a module of another owner; the reference neither stores nor trains the module.

    A copy of the whole flow refers to the copied module. A copy of one part alone refers to the
    same module.
    """

    def __init__(self, module: M) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part[M]":
        """Return a reference to the copied module, if the module was copied before."""
        return Part(memo.get(id(self.module), self.module))


def check_edges(edges: Tensor | Sequence[float] | int) -> tuple[float, ...]:
    """Return the ends of segments as floats that increase from 0 to 1; ``M`` means equal segments.

    Raises:
        ValueError: If the ends do not increase from 0 to 1.

    >>> check_edges(2)
    (0.0, 0.5, 1.0)
    """
    if isinstance(edges, int):  # without torch, because models are also built on the meta device
        check_at_least(edges, 1, "edges")
        edges = [k / edges for k in range(edges + 1)]
    elif not isinstance(edges, Tensor):
        edges = list(edges)
    times = tuple(as_grid(edges, "edges").tolist())
    if (times[0], times[-1]) != (0.0, 1.0):
        raise ValueError(f"edges must increase from 0 to 1, got {list(times)}")
    return times


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


def each(value: int | Sequence[int], count: int, name: str) -> list[int]:
    """Return one value per segment, from one number for all segments or from a sequence.

    Raises:
        ValueError: If the sequence does not hold one value per segment.
    """
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{name} must be a number or one per segment, {count}, got {values}")
    return values
