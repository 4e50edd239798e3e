"""Training-time distributions: which ``t`` in [0, 1] a batch is trained at.

Each is a callable ``times(batch, device=None, generator=None) -> (batch,)`` of float32.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_positive
from flowkit.distributed import place

Device = torch.device | str | None


@runtime_checkable
class Times(Protocol):
    """What training needs of a time distribution."""

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return ``batch`` times in [0, 1]."""
        ...


@dataclass(frozen=True)
class Uniform:
    """``t ~ U[0, 1)``, the distribution of the flow-matching loss as published.

    >>> Uniform()(3).shape
    torch.Size([3])
    """

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` independent times."""
        return torch.rand(batch, device=device, generator=generator)


@dataclass(frozen=True)
class LogitNormal:
    """``t = sigmoid(mean + std z)``, ``z ~ N(0, 1)``: more weight on the middle times.

    Source: Esser et al., *Scaling Rectified Flow Transformers*, 2024 (arXiv 2403.03206),
    section 3.1. There ``t = 1`` is noise: a positive ``mean`` here leans to the data.

    >>> LogitNormal(mean=0.0, std=1.0)(3).shape
    torch.Size([3])
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.std, "std")

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` independent times."""
        z = torch.randn(batch, device=device, generator=generator)
        return torch.sigmoid(self.mean + self.std * z)


@dataclass(frozen=True)
class Beta:
    """``t ~ Beta(a, b)``, with density proportional to ``t^(a−1) (1−t)^(b−1)``.

    >>> Beta(a=2.0, b=1.0)(3).shape
    torch.Size([3])
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        check_positive(self.a, "a")
        check_positive(self.b, "b")

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` independent times."""
        # torch.distributions takes no generator; its sampler underneath does. In float64
        # the smallest gamma draws of small a, b do not vanish together.
        shape = torch.tensor([[self.a], [self.b]], dtype=torch.float64, device=device)
        gamma = torch._standard_gamma(shape.expand(2, batch).contiguous(), generator=generator)
        return (gamma[0] / gamma.sum(0)).float()


@dataclass(frozen=True)
class Stratified:
    """One uniform time from each of ``batch`` equal slices of [0, 1), in random order.

    Every time alone is still ``U[0, 1)``, but a batch covers the interval evenly, which lowers
    the variance of the loss for free. Under ``torch.distributed`` the slices are those of the
    global batch (of equal batches on every rank), rank ``r`` of ``W`` taking every ``W``-th one.

    >>> t = Stratified()(4, generator=torch.Generator().manual_seed(0))
    >>> (t.sort().values * 4).floor()
    tensor([0., 1., 2., 3.])
    """

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` times, one a slice."""
        check_at_least(batch, 0, "batch")
        rank, world = place()
        index = torch.randperm(batch, device=device, generator=generator) * world + rank
        offset = torch.rand(batch, device=device, generator=generator)
        t = (index.double() + offset) / (batch * world)
        # rounding to float32 may reach 1, which U[0, 1) does not
        return t.float().clamp_max(1 - torch.finfo(torch.float32).eps / 2)
