"""Fréchet distance without bias: the distance for infinitely many samples, with its interval."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowkit.metrics.frechet import (
    Gaussian,
    check_sets,
    covariance_root,
    gaussian_distance,
    gram,
    in_float64,
)
from flowkit.metrics.intervals import Interval, Strata, both_strata, jackknife
from flowkit.metrics.statistics import Statistics


def frechet_unbiased(
    a: Tensor,
    b: Tensor | Statistics,
    *,
    strata: Strata | None = None,
    confidence: float = 0.95,
) -> tuple[float, Interval]:
    r"""Squared Fréchet distance of two populations, without bias, and its confidence interval.

    `frechet_distance` of ``N`` samples is too large by about ``F² / N``. The jackknife leaves out
    one sample at a time and removes this bias. The estimate may be negative if the populations are
    equal. The interval is for the distance of the populations, so it may lie entirely below
    ``frechet_distance(a, b)``. See `flowkit.metrics.intervals.jackknife` for both.

    With fixed numbers of samples per class, as in a stratified test split, the proportions of the
    classes do not vary at random, and the bias is smaller. So give the classes as ``strata``: then
    the other samples of its class take over the weight of a sample that is left out. The
    populations are the classes in the proportions of the samples. For independent draws use None.

    The cost is one decomposition of ``F × F`` per class and set, not per sample. Samples are taken
    in blocks, so that memory holds some matrices ``F × F`` beside the features. With
    ``η = n_h / (N (n_h − 1))``, a sample ``z`` centered on its set and ``d`` centered on its class,
    leaving it out changes the covariance by ``η (P_h − z zᵀ) − η² d dᵀ``, where ``P_h`` is the mean
    of ``z zᵀ`` in the class. The last two terms have rank 2. For ``M = R_bᵀ Σ_a R_b`` the trace
    follows from ``tr M^{1/2} = 1/π ∫₀^∞ log det(1 + M / s²) ds``.

    For unequal numbers of samples the jackknife leaves a part of order ``F³ (1/N − 1/M)²``. It is
    computed from the Marchenko–Pastur law of covariances of Gaussian samples. With a set ten times
    as large as the other, 128 and 256 features and 2 to 4 samples per feature, a fifth to two
    fifths of this correction were missing. So the interval is wider by half of it on each side.
    With equal numbers of samples it is 0.

    At a nominal coverage of 95 % the interval contained the true distance in 92.5 to 98 % of 400
    draws each, for mixtures of 5 and 10 Gaussians with 4 to 32 features and 200 to 1000 samples,
    independent, stratified or half-stratified, equal or different. With less than 3 samples per
    feature (64 features, 128 or 180 against 1000 samples) it was 89 to 97 %.

    Sources: Jones 1974, *Jackknife estimation of functions of stratum means*; Silverstein & Bai
    1995, *On the empirical distribution of eigenvalues of a class of large dimensional random
    matrices*, for the law. The combination is ours.

    Args:
        a: Features ``(N, F)``, ``N >= 2 F``.
        b: Features ``(M, F)``, ``M >= 2 F``; or statistics, which count as those of the population.
        strata: Classes ``(N,)`` of ``a`` and ``(M,)`` of ``b``. The number of samples of each class
            is fixed, and at least 2. None stands for independent draws, of one set or of both.
        confidence: Nominal coverage in (0, 1).

    Returns:
        The estimate and the interval, which always contains the estimate.

    Raises:
        TypeError: If classes are not integers.
        ValueError: If ``confidence`` is out of range, a shape is wrong, a value is not finite,
            there are fewer than ``2 F`` samples, or a class has only one sample.

    >>> g = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(500) % 5
    >>> a, b = torch.randn(2, 500, 8, generator=g) + labels[:, None]
    >>> value, (low, high) = frechet_unbiased(a, b, strata=(labels, labels))
    >>> low < 0 < high, high < 0.1
    (True, True)
    """
    if isinstance(b, Statistics):
        sets = {"a": a}
        check_sets(**sets)
        if a.shape[1] != len(b.mean):
            raise ValueError(f"b must have the {a.shape[1]} features of a, got {len(b.mean)}")
    else:
        sets = {"a": a, "b": b}
        check_sets(**sets)
    for name, x in sets.items():
        if not enough(x):
            raise ValueError(
                f"{name} must have at least 2 samples per feature, got {len(x)} samples of "
                f"{x.shape[1]} features"
            )
    numbers = both_strata(strata, sets)
    fits = [_fit(x) for x in sets.values()]
    counts: list[float] = [len(x) for x in sets.values()]
    if isinstance(b, Statistics):
        fits.append(Gaussian(b.mean, b.cov))
        counts.append(math.inf)
    roots = [_root(fit) for fit in fits]
    gap = fits[0].mean - fits[1].mean
    changes = [
        _changes(x, fit.mean, stratum, sign * gap, root)
        for x, fit, stratum, sign, root in zip(
            sets.values(), fits, numbers, (1, -1), roots[::-1], strict=False
        )
    ]
    rest = _rest(roots[0], roots[1], counts[0], counts[1])
    value, (low, high) = jackknife(gaussian_distance(*fits), changes, numbers, confidence, rest)
    return value, Interval(low - abs(rest) / 2, high + abs(rest) / 2)


def enough(x: Tensor) -> bool:
    """Say whether features ``x (N, F)`` are enough samples for `frechet_unbiased`."""
    return len(x) >= max(2 * x.shape[1], 2)


def _fit(x: Tensor) -> Gaussian:
    """Return the Gaussian of features ``(N, F)`` with the covariance divided by N."""
    fit = Gaussian.fit(x)
    return fit._replace(spread=fit.spread * ((len(x) - 1) / len(x)))


def _root(fit: Gaussian) -> Tensor:
    """Return a root of the covariance with at least one column."""
    root = covariance_root(fit)
    return root if root.shape[1] else root.new_zeros(len(root), 1)


def _changes(x: Tensor, mean: Tensor, strata: Tensor, gap: Tensor, root: Tensor) -> Tensor:
    """Return the changes ``(N,)`` of the distance if a sample is left out.

    Args:
        x: Features ``(N, F)`` of a set.
        mean: Their mean.
        strata: Numbers of their strata.
        gap: Mean of the set minus mean of the other set.
        root: Root ``R`` of the covariance of the other set.
    """

    def centered(rows: Tensor) -> Iterator[Tensor]:
        return (z - mean for z in in_float64(x, rows))

    def rotated_gram(rows: Tensor) -> Tensor:
        zero = root.new_zeros(root.shape[1], root.shape[1])
        return sum((gram((z @ root).T) for z in centered(rows)), start=zero)

    count, whole = len(x), torch.arange(len(x))
    total = rotated_gram(whole)
    product = total / count  # the matrix M
    squares = torch.linalg.eigvalsh(product)
    lowest = len(squares) * torch.finfo(squares.dtype).eps * squares[-1]
    trace = squares[squares > lowest].sqrt().sum()
    changes = root.new_empty(count)
    for h in range(int(strata.max()) + 1):
        rows = (strata == h).nonzero()[:, 0]
        size = len(rows)
        weight = size / (count * (size - 1))
        found = [(z.square().sum(1), z @ gap, z.sum(0)) for z in centered(rows)]
        norms, along = (torch.cat([part[i] for part in found]) for i in (0, 1))
        middle = torch.stack([part[2] for part in found]).sum(0) / size
        # The mean of the set moves by −weight · (z − middle). Its square enters the means and, with
        # the other sign, the covariance.
        of_moments = weight * (norms.mean() - norms - 2 * (along - along.mean()))
        own = total if size == count else rotated_gram(rows)
        left = _Left(product + weight / size * own, root, middle, weight, lowest)
        of_root = torch.cat([left.traces(z) for z in centered(rows)]) - trace
        changes[rows] = of_moments - 2 * of_root
    return changes


class _Left:
    """``tr (C − η y yᵀ − η² d dᵀ)^{1/2}`` for samples ``y = Rᵀ z`` of a class; ``d = y − mean y``.

    The integral of ``log(1 − q)`` is computed as that of ``log(1 − q) + q``, which decreases fast,
    plus a closed form.
    """

    def __init__(
        self, cov: Tensor, root: Tensor, middle: Tensor, weight: float, lowest: Tensor
    ) -> None:
        squares, basis = torch.linalg.eigh(cov)
        kept = squares > lowest  # a direction without spread has no part in the trace
        self.squares, self.turned = squares[kept], root @ basis[:, kept]
        self.middle, self.weight = middle @ self.turned, weight

    def traces(self, z: Tensor) -> Tensor:
        """Return the traces ``(n,)`` of centered samples ``z (n, F)``."""
        if not len(self.squares):
            return z.new_zeros(len(z))
        z = z @ self.turned
        d = self.weight * (z - self.middle)
        z *= self.weight**0.5
        nodes, steps = _nodes(self.squares)
        inverse = 1 / (nodes**2 + self.squares[:, None])
        zz, zd, dd = (z * z) @ inverse, (z * d) @ inverse, (d * d) @ inverse
        # The determinant is 0 if the others do not span the space; round-off makes it negative.
        determinant = ((1 - zz) * (1 - dd) - zd.square()).clamp_min(1e-30)
        roots = self.squares.sqrt()
        linear = (z.square() + d.square()) @ (0.5 / roots)
        return roots.sum() - linear + (determinant.log() + zz + dd) @ steps


def _nodes(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes ``s`` and weights of ``1/π ∫₀^∞ f(s) ds``.

    ``f`` has poles at ``± i √squares``, is flat at 0 and decreases as ``s⁻⁴`` or faster. The
    trapezoidal rule in ``log s`` with step ``h`` has the relative error ``exp(−π² / h)``.
    """
    step = 0.4
    ends = 0.5 * math.log(squares[0]) - 20, 0.5 * math.log(squares[-1]) + 8
    nodes = torch.arange(*ends, step, dtype=squares.dtype).exp()
    return nodes, nodes * step / math.pi


