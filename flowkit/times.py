"""Distributions of training times: the law of ``t`` in [0, 1] for a training batch.

Each distribution is a callable ``times(batch, device=None, generator=None) -> (batch,)`` of float32
values, whatever torch's default type is. The values lie within [2⁻²⁴, 1 − 2⁻²⁴]. So no draw is
rounded to an end of [0, 1], where the velocity of some paths is unbounded.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_between, check_number, check_positive
from flowkit.distributed import place

Device = torch.device | str | None


@runtime_checkable
class Times(Protocol):
    """Protocol of a distribution of training times."""

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return ``batch`` times in [0, 1]."""
        ...


SMALLEST = 2.0**-24  # 1 − SMALLEST is the largest float32 below 1


def _uniform(batch: int, device: Device, generator: torch.Generator | None) -> Tensor:
    """Draw from ``U[0, 1)`` in float32; a trainer may have made another type the default."""
    return torch.rand(batch, dtype=torch.float32, device=device, generator=generator)


def inside(t: Tensor) -> Tensor:
    """Move float32 times that were rounded to an end of [0, 1] to the nearest time inside."""
    return t.clamp_(SMALLEST, 1 - SMALLEST)


@dataclass(frozen=True)
class Uniform:
    """Uniform times ``t ~ U[0, 1]``, the published distribution of the flow-matching loss.

    >>> Uniform()(3).shape
    torch.Size([3])
    """

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` independent times."""
        return inside(_uniform(batch, device, generator))


@dataclass(frozen=True)
class LogitNormal:
    """Logit-normal times ``t = sigmoid(mean + std z)``, ``z ~ N(0, 1)``: most weight in the middle.

    Args:
        mean: Mean of the logit, finite. A positive value moves times to the data.
        std: Standard deviation of the logit, positive.

    Raises:
        ValueError: If ``mean`` is not finite, or ``std`` not positive and finite.

    Source: Esser et al., *Scaling Rectified Flow Transformers*, 2024 (arXiv 2403.03206), section
    3.1. In the paper ``t = 1`` is noise, so the sign of ``mean`` is the opposite.

    >>> LogitNormal(mean=0.0, std=1.0)(3).shape
    torch.Size([3])
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_number(self.mean, "mean")
        check_positive(self.std, "std")

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` independent times."""
        z = torch.randn(batch, dtype=torch.float32, device=device, generator=generator)
        return inside(torch.sigmoid(self.mean + self.std * z))


@dataclass(frozen=True)
class Beta:
    """Beta times ``t = scale · x``, ``x ~ Beta(a, b)``, or ``t = scale · (1 − x)`` if reversed.

    The density of ``x`` is proportional to ``x^(a−1) (1−x)^(b−1)``.

    Args:
        a: Positive. A large value moves times to the data, reversed to the noise.
        b: Positive. A large value moves times to the noise, reversed to the data.
        scale: The latest time, in (0, 1].
        reverse: Whether to take ``1 − x``.

    Raises:
        ValueError: If ``a`` or ``b`` is not positive and finite, or ``scale`` not in (0, 1].

    Source: ``Beta(1.5, 1.0, scale=0.999, reverse=True)`` are the times of action chunks in Black et
    al., *π0: A Vision-Language-Action Flow Model for General Robot Control*, 2024 (arXiv
    2410.24164), appendix B, and of Routray et al., *ViPRA*, 2025 (arXiv 2511.07732). Their mean is
    0.3996: most weight lies near the noise.

    >>> Beta(a=2.0, b=1.0)(3).shape
    torch.Size([3])
    >>> bool(Beta(1.5, 1.0, scale=0.5, reverse=True)(100).max() <= 0.5)
    True
    """

    a: float
    b: float
    scale: float = 1.0
    reverse: bool = False

    def __post_init__(self) -> None:
        check_positive(self.a, "a")
        check_positive(self.b, "b")
        check_positive(self.scale, "scale")
        check_between(self.scale, 0, 1, "scale")

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` independent times."""
        # t = x / (x + y) for x ~ Gamma(a), y ~ Gamma(b). Both would underflow for small a and b, so
        # their logarithms are drawn: Gamma(a) has the law of Gamma(a + 1) U^(1/a).
        shape = torch.tensor([[self.a], [self.b]], dtype=torch.float32, device=device)
        shape = shape.expand(2, batch).contiguous()
        # torch.distributions accepts no generator, but its internal sampler does.
        log = torch._standard_gamma(shape + 1, generator=generator).log_()
        u = torch.rand(2, batch, dtype=torch.float32, device=device, generator=generator)
        log_x, log_y = log.add_(torch.log1p(-u).div_(shape))
        difference = log_y - log_x if self.reverse else log_x - log_y
        return inside(torch.sigmoid(difference).mul_(self.scale))


@dataclass(frozen=True)
class Stratified:
    """Stratified times: one uniform time from each of ``batch`` equal slices of [0, 1].

    The slices are in random order. Each time alone still has the law ``U[0, 1]``, but the batch
    covers the interval evenly. This reduces the variance of the loss at no cost. Under
    ``torch.distributed``, the slices divide the global batch: rank ``r`` of ``W`` takes every
    ``W``-th slice. All ranks need the same batch size.

    >>> t = Stratified()(4, generator=torch.Generator().manual_seed(0))
    >>> (t.sort().values * 4).floor()
    tensor([0., 1., 2., 3.])
    """

    def __call__(
        self, batch: int, device: Device = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``batch`` times, one per slice.

        Raises:
            ValueError: If ``batch`` is negative.
        """
        check_at_least(batch, 0, "batch")
        rank, world = place()
        index = torch.randperm(batch, device=device, generator=generator) * world + rank
        # An index is exact in float32 up to 2²⁴ slices.
        t = (index.float() + _uniform(batch, device, generator)) / (batch * world)
        return inside(t)
