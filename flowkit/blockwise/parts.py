"""Building parts of a `flowkit.blockwise.Blockwise` flow: segments, counts, copies."""

import copy
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from flowkit.checks import as_grid, check_at_least, check_integer
from flowkit.types import Cond

M = TypeVar("M", bound=nn.Module)
SAME = 1e-4  # parts of a segment that differ by less are one part: times may come in float32


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


@dataclass(frozen=True, eq=False)
class ReuseErrors:
    """Errors of reused features in one segment, measured between ``n`` times.

    Args:
        fractions: Parts ``c`` of the segment before the times, ``(n,)``, increasing.
        errors: Root mean square errors ``(n, n)``: entry ``(i, j)`` is the error at time ``j`` of
            features that the trunk computed at time ``i``, in units of the root mean square of the
            features at time ``j``.

    >>> import torch
    >>> c = torch.tensor([0.0, 0.5, 1.0])
    >>> known = ReuseErrors((0.0, 0.5, 1.0), (c**2 - c[:, None] ** 2).abs())
    >>> known.largest(0.5, 1.0), known.largest(0.1, 0.2)
    (0.75, 0.25)
    """

    fractions: Sequence[float]
    errors: Tensor

    def largest(self, start: float, end: float) -> float:
        """Return the largest error measured within the shortest measured interval around two parts.

        This is an upper bound where the error grows with the interval. Outside of the measured
        interval it is infinite.

        Args:
            start: Part of the segment at the trunk's call.
            end: Part of the segment at the reuse; it may be below ``start``.
        """
        low, high = min(start, end), max(start, end)
        i = bisect_right(self.fractions, low + SAME) - 1
        j = bisect_left(self.fractions, high - SAME)
        if i < 0 or j == len(self.fractions):
            return math.inf
        within = self.errors[i : j + 1, i : j + 1]
        return (within.triu() if start <= end else within.tril()).max().item()


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
    check_integer(num_segments, "num_segments", 1)
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


def each(value: int | Sequence[int], count: int, name: str) -> list[int]:
    """Return one size per segment, from one number for all segments or from a sequence.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If the sequence does not hold one size per segment, or one is below 1.
    """
    values = list(value) if isinstance(value, Sequence) else [value] * count
    for size in values:
        check_integer(size, name, 1)
    if len(values) != count:
        raise ValueError(f"{name} must be a number or one per segment, {count}, got {values}")
    return values