def _rest(root_a: Tensor, root_b: Tensor, num_a: float, num_b: float) -> float:
    r"""Return the bias that the jackknife leaves at unequal numbers of samples.

    The bias depends on the numbers through ``ν = 1 / |1/N − 1/M|``, up to the linear part that the
    jackknife removes. For ``ν`` Gaussian samples, with eigenvalues ``m`` of ``M``,

    ``E log det(s² + M̂) = Σ log(s² + (1 − u) m) − ν (log(1 − u) + u)``,

    where ``u`` makes the right-hand side stationary. Of a bias ``β(ν)`` the jackknife leaves
    ``β + ν β'``. The stationary ``u`` has no part in the derivative, so
    ``Σ log(1 − u m / (s² + m)) − 2 ν (log(1 − u) + u)`` is integrated.
    """
    if num_a == num_b:
        return 0.0
    number = 1 / abs(1 / num_a - 1 / num_b)
    squares = torch.linalg.svdvals(root_a.T @ root_b).square().flip(0)
    squares = squares[squares > len(squares) * torch.finfo(squares.dtype).eps * squares[-1]]
    if not len(squares):
        return 0.0
    nodes, steps = _nodes(squares)
    nodes = nodes[:, None]
    u = torch.zeros_like(nodes)
    for _ in range(100):
        ratio = (squares / (nodes**2 + (1 - u) * squares)).sum(1, keepdim=True) / number
        u = ratio / (1 + ratio)
    left = torch.log1p(-u * squares / (nodes**2 + squares)).sum(1)
    left -= 2 * number * (torch.log1p(-u) + u)[:, 0]
    return -2 * (left @ steps).item()
