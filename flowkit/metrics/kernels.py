"""Distances by a kernel: the squared maximum mean discrepancy (MMD), KID, CMMD, energy distance."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_between
from flowkit.metrics.frechet import as_features
from flowkit.metrics.intervals import Interval, Strata, both_strata, jackknife

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Maps rows ``a (n, F)`` and ``b (m, F)`` to their kernels ``(n, m)``."""


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """Return the kernel ``(xᵀy / F + 1)³`` of KID."""
    return (a @ b.T / b.shape[1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """Return the kernel ``exp(−‖x − y‖² / (2 · 10²))`` of CMMD."""
    return (torch.cdist(a, b).square() / (-2 * 10.0**2)).exp()


def minus_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the kernel ``−‖x − y‖`` of the energy distance."""
    # Without this mode cdist expands the square, which loses half of the digits of small distances.
    return -torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


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
    a: Tensor,
    b: Tensor,
    *,
    kernel: Kernel = cubic,
    strata: Strata | None = None,
    confidence: float = 0.95,
) -> tuple[float, Interval]:
    """Squared MMD of two populations, and its confidence interval.

    The kernel is that of `kid`, or another one of ``flowkit.metrics.kernels``: `gaussian` gives a
    thousandth of CMMD, `minus_distance` the energy distance ``2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖``.

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
        kernel: The kernel.
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
    between = _mean_kernel(kernel, a, b)
    squared, changes = -2 * between[0].mean(), []
    for x, stratum, across in zip((a, b), numbers, between, strict=True):
        sizes, within = stratum.bincount().double(), _mean_kernel(kernel, x, x)[0]
        own = within.clone()  # the mean kernel with the own class
        for h in range(len(sizes) if len(sizes) > 1 else 0):
            own[stratum == h] = _mean_kernel(kernel, x[stratum == h], x[stratum == h])[0]
        # The squared norm of a sample in the space of the kernel, centered on its class.
        norms = _diagonal(kernel, x) - 2 * own + _means(own, stratum)[stratum]
        slope = 2 * (within - across)
        slope -= _means(slope, stratum)[stratum]
        weight = (sizes / (len(x) * (sizes - 1)))[stratum]
        changes.append(weight * (weight * norms - slope))
        squared += within.mean()
    return jackknife(squared.item(), changes, numbers, confidence)


def energy_distance(a: Tensor, b: Tensor, *, confidence: float = 0.95) -> tuple[float, Interval]:
    """Energy distance ``2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖`` of points, without bias.

    It is 0 only for equal populations. The estimate may be negative for them. The interval is that
    of `kernel_distance`. At a nominal coverage of 95 % it contained the true value in 93 to 96 % of
    300 to 400 draws each for different Gaussians in one and two dimensions and 200 or 500 points;
    for equal ones in 88 to 97 % (one to eight dimensions, 200 to 1000 points).

    Source: Székely & Rizzo 2013, *Energy statistics: a class of statistics based on distances*.

    Args:
        a: Points ``(N, *)``; each point is flattened.
        b: Points ``(M, *)``; each point is flattened.
        confidence: Nominal coverage in (0, 1).

    Returns:
        The estimate in the unit of the points, and the interval, which contains it.

    Raises:
        ValueError: As for `kernel_distance`.

    >>> a = torch.tensor([[0.0], [2.0]])      # 2 · 10 − 2 − 2
    >>> round(energy_distance(a, a + 10)[0], 6)
    16.0
    """
    sets = (x.flatten(1) for x in (a, b))
    return kernel_distance(*sets, kernel=minus_distance, confidence=confidence)


def _means(values: Tensor, strata: Tensor) -> Tensor:
    """Return the means ``(K,)`` of values ``(N,)`` in the strata."""
    return values.new_zeros(int(strata.max()) + 1).index_add_(0, strata, values) / strata.bincount()


def _diagonal(kernel: Kernel, x: Tensor) -> Tensor:
    """Return the kernels ``(N,)`` of each sample with itself."""
    return torch.stack([kernel(row, row)[0, 0] for row in x.split(1)])


def _mean_kernel(kernel: Kernel, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean kernels of each ``a (N, F)`` with all ``b (M, F)``, and the reverse."""
    of_a, of_b = [], b.new_zeros(len(b))
    for part in a.split(1000):
        values = kernel(part, b)
        of_a.append(values.mean(1))
        of_b += values.sum(0) / len(a)
    return torch.cat(of_a), of_b


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD: 1000 times the squared MMD with the kernel `gaussian`.

    It is the biased estimate, the mean kernel over all pairs, as its authors publish. The name is
    for image embeddings of CLIP of length 1: then the bias at ``N`` samples of each set is below
    ``40 / N``. `kernel_distance` gives the estimate without bias, and an interval.

    Source: Jayasumana et al. 2024, *Rethinking FID* (arXiv 2401.09603); Gretton et al. 2012,
    *A kernel two-sample test*, equation 5.

    Args:
        a: Features ``(N, F)``.
        b: Features ``(M, F)``.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: If the shapes differ, a set has fewer than 2 samples or a value is not finite.

    >>> a = torch.eye(4)
    >>> cmmd(a, a), round(cmmd(a, -a), 4)
    (0.0, 9.9008)
    """
    a, b = as_features(a=a, b=b)
    pairs = ((a, a, 1), (b, b, 1), (a, b, -2))
    means = [sign * _mean_kernel(gaussian, x, y)[0].mean().item() for x, y, sign in pairs]
    return 1000 * max(sum(means), 0.0)
