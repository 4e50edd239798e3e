"""Couplings: which source sample goes with which data sample."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from flowkit.types import Cond


class Pairs(NamedTuple):
    """Paired samples, their conditions and the logarithm of each pair's weight."""

    x0: Tensor
    x1: Tensor
    cond: Cond = None
    log_weight: Tensor | None = None


@runtime_checkable
class Coupling(Protocol):
    """What training needs of a coupling."""

    def pair(
        self, x0: Tensor, x1: Tensor, cond: Cond = None, generator: torch.Generator | None = None
    ) -> Pairs:
        """Pair source samples ``x0 (B, *)`` with data ``x1 (B, *)`` and its conditions."""
        ...


@dataclass(frozen=True)
class Independent:
    """Pairs as they come: independent if the batch is."""

    def pair(
        self, x0: Tensor, x1: Tensor, cond: Cond = None, generator: torch.Generator | None = None
    ) -> Pairs:
        """Return the pairs unchanged."""
        return Pairs(x0, x1, cond)
