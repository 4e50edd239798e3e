"""Confidence intervals for a statistic of finite samples."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def check_confidence(confidence: float) -> None:
    """Require a confidence strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")


def bootstrap(
    statistic: Callable[..., float | Tensor],
    *samples: Tensor,
    rounds: int = 1000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    r"""Basic bootstrap interval of ``statistic(*samples)``.

    With the estimate ``s`` and quantiles ``q`` of the statistic on resamples, the interval is
    ``(2 s - q_high, 2 s - q_low)``. It covers the statistic of the *population*: a bias of the
    estimate repeats in the resamples and is thereby subtracted. The percentile interval
    ``(q_low, q_high)`` adds that bias a second time: near equal populations, it never held the true
    Fréchet distance in 60 draws of 500 samples with 8 features, where the basic one held it in
    98 % or more.

    Samples are resampled independently of each other along their first dimension; pairs belong
    into one tensor. The cost is ``rounds`` evaluations; for Fréchet distances `frechet_unbiased`
    does the same work with 40.

    Source: Davison & Hinkley 1997, *Bootstrap Methods and their Application*, equation 5.6.

    Args:
        statistic: Maps tensors ``(N, *)``, one per sample, to a number.
        samples: Tensors ``(N, *)``, of any sizes.
        rounds: Number of resamples.
        confidence: Nominal coverage in (0, 1).
        generator: Source of the resampling; on the CPU.

    Returns:
        The interval, not clipped: for a non-negative quantity ``low`` may fall below 0.

    Raises:
        ValueError: If there are no samples, or ``rounds`` or ``confidence`` is out of range.

    >>> g = torch.Generator().manual_seed(0)
    >>> x = torch.randn(400, generator=g)
    >>> low, high = bootstrap(torch.mean, x, generator=g)
    >>> low < 0 < high, round(high - low, 2)   # 2 · 1.96 / √400 = 0.2
    (True, 0.2)
    """
    if not samples or any(sample.ndim == 0 or len(sample) == 0 for sample in samples):
        raise ValueError(f"samples must hold non-empty tensors (N, *), got {len(samples)} samples")
    check_at_least(rounds, 2, "rounds")
    check_confidence(confidence)
    values = torch.empty(rounds, dtype=torch.float64)
    for r in range(rounds):
        rows = [torch.randint(len(s), (len(s),), generator=generator) for s in samples]
        values[r] = float(
            statistic(*(s[i.to(s.device)] for s, i in zip(samples, rows, strict=True)))
        )
    estimate = float(statistic(*samples))
    tail = (1 - confidence) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return Interval(2 * estimate - high, 2 * estimate - low)
