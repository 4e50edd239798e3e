"""What the parts of a `flowkit.nn.blockwise.Blockwise` are made with, and how often they ran."""

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from flowkit.checks import check_at_least
from flowkit.types import Cond

M = TypeVar("M", bound=nn.Module)


@dataclass
class Usage:
    """How often the parts of a `Blockwise` were called, and on how many rows in all."""

    calls: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)

    def add(self, part: str, rows: int) -> None:
        """Count one call."""
        self.calls[part] += 1
        self.rows[part] += rows

    def clear(self) -> None:
        """Forget all."""
        self.calls.clear()
        self.rows.clear()


class PlainStack(nn.Module):
    """A whole network as the stack of a segment: it looks at no features."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, h: Any) -> Tensor:
        """Velocity ``(B, *)`` of the network."""
        return self.net(x, t, cond)


def copies(velocity: nn.Module, num_segments: int) -> list[PlainStack]:
    """Copies of one network as stacks: ``Blockwise(None, copies(net, 6), 6)`` samples like ``net``.

    >>> import torch
    >>> from flowkit.nn import MLP
    >>> from flowkit.nn.blockwise import Blockwise
    >>> net, x, t = MLP((2,)), torch.randn(4, 2), torch.rand(4)
    >>> torch.equal(Blockwise(None, copies(net, 1), edges=1)(x, t), net(x, t))
    True
    """
    check_at_least(num_segments, 1, "num_segments")
    return [PlainStack(copy.deepcopy(velocity)) for _ in range(num_segments)]


class Part(Generic[M]):
    """A module that belongs to another: used here, but neither stored nor trained from here.

    A copy of a whole refers to the whole's copy; a copy of one part alone to the same module.
    """

    def __init__(self, module: M):
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part[M]":
        return Part(memo.get(id(self.module), self.module))
