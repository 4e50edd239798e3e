"""Fréchet distances between the Gaussians fitted to two sets of features."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_finite
from flowkit.metrics.intervals import Interval, check_confidence

_BLOCK = 512


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Squared Fréchet distance between Gaussians fitted to two sets of features.

    ``‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^{1/2})`` in float64, with the unbiased covariances
    (divided by ``N − 1``). Right for singular covariances too: with ``Σ = R Rᵀ`` the trace of the
    root is the sum of the singular values of ``R_aᵀ R_b``; ``R`` is the Cholesky factor, pivoted
    where the rank demands it, or the centred features themselves where there are fewer of them
    than dimensions.

    The estimate is biased upwards, by a term of order ``1/N``, so that distances compare only at
    equal sample counts; `frechet_unbiased` corrects it. Only for `inception` features may it
    be called FID.

    Source: Dowson & Landau 1982, *The Fréchet distance between multivariate normal
    distributions*; Heusel et al. 2017 (arXiv 1706.08500), equation 6.

    Args:
        a: Features ``(N, F)``, ``N >= 2``.
        b: Features ``(M, F)``, ``M >= 2``.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        ValueError: If a shape is wrong or a value is not finite.

    >>> a = torch.tensor([[0.0], [2.0]])          # mean 1, standard deviation √2
    >>> round(frechet_distance(a, 2 * a + 3), 6)  # (5 − 1)² + (2√2 − √2)²
    18.0
    """
    a, b = _features(a, b)
    mean_a, mean_b = a.mean(0), b.mean(0)
    return _distance(mean_a, _root_of_features(a - mean_a), mean_b, _root_of_features(b - mean_b))


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """`frechet_distance` from means ``(F,)`` and covariances ``(F, F)``.

    For evaluations that accumulate moments and never hold all features. Covariances may be
    singular.

    Args:
        mean_a: Mean of the first set.
        cov_a: Its covariance.
        mean_b: Mean of the second set.
        cov_b: Its covariance.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: If a shape is wrong or a value is not finite.

    >>> zero, one, eye = torch.zeros(3), torch.ones(3), torch.eye(3)
    >>> round(frechet_from_moments(zero, eye, one, 4 * eye), 6)   # 3 + 3 (2 − 1)²
    6.0
    """
    dim = mean_a.numel()
    given = {"mean_a": mean_a, "cov_a": cov_a, "mean_b": mean_b, "cov_b": cov_b}
    for name, value in given.items():
        shape = (dim,) if name.startswith("mean") else (dim, dim)
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        check_finite(value, name)
    mean_a, cov_a, mean_b, cov_b = (_float64(value) for value in given.values())
    return _distance(mean_a, _root(cov_a), mean_b, _root(cov_b))


