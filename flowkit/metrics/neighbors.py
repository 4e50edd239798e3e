"""Distances of two sets of features: precision, recall, density, coverage, kernel distance."""

from functools import partial
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_between, check_finite
from flowkit.metrics.frechet import as_features
from flowkit.metrics.intervals import (
    Interval,
    Strata,
    around,
    both_strata,
    half_sampling,
    jackknife,
    share_interval,
)


class PRDC(NamedTuple):
    """Result of `prdc`: fidelity (precision, density) and diversity (recall, coverage)."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Tensor, fake: Tensor, k: int = 5) -> PRDC:
    """Precision, recall, density and coverage of generated features.

    ``B(x)`` is the open ball around a sample ``x``. Its radius is the distance to the k-th nearest
    neighbor of ``x`` in the set of ``x``. Then:

    * precision: share of fake samples in at least one ball ``B(real)``;
    * recall: share of real samples in at least one ball ``B(fake)``;
    * density: number of balls ``B(real)`` around a fake sample, divided by ``k``, averaged over the
      fake samples;
    * coverage: share of balls ``B(real)`` that hold a fake sample.

    All values depend on ``N`` and ``M``: compare them at equal numbers of samples. For equal
    populations the expected density is 1, and with ``N = M`` the coverage is near ``1 − 2⁻ᵏ``.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2; Naeem et al. 2020
    (arXiv 2002.09797), section 3. Here the balls are open for all four values, so the density of a
    set against itself is 1. This makes a difference only for equal distances.

    Args:
        real: Features ``(N, F)`` of real samples.
        fake: Features ``(M, F)`` of generated samples.
        k: Number of the neighbor that defines the radius; at least 1, below ``N`` and ``M``.

    Returns:
        The four values: the density in [0, N/k], the others in [0, 1].

    Raises:
        ValueError: If the shapes differ, a value is not finite or ``k`` is out of range.

    >>> real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> prdc(real, torch.tensor([[0.5], [0.6], [9.0]]), k=1)
    PRDC(precision=0.66..., recall=0.75, density=1.33..., coverage=0.5)
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"fake must have shape (M, F) beside real {tuple(real.shape)}, got {tuple(fake.shape)}"
        )
    check_finite(real, "real")
    check_finite(fake, "fake")
    check_between(k, 1, min(len(real), len(fake)) - 1, "k")
    center = real.double().mean(0)  # reduces the rounding error of ‖x‖² + ‖y‖² − 2 xᵀy
    real, fake = real.double() - center, fake.double() - center
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)
    balls = torch.zeros(len(fake), device=real.device)
    recalled = covered = 0
    for rows, radius in zip(real.split(1000), real_radius.split(1000), strict=True):
        distance = torch.cdist(rows, fake)
        inside = distance < radius[:, None]
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distance < fake_radius).any(1).sum())
    return PRDC(
        precision=(balls > 0).double().mean().item(),
        recall=recalled / len(real),
        density=balls.double().mean().item() / k,
        coverage=covered / len(real),
    )


