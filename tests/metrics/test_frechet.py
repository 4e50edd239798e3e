"""Fréchet distances against closed forms, scipy and torchmetrics."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.fid import _compute_fid as torchmetrics_frechet

from flowkit.metrics import frechet_distance, frechet_from_moments
from flowkit.metrics.frechet import _congruence, gram
from tests.metrics.samples import F64, normal


def random_cov(dim, seed, rank=None):
    factor = normal(dim, rank or dim + 3, seed=seed)
    return factor @ factor.T / dim


def test_frechet_of_diagonal_gaussians():
    mean_a, mean_b = normal(6, seed=1), normal(6, seed=2)
    std_a, std_b = normal(6, seed=3).abs(), normal(6, seed=4).abs()
    exact = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    value = frechet_from_moments(mean_a, (std_a**2).diag(), mean_b, (std_b**2).diag())
    assert value == pytest.approx(exact.item(), rel=1e-12)


def test_frechet_of_commuting_covariances():
    basis = torch.linalg.qr(normal(8, 8)).Q
    a, b = normal(8, seed=1).abs(), normal(8, seed=2).abs()
    zero = torch.zeros(8, dtype=F64)
    value = frechet_from_moments(zero, basis * a @ basis.T, zero, basis * b @ basis.T)
    assert value == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-10)


@pytest.mark.parametrize(
    "counts", [(200, 150), (40, 200), (200, 40), (30, 40), (60, 60), (61, 61), (2, 2)]
)
def test_frechet_against_the_nuclear_norm(counts):
    """Full rank, one or both sets smaller than the 60 dimensions, and exactly as large.

    With centered features A and B, ``tr (Σ_a Σ_b)^{1/2} = ‖A Bᵀ‖_* / √((N−1)(M−1))`` at any rank.
    """
    a, b = normal(counts[0], 60, seed=1), normal(counts[1], 60, seed=2) @ random_cov(60, 3) + 1
    rows_a, rows_b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    root = np.linalg.svd((rows_a @ rows_b.T).numpy(), compute_uv=False).sum()
    spread = rows_a.square().sum() + rows_b.square().sum() - 2 * root
    exact = ((a.mean(0) - b.mean(0)).square().sum() + spread).item()
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-10)
    moments = frechet_from_moments(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert moments == pytest.approx(exact, rel=1e-7)  # moments hold the zeros as √ε


def test_frechet_against_scipy_sqrtm_and_torchmetrics():
    moments = normal(12), random_cov(12, 1), normal(12, seed=2), random_cov(12, 3)
    mean_a, cov_a, mean_b, cov_b = moments
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    brute = (mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * np.trace(root)
    assert frechet_from_moments(*moments) == pytest.approx(brute.item(), rel=1e-10)
    assert torchmetrics_frechet(*moments).item() == pytest.approx(brute.item(), rel=1e-10)


def test_frechet_against_the_torchmetrics_class():
    class Vectors(torch.nn.Module):
        num_features = 16

        def forward(self, images):
            return images.flatten(1)

    a, b = normal(100, 16), normal(120, 16, seed=1) * 2 + 0.3
    metric = FrechetInceptionDistance(feature=Vectors()).set_dtype(F64)
    metric.update(a[:, None, None], real=True)
    metric.update(b[:, None, None], real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-8)


@pytest.mark.parametrize("count", [10, 50, 300])
def test_frechet_of_a_set_with_itself_is_zero(count):
    a = normal(count, 50)
    a[:, 40:] = 3.0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a.flip(0) + 1) == pytest.approx(50, rel=1e-9)


def test_frechet_of_constants_is_the_distance_of_the_means():
    a, b = torch.zeros(9, 4), torch.ones(7, 4)
    assert frechet_distance(a, b) == 4
    spread = normal(9, 4)
    exact = (spread.mean(0).square().sum() + spread.T.cov().trace()).item()
    assert frechet_distance(a, spread) == pytest.approx(exact, rel=1e-12)


def test_frechet_ignores_noise_of_missing_ranks():
    """Orthogonal supports: the trace of the root is 0, so nothing is subtracted."""
    cov_a, cov_b = torch.zeros(2, 40, 40, dtype=F64)
    cov_a[:20, :20], cov_b[20:, 20:] = random_cov(20, 1), random_cov(20, 2)
    zero = torch.zeros(40, dtype=F64)
    exact = (cov_a.trace() + cov_b.trace()).item()
    assert frechet_from_moments(zero, cov_a, zero, cov_b) == pytest.approx(exact, rel=1e-12)
    # A regular matrix against one of rank 3, in both orders.
    low, full = random_cov(40, 3, rank=3), torch.eye(40, dtype=F64)
    exact = (low.trace() + 40 - 2 * torch.linalg.eigvalsh(low)[-3:].sqrt().sum()).item()
    assert frechet_from_moments(zero, low, zero, full) == pytest.approx(exact, rel=1e-12)
    assert frechet_from_moments(zero, full, zero, low) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_frechet_of_one_missing_rank_at_any_scale(scale):
    """The distance of singular covariances has no error of order √ε, which a root of noise has."""
    zero = torch.zeros(20, dtype=F64)
    for seed in range(5):
        low = random_cov(20, seed, rank=19)
        exact = (low.trace() + 20 - 2 * torch.linalg.svdvals(low)[:19].sqrt().sum()).item()
        full = scale**2 * torch.eye(20, dtype=F64)
        for pair in ((low * scale**2, full), (full, low * scale**2)):
            value = frechet_from_moments(zero, pair[0], zero, pair[1]) / scale**2
            assert value == pytest.approx(exact, rel=1e-11)


def test_frechet_blocks_of_many_features():
    a, b = normal(700, 600), normal(800, 600, seed=1) * torch.linspace(0.1, 2, 600, dtype=F64)
    theirs = torchmetrics_frechet(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-8)


def test_blocks_of_products_are_those_of_whole_matrices():
    """A wrong block would only be slow: the distance falls back on singular values."""
    x, cov = normal(600, 20), random_cov(600, 1)
    lower = torch.linalg.cholesky(cov)
    torch.testing.assert_close(gram(x), x @ x.T)
    found = _congruence(lower, cov).tril()
    torch.testing.assert_close(found, (lower.T @ cov @ lower).tril())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    counts=st.tuples(st.integers(2, 30), st.integers(2, 30)),
    dim=st.integers(1, 12),
    scale=st.floats(1e-3, 1e3),
)
def test_frechet_laws(seed, counts, dim, scale):
    """Symmetric, not negative, invariant under motions, quadratic in the scale."""
    a, b = normal(counts[0], dim, seed=seed), 2 * normal(counts[1], dim, seed=seed + 1) + 1
    rotation, shift = torch.linalg.qr(normal(dim, dim, seed=seed + 2)).Q, normal(dim, seed=seed + 3)
    value = frechet_distance(a, b)
    assert value >= 0
    near = pytest.approx(value, rel=1e-8, abs=1e-8)
    assert frechet_distance(b, a) == near
    assert frechet_distance(a @ rotation + shift, b @ rotation + shift) == near
    assert frechet_distance(scale * a, scale * b) / scale**2 == near


def test_frechet_in_single_precision_is_computed_in_double():
    a = 1000 + normal(500, 4, dtype=torch.float32)
    assert frechet_distance(a, a + 1) == pytest.approx(4, rel=1e-5)
    assert frechet_distance(a, a + 1) == frechet_distance(a.double(), (a + 1).double())


def test_frechet_errors():
    a = normal(10, 3)
    with pytest.raises(ValueError, match=r"b must have shape \(N, F\) .* got \(10, 2\)"):
        frechet_distance(a, a[:, :2])
    with pytest.raises(ValueError, match=r"a must have shape .* N >= 2 .*, got \(1, 3\)"):
        frechet_distance(a[:1], a)
    with pytest.raises(ValueError, match="b must be finite, got 1 NaN"):
        frechet_distance(a, torch.where(a == a.max(), math.nan, a))
    with pytest.raises(ValueError, match=r"cov_b must have shape \(3, 3\), got \(2, 3\)"):
        frechet_from_moments(a[0], torch.eye(3), a[1], torch.eye(3)[:2])
    with pytest.raises(ValueError, match="cov_a must be finite, got 9 NaN"):
        frechet_from_moments(a[0], torch.full((3, 3), math.nan), a[1], torch.eye(3))
