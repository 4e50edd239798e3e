"""Fréchet distance at infinitely many samples, extrapolated from subsets."""

import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics.frechet import Gaussian, as_features, gaussian_distance
from flowkit.metrics.intervals import Interval, normal_quantile
from flowkit.metrics.statistics import Statistics
from flowkit.metrics.unbiased import frechet_unbiased

LARGEST = 10  # parts of the samples


def frechet_infinity(
    a: Tensor,
    b: Tensor | Statistics,
    *,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> tuple[float, Interval]:
    r"""Squared Fréchet distance for infinitely many samples (FD∞), and its confidence interval.

    `frechet_distance` of ``n`` samples is too large by about ``c / n``. The samples are divided at
    random into ``k`` parts, for ``k = 1 … K``, and the distance is averaged over the parts of
    ``n = N / k`` samples. A line over ``1 / n`` is fitted; its value at 0 is the estimate. ``b`` is
    divided in the same way. Statistics in the place of ``b`` count as those of the population, as
    published reference statistics do.

    The source takes one random subset at each of 15 sizes. Parts use each sample at each size, so
    chance enters all distances alike: for 8 to 64 features and 400 to 640 samples the standard
    deviation was 0.55 to 0.95 of that of the source's subsets. ``K`` is at most 10, and parts have
    at least ``4 F`` samples (two parts ``2 F``), since the bias is no line below.

    The interval has the width of that of `frechet_unbiased`, plus the error of the line. It is for
    the distance of the populations.

    Source: Chong & Forsyth 2020, *Effectively unbiased FID and Inception score and where to find
    them* (arXiv 1911.07023).

    Args:
        a: Features ``(N, F)``, ``N >= 4 F``.
        b: Features ``(M, F)``, ``M >= 4 F``, or statistics.
        confidence: Nominal coverage in (0, 1).
        generator: Draws the parts; on the CPU.

    Returns:
        The estimate, which may be negative, and the interval, which contains it.

    Raises:
        ValueError: If a shape is wrong, a value is not finite, or there are too few samples.

    >>> g = torch.Generator().manual_seed(0)
    >>> a, b = torch.randn(2, 400, 8, generator=g)
    >>> value, (low, high) = frechet_infinity(a, b + 1, generator=g)
    >>> low < 8 < high
    True
    """
    features = {"a": a} if isinstance(b, Statistics) else {"a": a, "b": b}
    sets = as_features(**features)
    for name, x in zip(features, sets, strict=True):
        check_at_least(len(x), 4 * x.shape[1], f"the number of samples of {name}")
    center, (low, high) = frechet_unbiased(a, b, confidence=confidence)
    shuffled = [x[torch.randperm(len(x), generator=generator)] for x in sets]
    count, width = min(map(len, sets)), a.shape[1]
    numbers = torch.arange(1, max(2, min(LARGEST, count // (4 * width))) + 1)
    distances = []
    for k in numbers.tolist():
        fits = [[Gaussian.fit(part) for part in x.tensor_split(k)] for x in shuffled]
        if isinstance(b, Statistics):
            fits.append([Gaussian(b.mean, b.cov)] * k)
        pairs = zip(*fits, strict=True)
        distances.append(sum(gaussian_distance(*pair) for pair in pairs) / k)
    value, error = _at_zero(numbers.double(), torch.tensor(distances, dtype=torch.float64))
    reach = normal_quantile(confidence) * error
    below, above = (((end - center) ** 2 + reach**2) ** 0.5 for end in (low, high))
    return value, Interval(value - below, value + above)


def _at_zero(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the value at 0 of the line through ``(x, y)``, and its standard error."""
    design = torch.stack([torch.ones_like(x), x], 1)
    inverse = torch.linalg.inv(design.T @ design)
    line = inverse @ design.T @ y
    freedom = max(len(x) - 2, 1)  # two points leave no residuals
    variance = (y - design @ line).square().sum() / freedom * inverse[0, 0]
    return line[0].item(), variance.sqrt().item()
