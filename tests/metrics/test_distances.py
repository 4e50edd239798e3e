"""Distances, intervals, straightness and quantization against closed forms and brute force."""

import math
from collections import namedtuple

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.fid import _compute_fid as torchmetrics_frechet

from flowkit.metrics import (
    frechet_distance,
    frechet_from_moments,
    frechet_unbiased,
    kid,
    normalized_path_energy,
    path_energy,
    prdc,
    to_uint8,
    wasserstein2,
)
from flowkit.provenance import tensor_hash, versions

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_cov(dim, seed, rank=None):
    factor = normal(dim, rank or dim + 3, seed=seed)
    return factor @ factor.T / dim


# Fréchet distance


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


def test_frechet_blocks_of_many_features():
    a, b = normal(700, 600), normal(800, 600, seed=1) * torch.linspace(0.1, 2, 600, dtype=F64)
    theirs = torchmetrics_frechet(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()).item()
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-8)


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
    near = pytest.approx(value, rel=1e-6, abs=1e-6)
    assert frechet_distance(b, a) == near
    assert frechet_distance(a @ rotation + shift, b @ rotation + shift) == near
    assert frechet_distance(scale * a, scale * b) / scale**2 == near


def test_frechet_in_single_precision_is_computed_in_double():
    a = 1000 + normal(500, 4, dtype=torch.float32)
    assert frechet_distance(a, a + 1) == pytest.approx(4, rel=1e-3)
    assert frechet_distance(a, a + 1) == frechet_distance(a.double(), (a + 1).double())


def test_frechet_unbiased_covers_the_truth_where_the_plain_estimate_does_not():
    generator = torch.Generator().manual_seed(0)
    for shift, scale in [(0.0, 1.0), (0.05, 1.05), (0.3, 1.2)]:
        truth = 8 * (shift**2 + (scale - 1) ** 2)
        covered, estimates, plain = 0, [], []
        for seed in range(60):
            a, b = normal(400, 8, seed=2 * seed), scale * normal(400, 8, seed=2 * seed + 1) + shift
            value, (low, high) = frechet_unbiased(a, b, generator=generator)
            covered += low <= truth <= high
            estimates.append(value)
            plain.append(frechet_distance(a, b))
        error = np.std(estimates) / 60**0.5
        assert covered >= 52  # P(< 52 | coverage .95) = 0.3 %
        assert np.mean(estimates) == pytest.approx(truth, abs=4 * error)
        assert np.mean(plain) > truth + 4 * error


def test_frechet_unbiased_draws_its_groups():
    a, b = normal(200, 3), normal(200, 3, seed=1)

    def draw(seed):
        return frechet_unbiased(a, b, generator=torch.Generator().manual_seed(seed))

    assert draw(0) == draw(0) != draw(1)


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
    with pytest.raises(ValueError, match=r"a must keep more samples than its 3 .* got 3 of 4"):
        frechet_unbiased(a[:4], a, groups=4)
    with pytest.raises(ValueError, match="confidence must lie strictly between 0 and 1, got 95"):
        frechet_unbiased(a, a, groups=3, confidence=95)


# Kernel distance


def brute_kid(a, b):
    def kernel(x, y):
        return (float(x @ y) / len(x) + 1) ** 3

    n = len(a)
    same = [kernel(x[i], x[j]) for x in (a, b) for i in range(n) for j in range(n) if i != j]
    cross = [kernel(x, y) for x in a for y in b]
    return sum(same) / (n * (n - 1)) - 2 * sum(cross) / n**2


def test_kid_against_brute_force():
    a, b = normal(12, 5), normal(12, 5, seed=1) + 0.5
    mean, std = kid(a, b, subsets=3, subset_size=12)
    assert mean == pytest.approx(brute_kid(a, b), rel=1e-10)
    assert std == pytest.approx(0, abs=1e-12)


