"""Fréchet distance between Gaussians fitted to two sets of features."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_finite

_BLOCK = 256
ROWS = 2048  # samples that are in float64 at a time


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Squared Fréchet distance between Gaussians fitted to two sets of features.

    ``‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^{1/2})`` in float64, with the unbiased covariances
    (divided by ``N − 1``).

    The covariances may be singular. With ``Σ = R Rᵀ`` the trace of the root is the sum of the
    singular values of ``R_aᵀ R_b``. ``R`` is the pivoted Cholesky factor or, with fewer samples
    than dimensions, the matrix of the centered samples. For regular covariances the trace is
    computed from the eigenvalues of ``R_aᵀ Σ_b R_a``, which is twice as fast.

    The estimate has an upward bias of order ``1/N``. So compare distances only at equal numbers of
    samples, or use `frechet_unbiased`. Only with the features of `inception` is the distance the
    FID.

    Source: Dowson & Landau 1982, *The Fréchet distance between multivariate normal
    distributions*; Heusel et al. 2017 (arXiv 1706.08500), equation 6.

    Args:
        a: Features ``(N, F)``, ``N >= 2``.
        b: Features ``(M, F)``, ``M >= 2``.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        ValueError: If a shape is wrong, or a value is not finite.

    >>> a = torch.tensor([[0.0], [2.0]])          # mean 1, standard deviation √2
    >>> round(frechet_distance(a, 2 * a + 3), 6)  # (5 − 1)² + (2√2 − √2)²
    18.0
    """
    check_sets(a=a, b=b)
    return gaussian_distance(Gaussian.fit(a), Gaussian.fit(b))


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet distance from means and covariances, see `frechet_distance`.

    It serves evaluations that accumulate moments and do not hold all features in memory. The
    covariances may be singular.

    Args:
        mean_a: Mean ``(F,)`` of the first set.
        cov_a: Covariance ``(F, F)`` of the first set.
        mean_b: Mean ``(F,)`` of the second set.
        cov_b: Covariance ``(F, F)`` of the second set.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        ValueError: If a shape is wrong, a value is not finite, or a matrix is no covariance.

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
        if not torch.isfinite(value.sum()):  # ten times faster than the check of each value
            check_finite(value, name)
        if name.startswith("cov"):
            check_covariance(value, name)
    mean_a, cov_a, mean_b, cov_b = (_float64(value) for value in given.values())
    return gaussian_distance(Gaussian(mean_a, cov_a), Gaussian(mean_b, cov_b))


class Gaussian(NamedTuple):
    """Gaussian: the mean ``(F,)``, and ``spread``.

    ``spread`` is the covariance ``(F, F)``, or with ``is_root`` a root ``R (F, N)`` with
    ``Σ = R Rᵀ``.
    """

    mean: Tensor
    spread: Tensor
    is_root: bool = False

    @classmethod
    def fit(cls, x: Tensor, weights: Tensor | None = None) -> "Gaussian":
        """Fit to features ``(N, F)``. For ``N <= F`` the centered samples are the root.

        Args:
            x: Features of any precision and device. `ROWS` of them are in float64 at a time.
            weights: Weights ``(N,)`` of the samples in float64; None stands for equal ones.
        """
        count, dim = x.shape
        if weights is None:
            weights = torch.ones(count, dtype=torch.float64)
        total = weights.sum()
        freedom = total - weights.square().sum() / total  # N − 1 for weights 1
        parts = weights.split(ROWS)
        sums = (w @ z for w, z in zip(parts, in_float64(x), strict=True))
        mean = sum(sums, start=_zeros(dim)) / total
        scaled = (
            (z - mean) * (w / freedom).sqrt()[:, None]
            for w, z in zip(parts, in_float64(x), strict=True)
        )
        if count <= dim:
            return cls(mean, torch.cat(list(scaled)).T, True)
        return cls(mean, sum((gram(z.T) for z in scaled), start=_zeros(dim, dim)))


def _zeros(*shape: int) -> Tensor:
    """Return zeros in float64."""
    return torch.zeros(shape, dtype=torch.float64)


