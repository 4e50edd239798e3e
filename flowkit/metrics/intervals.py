"""Confidence intervals of metrics: what the number of samples leaves open."""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import as_labels

Strata = tuple[Tensor | None, Tensor | None]
"""Classes of two sets. The count of each class is fixed; None means independent draws."""


class Interval(NamedTuple):
    """Confidence interval ``[low, high]``."""

    low: float
    high: float


def check_confidence(confidence: float) -> None:
    """Require a confidence strictly between 0 and 1.

    Raises:
        ValueError: If the confidence is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")


def normal_quantile(confidence: float) -> float:
    """Return ``z`` so that a standard normal number lies in ``[-z, z]`` with this probability.

    >>> round(normal_quantile(0.95), 4)
    1.96
    """
    check_confidence(confidence)
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson(share: float, count: float, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share of ``count`` independent cases.

    It holds all ``p`` with ``(share − p)² <= z² p (1 − p) / count``. If all cases agree, its width
    is positive; the width of a bootstrap interval would be 0. If the cases come in fixed numbers
    per class, the interval is rather too wide.

    Source: Wilson 1927, *Probable inference, the law of succession, and statistical inference*.

    >>> [round(end, 4) for end in wilson(0.8, 10)]
    [0.4902, 0.9433]
    """
    square = normal_quantile(confidence) ** 2 / count
    center = (share + square / 2) / (1 + square)
    reach = (square * share * (1 - share) + square**2 / 4) ** 0.5 / (1 + square)
    # At 0 and 1 round-off would leave out the share itself.
    return Interval(min(max(center - reach, 0.0), share), max(min(center + reach, 1.0), share))