def test_kid_is_unbiased_at_any_subset_size():
    """Over all subsets of a finite set, and in expectation for equal populations."""
    generator = torch.Generator().manual_seed(0)
    values = [kid(*normal(2, 20, 4, seed=s), 1, 10, generator).mean for s in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    assert min(values) < 0


def test_kid_draws_and_errors():
    a, b = normal(30, 4, dtype=torch.float32), normal(40, 4, seed=1, dtype=torch.float32)
    seeds = [kid(a, b, 5, 10, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]
    with pytest.raises(ValueError, match=r"subset_size must lie in \[2, 30\], got 1000"):
        kid(a, b)
    with pytest.raises(ValueError, match=r"b must have shape \(M, F\) beside a \(30, 4\), got"):
        kid(a, b[:, 1:], 5, 10)


# Neighbors


def brute_prdc(real, fake, k):
    def radius(x, i):
        return sorted(math.dist(x[i], y) for y in x)[k]

    real, fake = real.tolist(), fake.tolist()
    inside_real = [[math.dist(x, y) < radius(real, i) for y in fake] for i, x in enumerate(real)]
    inside_fake = [[math.dist(x, y) < radius(fake, j) for j, y in enumerate(fake)] for x in real]
    columns = list(zip(*inside_real, strict=True))
    return (
        np.mean([any(column) for column in columns]),
        np.mean([any(row) for row in inside_fake]),
        np.mean([sum(column) for column in columns]) / k,
        np.mean([any(row) for row in inside_real]),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_prdc_against_brute_force(k, shift):
    real, fake = 100 + normal(25, 3), 100 + 0.7 * normal(18, 3, seed=1) + shift
    assert prdc(real, fake, k) == pytest.approx(brute_prdc(real, fake, k), rel=1e-12)


def test_prdc_in_chunks_tells_a_dropped_mode_from_a_blurred_one():
    real = normal(1500, 2) + 20 * (torch.arange(1500) % 2)[:, None]
    dropped = prdc(real, normal(1200, 2, seed=1))
    assert dropped.precision > 0.95
    assert dropped.recall == pytest.approx(0.5, abs=0.05)
    assert dropped.coverage == pytest.approx(0.5, abs=0.05)
    same = prdc(real, real)
    assert same == (1.0, 1.0, pytest.approx(1.0), 1.0)


def test_coverage_of_equal_populations_has_its_known_mean():
    """The chance that none of k nearest among both sets is fake: 1 − 2⁻ᵏ for equal counts."""
    values = [prdc(normal(300, 2, seed=s), normal(300, 2, seed=s + 999), 3) for s in range(20)]
    assert np.mean([v.coverage for v in values]) == pytest.approx(1 - 2**-3, abs=0.015)
    assert np.mean([v.density for v in values]) == pytest.approx(1, abs=0.05)


def test_prdc_errors():
    with pytest.raises(ValueError, match=r"k must lie in \[1, 4\], got 5"):
        prdc(normal(9, 2), normal(5, 2))
    with pytest.raises(ValueError, match=r"fake must have shape \(M, F\) beside real"):
        prdc(normal(9, 2), normal(9, 3))


# Transport


def test_wasserstein_on_the_line_is_the_sorted_distance():
    a, b = normal(50, 1), 2 * normal(50, 1, seed=1) + 1
    exact = (a.sort(0).values - b.sort(0).values).square().mean().sqrt().item()
    assert wasserstein2(a, b) == pytest.approx(exact, rel=1e-10)
    assert wasserstein2(b, a) == pytest.approx(exact, rel=1e-10)


def test_wasserstein_of_equal_sizes_is_an_assignment():
    a, b = normal(30, 2, 2), normal(30, 2, 2, seed=1)
    cost = torch.cdist(a.flatten(1), b.flatten(1)).square().numpy()
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    assert wasserstein2(a, b) == pytest.approx(cost[rows, columns].mean() ** 0.5, rel=1e-9)


def test_wasserstein_of_unequal_sizes_and_translations():
    a = normal(7, 3)
    assert wasserstein2(a, a.repeat(3, 1)) == pytest.approx(0, abs=1e-7)
    # A single point: the plan is forced.
    exact = a.square().sum(1).mean().sqrt().item()
    assert wasserstein2(a, torch.zeros(1, 3)) == pytest.approx(exact, rel=1e-10)
    shift = torch.tensor([3.0, 0.0, 4.0])
    assert wasserstein2(a, a + shift) == pytest.approx(5, rel=1e-10)


def test_wasserstein_errors():
    message = r"b must hold points \(M, \*\) of the shape of a \(4, 2\), got \(4, 3\)"
    with pytest.raises(ValueError, match=message):
        wasserstein2(normal(4, 2), normal(4, 3))
    with pytest.raises(ValueError, match="a must be finite"):
        wasserstein2(torch.full((2, 2), math.inf), normal(2, 2))


def test_path_energy_of_straight_lines_is_their_squared_length():
    x0, x1 = normal(40, 2, 3), normal(40, 2, 3, seed=1)
    grid = torch.tensor([0.0, 0.1, 0.5, 0.6, 1.0], dtype=F64)
    path = torch.stack([x0 + t * (x1 - x0) for t in grid])
    exact = (x1 - x0).square().sum((1, 2)).mean().item()
    assert path_energy(path, grid) == pytest.approx(exact, rel=1e-12)
    assert normalized_path_energy(exact, w2=exact**0.5) == pytest.approx(0, abs=1e-12)
    # On part of the time axis the same way costs more.
    assert path_energy(path[[0, -1]], [0.25, 0.75]) == pytest.approx(2 * exact, rel=1e-12)


def test_path_energy_of_a_circle_converges_from_below():
    """Angular velocity π/2 on the unit circle: energy π²/4."""

    def energy(steps):
        angle = torch.linspace(0, math.pi / 2, steps + 1, dtype=F64)
        path = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
        return path_energy(path, steps)

    gaps = [math.pi**2 / 4 - energy(steps) for steps in (10, 20, 40)]
    assert min(gaps) > 0
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=1e-2)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=1e-2)
    quarter_circle, w2 = math.pi**2 / 4, 2**0.5
    assert normalized_path_energy(quarter_circle, w2) == pytest.approx(math.pi**2 / 8 - 1)


def test_path_energy_takes_solutions_and_says_how_to_get_a_path():
    Solved = namedtuple("Solved", "x path")
    path = normal(3, 5, 2)
    assert path_energy(Solved(path[-1], path), 2) == path_energy(path, 2)
    with pytest.raises(ValueError, match=r"path, got None; solve with return_path=True"):
        path_energy(Solved(path[-1], None), 2)
    with pytest.raises(
        ValueError, match=r"path \(4, B, \*\) for a grid of 4 times, got shape \(3,"
    ):
        path_energy(path, 3)
    with pytest.raises(ValueError, match="w2 must be positive and finite, got 0"):
        normalized_path_energy(1.0, 0.0)
    with pytest.raises(ValueError, match="path_energy must be at least 0, got -1"):
        normalized_path_energy(-1.0, 1.0)


# Intervals


# Quantization and provenance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_all_levels(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.to(dtype) / 127.5 - 1), levels)
    # Anything within half a level rounds back; truncation would not.
    for offset in (-0.49, 0.49):
        assert torch.equal(to_uint8((levels.double() + offset) / 127.5 - 1), levels)


def test_to_uint8_is_unbiased_and_clamps():
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=F64) * 2 - 1
    error = to_uint8(x).double() - (x + 1) * 127.5
    assert abs(error.mean().item()) < 4 * (1 / 12) ** 0.5 / 200_000**0.5
    assert error.abs().max() <= 0.5
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    # Half precision is widened: 0.75 is exact in it and maps to 223.125.
    assert to_uint8(torch.tensor([0.75, -1, 1], dtype=torch.bfloat16)).tolist() == [223, 0, 255]


def test_to_uint8_errors():
    with pytest.raises(ValueError, match="images must be finite, got 1 NaN"):
        to_uint8(torch.tensor([0.0, math.nan]))
    with pytest.raises(TypeError, match=r"images must be a floating-point .* got torch.uint8"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))


def test_tensor_hash_sees_every_bit():
    x = normal(3, 4)
    views = {tensor_hash(y) for y in (x, x.clone(), x.T.contiguous().T)}
    assert len(views) == 1
    bumped = x.clone()
    bumped[2, 3] = np.nextafter(bumped[2, 3].item(), 9)
    others = (bumped, x.T, x.float(), x.reshape(-1), x.bool(), x.to(torch.bfloat16), x[:0], x[0, 0])
    assert len(views | {tensor_hash(y) for y in others}) == 9
    assert tensor_hash({"a": x, "b": bumped}) == tensor_hash({"b": bumped, "a": x})
    assert tensor_hash({"a": x, "b": bumped}) != tensor_hash({"b": x, "a": bumped})


def test_versions_name_what_is_installed():
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "flowkit", "lightning", "torchmetrics", "scipy"} <= set(found)