def frechet_unbiased(
    a: Tensor,
    b: Tensor,
    *,
    groups: int = 20,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> tuple[float, Interval]:
    """Fréchet distance of the two populations, with a confidence interval (grouped jackknife).

    The bias of `frechet_distance` is of order ``1/N``. Leaving out one of ``groups`` random groups
    at a time, of either set, estimates bias and variance; moments are subtracted, not recomputed,
    so the cost is ``2 · groups`` roots however many samples there are.

    The interval covers the distance between the *populations* (infinitely many samples), hence may
    lie entirely below the biased ``frechet_distance(a, b)``. At a nominal 95 % it held the truth in
    93 to 100 % of 60 to 200 draws each: Gaussians of 8 features (500 samples) and 64 features (200,
    400, 1000 samples), apart by shift and scale or equal, where it is conservative. The correction
    is of first order in ``1/N``: have several times more samples than features.

    Source: Quenouille 1956, *Notes on bias in estimation*; Tukey 1958 for the variance.

    Args:
        a: Features ``(N, F)``.
        b: Features ``(M, F)``.
        groups: Number of groups that each set is split into.
        confidence: Nominal coverage in (0, 1).
        generator: Draws the groups; on the CPU.

    Returns:
        The corrected estimate (which may fall below 0 when the populations agree) and the interval,
        clipped at 0.

    Raises:
        ValueError: If a set with one group left out holds no more samples than features.

    >>> g = torch.Generator().manual_seed(0)
    >>> a, b = torch.randn(2, 500, 8, generator=g)
    >>> value, interval = frechet_unbiased(a, b, generator=g)
    >>> frechet_distance(a, b) > 0.05, abs(value) < 0.03, interval.low
    (True, True, 0.0)
    """
    from scipy.stats import t as student

    a, b = _features(a, b)
    check_at_least(groups, 2, "groups")
    check_confidence(confidence)
    for name, x in (("a", a), ("b", b)):
        kept = len(x) - -(-len(x) // groups)
        if kept <= x.shape[1]:
            raise ValueError(
                f"{name} must keep more samples than its {x.shape[1]} features without one of "
                f"{groups} groups, got {kept} of {len(x)}"
            )
    whole = [(x.mean(0), _root_of_features(x - x.mean(0))) for x in (a, b)]
    value = _distance(*whole[0], *whole[1])
    estimate, variance = value, 0.0
    for x, other in ((a, whole[1]), (b, whole[0])):
        parts = [_distance(*part, *other) for part in _without_each_group(x, groups, generator)]
        left_out = torch.tensor(parts, dtype=torch.float64)
        estimate -= (groups - 1) * (left_out.mean().item() - value)
        variance += (groups - 1) * left_out.var(correction=0).item()
    reach = float(student.ppf((1 + confidence) / 2, groups - 1)) * variance**0.5
    return estimate, Interval(max(estimate - reach, 0.0), max(estimate + reach, 0.0))


def _without_each_group(
    x: Tensor, groups: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, "_Root"]]:
    """Yield the mean and the covariance's root of ``x`` without each of its random groups."""
    mean = x.mean(0)
    centred = (x - mean)[torch.randperm(len(x), generator=generator)]
    gram = _gram(centred.T)
    for group in centred.tensor_split(groups):
        kept = len(x) - len(group)
        offset = -group.sum(0) / kept  # all centred rows sum to zero
        cov = (gram - _gram(group.T) - kept * torch.outer(offset, offset)) / (kept - 1)
        yield mean + offset, _root(cov)


class _Root(NamedTuple):
    """``R (F, rank)`` of a covariance ``R Rᵀ``; with it, if ``R`` is its Cholesky factor."""

    factor: Tensor
    cov: Tensor | None = None


def _distance(mean_a: Tensor, root_a: _Root, mean_b: Tensor, root_b: _Root) -> float:
    spread = root_a.factor.square().sum() + root_b.factor.square().sum()
    distance = (mean_a - mean_b).square().sum() + spread - 2 * _fidelity(root_a, root_b)
    return max(distance.item(), 0.0)


def _fidelity(a: _Root, b: _Root) -> Tensor:
    """``tr (Σ_a Σ_b)^{1/2}``: the sum of the singular values of ``R_aᵀ R_b``."""
    if a.cov is None or b.cov is None:
        # Eigenvalues of the square would turn the zeros' noise ε into √ε.
        return torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    reduced = _lower_congruence(a.factor, b.cov)  # regular: eigenvalues are twice as fast
    return torch.linalg.eigvalsh(reduced).clamp(min=0).sqrt().sum()


def _lower_congruence(factor: Tensor, cov: Tensor) -> Tensor:
    """``Lᵀ Σ L`` in its lower triangle: block by block, only where ``L`` is not 0."""
    # Not LAPACK's sygst: SciPy's threads and torch's get in each other's way on busy machines.
    reduced = torch.zeros_like(cov)
    for i in range(0, len(cov), _BLOCK):
        columns = slice(i, i + _BLOCK)
        reduced[i:, columns] = factor[i:, i:].T @ (cov[i:, i:] @ factor[i:, columns])
    return reduced


def _gram(x: Tensor) -> Tensor:
    """``x xᵀ`` by blocks of its lower triangle, mirrored: half of the work."""
    gram = x.new_empty(len(x), len(x))
    for i in range(0, len(x), _BLOCK):
        block = x[i:] @ x[i : i + _BLOCK].T
        gram[i:, i : i + _BLOCK] = block
        gram[i : i + _BLOCK, i:] = block.T
    return gram


def _root_of_features(centred: Tensor) -> _Root:
    """Root of the covariance of centred features ``(N, F)``."""
    count, dim = centred.shape
    if count <= dim:
        return _Root(centred.T / (count - 1) ** 0.5)
    return _root(_gram(centred.T) / (count - 1))


def _root(cov: Tensor) -> _Root:
    """Cholesky root of a positive semi-definite matrix, pivoted and cut at its rank if singular."""
    factor, failed = torch.linalg.cholesky_ex(cov)
    if not failed:
        return _Root(factor, cov)
    # tol < 0 asks for LAPACK's own: F · eps · (largest diagonal element).
    pivoted_cholesky = _lapack("pstrf", cov)
    packed, pivots, rank, _ = pivoted_cholesky(cov.numpy(), lower=1, tol=-1.0)
    root = torch.empty(len(cov), int(rank), dtype=cov.dtype)
    root[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(packed).tril()[:, : int(rank)]
    return _Root(root)


def _lapack(name: str, x: Tensor) -> Callable[..., Any]:
    from scipy.linalg import get_lapack_funcs

    return get_lapack_funcs((name,), (x.numpy(),))[0]


def _float64(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of features, checked, as float64 on the CPU."""
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != a.shape[1]:
            raise ValueError(
                f"{name} must have shape (N, F) with N >= 2 and one F, got {tuple(x.shape)}"
            )
        check_finite(x, name)
    return _float64(a), _float64(b)