def share_interval(share: float, std: float, count: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share with a known standard deviation.

    The share counts as that of ``p (1 − p) / std²`` independent cases, but of no more than the
    ``count`` samples: near 0 and 1 an estimate of ``std`` may be 0 by chance. Here ``p`` is the
    share with two more cases of each kind, since ``share (1 − share)`` may be 0 by chance, too.

    Sources: Korn & Graubard 1998, *Confidence intervals for proportions with small expected number
    of positive counts estimated from survey data*, for the number of cases; Agresti & Coull 1998,
    *Approximate is better than "exact" for interval estimation of binomial proportions*, for ``p``.

    >>> share_interval(0.5, 0.1, 100) == wilson(0.5, 25)
    True
    """
    near = (share * count + 2) / (count + 4)
    cases = near * (1 - near) / std**2 if std > 0 else count
    return wilson(share, min(cases, count), confidence)


def as_strata(labels: Tensor | None, count: int, name: str) -> Tensor:
    """Number the strata of ``count`` samples from 0. Without labels all are in one stratum.

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If there is not one label per sample, or a class has only one sample.
    """
    if labels is None:
        return torch.zeros(count, dtype=torch.int64)
    if labels.shape != (count,):
        raise ValueError(f"strata of {name} must have shape ({count},), got {tuple(labels.shape)}")
    classes, strata, sizes = as_labels(labels.cpu(), f"strata of {name}").unique(
        return_inverse=True, return_counts=True
    )
    if int(sizes.min()) < 2:
        raise ValueError(
            f"strata of {name} must hold at least 2 samples of each class, got one of class "
            f"{int(classes[sizes.argmin()])}; None is for independent draws"
        )
    return strata


def both_strata(strata: Strata | None, sets: dict[str, Tensor]) -> list[Tensor]:
    """Number the strata of two named sets, see `as_strata`.

    Raises:
        TypeError: If ``strata`` is not a pair, or holds labels that are not integers.
        ValueError: As for `as_strata`.
    """
    if strata is not None and (not isinstance(strata, Sequence) or len(strata) != 2):
        raise TypeError(
            f"strata must be the labels of both sets, got {type(strata).__name__}; None in place "
            "of labels is for independent draws"
        )
    pairs = zip(sets.items(), strata or (None, None), strict=False)  # of one set: the first labels
    return [as_strata(labels, len(x), name) for (name, x), labels in pairs]


def jackknife(
    value: float,
    changes: Sequence[Tensor],
    strata: Sequence[Tensor],
    confidence: float,
    rest: float = 0.0,
) -> tuple[float, Interval]:
    r"""Correct the bias of a squared distance ``D``, and give its interval.

    ``changes`` holds the differences ``D₍₋ᵢ₎ − D`` without one sample, where the other samples of
    the stratum ``h`` share its weight. With strata of ``n_h`` samples, and sums over both sets,

    * bias ``B = Σ_h (n_h − 1) mean_h(change)``; the estimate is ``T = D − B``;
    * variance ``V = Σ_h (n_h − 1)² / n_h · var_h(change)``, with the unbiased variance in ``h``.

    Near ``D = 0`` the distance is a quadratic form: its linear part vanishes, and ``V`` is twice
    the variance of ``T`` (Efron & Stein). Then ``V / (T + B)`` is still the ratio ``r`` of variance
    and distance, and the variance at a true distance ``δ`` is about ``r (max(δ, 0) + B / 2)``: half
    of ``V`` at ``T = 0``, and ``V`` if ``T`` is large. The interval has all ``δ`` with
    ``(T − δ)² <= z² r (max(δ, 0) + B / 2)``, as Wilson's interval of a proportion does.

    Sources: Quenouille 1956, *Notes on bias in estimation*; Jones 1974, *Jackknife estimation of
    functions of stratum means*; Efron & Stein 1981, *The jackknife estimate of variance*. The
    interval is ours.

    Args:
        value: The distance ``D`` of the samples.
        changes: For each set the differences ``(N,)``.
        strata: For each set the numbers ``(N,)`` of the strata, see `as_strata`.
        confidence: Nominal coverage in (0, 1).
        rest: A part of the bias that the jackknife does not see.

    Returns:
        The estimate, which may be negative, and its interval, which contains it.
    """
    z = normal_quantile(confidence)
    bias, variance = rest, 0.0
    for change, stratum in zip(changes, strata, strict=True):
        for h in range(int(stratum.max()) + 1):
            part = change[stratum == h]
            count = len(part)
            bias += (count - 1) * part.mean().item()
            variance += (count - 1) ** 2 / count * part.var().item()
    estimate, bias = value - bias, max(bias, 0.0)
    # Below 1 % of the bias the value is no draw of a quadratic form: the sets are the same samples.
    scale = max(value, bias / 100)
    ratio = variance / scale if scale > 0 else 0.0
    at_zero = z * (ratio * bias / 2) ** 0.5
    shift = z**2 * ratio / 2
    reach = max(z**2 * ratio * (estimate + bias / 2) + shift**2, 0.0) ** 0.5
    low, high = max(at_zero, reach - shift), max(at_zero, reach + shift)
    return estimate, Interval(estimate - low, estimate + high)


def half_sampling(
    measure: Callable[..., Tensor],
    strata: Sequence[Tensor],
    draws: int = 50,
    largest: int = 2000,
    fewest: int = 1,
) -> Tensor:
    """Standard deviations of metrics over draws of the data, from random halves of the samples.

    A bootstrap repeats samples. A repeated sample is its own nearest neighbor, which breaks metrics
    of neighbors. A half has no repeated samples, and for many kinds of metrics its values vary
    around their mean with the same standard deviation as those of all samples around theirs. A half
    takes every second sample of each class. Of more than ``2 · largest`` samples it takes one in
    ``s``, at most ``largest``, and divides the variance by ``s − 1``. The halves are always the
    same, so that records repeat.

    Source: Shao & Wu 1989, *A general theory for jackknife variance estimation* (delete-d).

    Args:
        measure: Maps rows of each set to the metrics ``(V,)``.
        strata: For each set the numbers ``(N,)`` of the strata, see `as_strata`.
        draws: Number of halves.
        largest: Largest number of samples in a half, where ``fewest`` allows it.
        fewest: Fewest samples in a half of any set; at most half of the smallest set.

    Returns:
        Standard deviations ``(V,)``.

    >>> x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    >>> std = half_sampling(lambda rows: x[rows].mean()[None], [as_strata(None, 400, "x")])
    >>> 0.04 < std.item() < 0.06           # 1 / √400
    True
    """
    generator = torch.Generator().manual_seed(0)
    counts = [len(labels) for labels in strata]
    skip = max(2, min(-(-max(counts) // largest), min(counts) // fewest))

    def some(labels: Tensor) -> Tensor:
        keys = labels + 0.5 * torch.rand(len(labels), generator=generator, dtype=torch.float64)
        first = int(torch.randint(skip, (1,), generator=generator))
        return keys.argsort()[first::skip]

    values = torch.stack([measure(*map(some, strata)) for _ in range(draws)]).double()
    return (values.var(0) / (skip - 1)).sqrt()


def around(
    value: float,
    std: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
    freedom: int = 49,
) -> Interval:
    """Interval of Student's t around a value, clipped to the range of the metric.

    >>> [round(end, 2) for end in around(0.98, 0.02)]
    [0.94, 1.0]
    """
    from scipy.stats import t as student

    reach = float(student.ppf((1 + confidence) / 2, freedom)) * std
    return Interval(max(value - reach, bounds[0]), min(value + reach, bounds[1]))