def in_float64(x: Tensor, rows: Tensor | None = None) -> Iterator[Tensor]:
    """Return the rows of ``x (N, F)``, or some of them, in blocks of `ROWS`, in float64."""
    blocks = x.split(ROWS) if rows is None else (x[some] for some in rows.split(ROWS))
    return map(_float64, blocks)


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute the squared Fréchet distance of two Gaussians."""
    distance = (a.mean - b.mean).square().sum() - 2 * _fidelity(a, b)
    for gaussian in (a, b):
        spread = gaussian.spread
        distance += spread.square().sum() if gaussian.is_root else spread.trace()
    return max(distance.item(), 0.0)


def _fidelity(a: Gaussian, b: Gaussian) -> Tensor:
    """Compute ``tr (Σ_a Σ_b)^{1/2}``."""
    if not (a.is_root or b.is_root):
        factor, failed = torch.linalg.cholesky_ex(a.spread)
        if not failed:
            squares = torch.linalg.eigvalsh(_congruence(factor, b.spread))
            if squares[0] > torch.finfo(squares.dtype).eps * squares[-1]:
                return squares.sqrt().sum()
    # A zero eigenvalue is computed with an error of order ε, and its root has the error √ε. The
    # singular values have an error of order ε only.
    return torch.linalg.svdvals(covariance_root(a).T @ covariance_root(b)).sum()


def _congruence(lower: Tensor, cov: Tensor) -> Tensor:
    """Compute the lower triangle of ``Lᵀ Σ L`` in blocks, without the zeros of ``L``."""
    # LAPACK's sygst from SciPy would be slow here: on busy machines the threads of SciPy and torch
    # wait for each other.
    upper = lower.T.contiguous()
    reduced = torch.zeros_like(cov)
    for i in range(0, len(cov), _BLOCK):
        rows = slice(i, i + _BLOCK)
        reduced[rows, i:] = upper[rows, i:] @ cov[i:, i:] @ upper[i:, i:].T
    return reduced.T


def gram(x: Tensor) -> Tensor:
    """Compute ``x xᵀ`` from the blocks of its lower triangle, which halves the work."""
    gram = x.new_empty(len(x), len(x))
    for i in range(0, len(x), _BLOCK):
        block = x[i:] @ x[i : i + _BLOCK].T
        gram[i:, i : i + _BLOCK] = block
        gram[i : i + _BLOCK, i:] = block.T
    return gram


def covariance_root(gaussian: Gaussian) -> Tensor:
    """Return a root ``R`` of the covariance: the stored root, or the pivoted Cholesky factor."""
    if gaussian.is_root:
        return gaussian.spread
    from scipy.linalg import get_lapack_funcs

    cov = gaussian.spread.numpy()
    (pivoted_cholesky,) = get_lapack_funcs(("pstrf",), (cov,))
    # With tol < 0 LAPACK uses its default tolerance: F · eps · (largest diagonal element).
    packed, pivots, rank, _ = pivoted_cholesky(cov, lower=1, tol=-1.0)
    root = torch.empty(len(cov), int(rank), dtype=torch.float64)
    root[torch.from_numpy(pivots).long() - 1] = torch.from_numpy(packed).tril()[:, : int(rank)]
    return root


def _float64(x: Tensor) -> Tensor:
    """Convert to float64 on the CPU, without gradient."""
    return x.detach().to("cpu", torch.float64)


def check_sets(**sets: Tensor) -> None:
    """Require named sets of finite features ``(N, F)`` with the same ``F`` and ``N >= 2``.

    Raises:
        ValueError: If a shape is wrong, or a value is not finite.
    """
    first, width = next(iter(sets)), next(iter(sets.values())).shape[-1:]
    for name, x in sets.items():
        if x.ndim != 2 or len(x) < 2 or x.shape[1:] != width:
            raise ValueError(
                f"{name} must have shape (N, F) with N >= 2 and the same F as {first}, "
                f"got {tuple(x.shape)}"
            )
        check_rows(x, name)


def as_features(**sets: Tensor) -> list[Tensor]:
    """Check named sets of features, and return them as float64 on the CPU."""
    check_sets(**sets)
    return [_float64(x) for x in sets.values()]


def check_covariance(cov: Tensor, name: str) -> None:
    """Require what a covariance ``(F, F)`` has: symmetry, and ``Σ_ij² <= Σ_ii Σ_jj``.

    The second rule implies that no variance is negative. Round-off of float32 is allowed.

    Raises:
        ValueError: If a rule is broken.
    """
    if not len(cov):
        return
    cov = _float64(cov)
    stds = cov.diag().clamp_min(0).sqrt()
    slack = 1e-3 * stds.max()
    if bool(((cov - cov.T).abs() > slack * stds.max()).any()):
        i, j = divmod(int((cov - cov.T).abs().argmax()), len(cov))
        got = f"{cov[i, j]:.6g} at ({i}, {j}) and {cov[j, i]:.6g} at ({j}, {i})"
        raise ValueError(f"{name} must be symmetric, got {got}")
    excess = cov.abs() - (stds[:, None] + slack) * (stds + slack)
    if bool((excess > 0).any()):
        i, j = divmod(int(excess.argmax()), len(cov))
        got = f"{cov[i, j]:.6g} at ({i}, {j}) with variances {cov[i, i]:.6g} and {cov[j, j]:.6g}"
        raise ValueError(f"{name} must be a covariance, got {got}")


def check_rows(x: Tensor, name: str, first: int = 0) -> None:
    """Require finite features ``x (N, F)``; the error has the number of the sample.

    Args:
        x: The features.
        name: Name of the argument.
        first: Number of the first sample.

    Raises:
        ValueError: If a value is not finite.
    """
    if torch.isfinite(x.sum()):  # much faster than the check of each value
        return
    bad = ~torch.isfinite(x)
    if bad.any():
        row = first + int(bad.any(1).nonzero()[0])
        raise ValueError(
            f"{name} must be finite, got {int(bad.sum())} NaN or infinite of {x.numel()} values, "
            f"the first in sample {row}, counted from 0"
        )