def prdc_intervals(
    real: Tensor,
    fake: Tensor,
    k: int = 5,
    *,
    strata: Strata | None = None,
    confidence: float = 0.95,
) -> tuple[PRDC, dict[str, Interval]]:
    """Precision, recall, density and coverage with confidence intervals.

    The values depend on the numbers of samples. An interval is for the mean of the value over draws
    of these numbers of samples. The standard deviations come from 50 random halves, see
    `flowkit.metrics.intervals.half_sampling`, and the intervals of shares from
    `flowkit.metrics.intervals.share_interval`. At a nominal coverage of 95 % the
    intervals contained the mean in 89 to 100 % of 200 draws each, for mixtures of Gaussians with 2
    to 16 features and 150 to 300 samples.

    Args:
        real: Features ``(N, F)`` of real samples.
        fake: Features ``(M, F)`` of generated samples.
        k: See `prdc`; below a quarter of ``N`` and of ``M``.
        strata: Classes ``(N,)`` and ``(M,)``, see `frechet_unbiased`.
        confidence: Nominal coverage in (0, 1).

    Returns:
        The values, and the interval of each name.

    Raises:
        ValueError: As for `prdc`, or if a class has only one sample.

    >>> g = torch.Generator().manual_seed(0)
    >>> found, intervals = prdc_intervals(*torch.randn(2, 200, 4, generator=g))
    >>> found.recall, [round(end, 3) for end in intervals["recall"]]
    (0.96, [0.893, 0.986])
    """
    found = prdc(real, fake, k)
    check_between(k, 1, min(len(real), len(fake)) // 4, "k")
    numbers = both_strata(strata, {"real": real, "fake": fake})
    half = partial(_some_prdc, real, fake, k)
    stds = PRDC(*half_sampling(half, numbers, fewest=2 * k).tolist())
    intervals = {"density": around(found.density, stds.density, (0.0, inf), confidence)}
    for name, count in (("precision", len(fake)), ("recall", len(real)), ("coverage", len(real))):
        share, std = getattr(found, name), getattr(stds, name)
        intervals[name] = share_interval(share, std, count, confidence)
    return found, intervals


def _some_prdc(real: Tensor, fake: Tensor, k: int, rows: Tensor, fake_rows: Tensor) -> Tensor:
    """Return the four values ``(4,)`` for some of the samples."""
    return torch.tensor(prdc(real[rows.to(real.device)], fake[fake_rows.to(fake.device)], k))


def _radii(x: Tensor, k: int) -> Tensor:
    """Return the distances ``(N,)`` of points to their k-th nearest other point."""
    # k + 1, since the smallest distance in a row is that of the point to itself.
    return torch.cat([torch.cdist(rows, x).kthvalue(k + 1).values for rows in x.split(1000)])


class KernelDistance(NamedTuple):
    """Result of `kid`: mean and standard deviation over random subsets."""

    mean: float
    std: float


def kid(
    a: Tensor,
    b: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """Kernel distance: unbiased squared MMD with the kernel ``(xᵀy / F + 1)³``.

    The maximum mean discrepancy (MMD) is averaged over random subsets. It has no bias at any number
    of samples, so the value may be negative for equal populations. With the features of
    `inception` it is the kernel Inception distance (KID).

    Source: Bińkowski et al. 2018 (arXiv 1801.01401); computed by ``poly_mmd`` of torchmetrics, in
    float64.

    Args:
        a: Features ``(N, F)``.
        b: Features ``(M, F)``.
        subsets: Number of random subsets.
        subset_size: Samples of each set in a subset, drawn without replacement.
        generator: Draws the subsets; on the CPU.

    Returns:
        Mean and standard deviation of the values of the subsets. The subsets overlap, so the
        standard deviation is no estimate of the error of the mean.

    Raises:
        ValueError: If the shapes differ, ``subsets`` is below 1, or ``subset_size`` is not in
            [2, min(N, M)].

    >>> g = torch.Generator().manual_seed(0)
    >>> a, b = torch.randn(2, 500, 8, generator=g)
    >>> abs(kid(a, b, 10, 200, g).mean) < 0.01 < kid(a, b + 1, 10, 200, g).mean
    True
    """
    from torchmetrics.image.kid import poly_mmd

    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"b must have shape (M, F) beside a {tuple(a.shape)}, got {tuple(b.shape)}"
        )
    check_at_least(subsets, 1, "subsets")
    check_between(subset_size, 2, min(len(a), len(b)), "subset_size")
    a, b = a.double(), b.double()
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        rows_a = torch.randperm(len(a), generator=generator)[:subset_size].to(a.device)
        rows_b = torch.randperm(len(b), generator=generator)[:subset_size].to(b.device)
        values[i] = poly_mmd(a[rows_a], b[rows_b])
    return KernelDistance(values.mean().item(), values.std(correction=0).item())


def kernel_distance(
    a: Tensor, b: Tensor, *, strata: Strata | None = None, confidence: float = 0.95
) -> tuple[float, Interval]:
    """Squared MMD of two populations with the kernel of `kid`, and its confidence interval.

    With independent draws the value is the mean of `kid` over all subsets. With ``strata`` the
    number of samples of each class is fixed, and pairs of the same sample weigh less; see
    `frechet_unbiased`. Bias and interval are those of `flowkit.metrics.intervals.jackknife`. The
    distance is quadratic, so the bias is removed exactly. The cost is ``(N + M)² F``.

    At a nominal coverage of 95 % the interval contained the true value in 92 to 98 % of 400 draws
    each, for mixtures of Gaussians with 4 and 8 features and 180 to 1000 samples, independent,
    stratified and half-stratified.

    Args:
        a: Features ``(N, F)``.
        b: Features ``(M, F)``.
        strata: Classes ``(N,)`` and ``(M,)``, see `frechet_unbiased`.
        confidence: Nominal coverage in (0, 1).

    Returns:
        The estimate, which may be negative, and the interval, which contains it.

    Raises:
        ValueError: If the shapes differ, a set has fewer than 2 samples, a value is not finite, or
            a class has only one sample.

    >>> g = torch.Generator().manual_seed(0)
    >>> a, b = torch.randn(2, 500, 8, generator=g)
    >>> value, (low, high) = kernel_distance(a, b)
    >>> low < 0 < high < kernel_distance(a, b + 1)[1].low
    True
    """
    a, b = as_features(a=a, b=b)
    numbers = both_strata(strata, {"a": a, "b": b})
    between = _mean_kernel(a, b)
    squared, changes = -2 * between[0].mean(), []
    for x, stratum, across in zip((a, b), numbers, between, strict=True):
        sizes, within = stratum.bincount().double(), _mean_kernel(x, x)[0]
        own = within.clone()  # the mean kernel with the own class
        for h in range(len(sizes) if len(sizes) > 1 else 0):
            own[stratum == h] = _mean_kernel(x[stratum == h], x[stratum == h])[0]
        # The squared norm of a sample in the space of the kernel, centered on its class.
        norms = (x.square().mean(1) + 1) ** 3 - 2 * own + _means(own, stratum)[stratum]
        slope = 2 * (within - across)
        slope -= _means(slope, stratum)[stratum]
        weight = (sizes / (len(x) * (sizes - 1)))[stratum]
        changes.append(weight * (weight * norms - slope))
        squared += within.mean()
    return jackknife(squared.item(), changes, numbers, confidence)


def _means(values: Tensor, strata: Tensor) -> Tensor:
    """Return the means ``(K,)`` of values ``(N,)`` in the strata."""
    return values.new_zeros(int(strata.max()) + 1).index_add_(0, strata, values) / strata.bincount()


def _mean_kernel(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean kernels of each ``a (N, F)`` with all ``b (M, F)``, and the reverse."""
    of_a, of_b = [], b.new_zeros(len(b))
    for part in a.split(1000):
        kernel = (part @ b.T / b.shape[1] + 1) ** 3
        of_a.append(kernel.mean(1))
        of_b += kernel.sum(0) / len(a)
    return torch.cat(of_a), of_b
