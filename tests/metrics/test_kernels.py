"""CMMD and energy distance: brute force, closed forms and coverage."""

import math

import pytest
import torch

from flowkit.metrics import cmmd, energy_distance, kernel_distance
from flowkit.metrics.kernels import gaussian, minus_distance
from tests.metrics.samples import F64, normal


def test_cmmd_is_the_mean_over_all_pairs():
    """Also for more rows than a block holds."""
    a, b = 9 * normal(30, 4), 9 * normal(1100, 4, seed=1) + 3

    def mean(x, y):
        return (-(x[:, None] - y).square().sum(-1) / 200).exp().mean()

    exact = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert cmmd(a, b) == pytest.approx(exact.item(), rel=1e-10)
    assert cmmd(b, a) == pytest.approx(exact.item(), rel=1e-10)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("kernel", "at_zero"), [(gaussian, 1.0), (minus_distance, 0.0)])
def test_other_kernels_lose_their_bias(kernel, at_zero):
    """The unbiased estimate leaves out the pairs of a sample with itself."""
    a, b = 100 + 5 * normal(20, 3), 102 + 5 * normal(30, 3, seed=1)

    def others(x):
        values = kernel(x, x)
        assert torch.allclose(values.diagonal(), torch.full((len(x),), at_zero, dtype=F64))
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    exact = others(a) + others(b) - 2 * kernel(a, b).mean()
    value, (low, high) = kernel_distance(a, b, kernel=kernel)
    assert value == pytest.approx(exact.item(), rel=1e-9)
    assert low < value < high


def energy_of_normals(gap):
    """``2 E|x − y| − E|x − x'| − E|y − y'|`` for standard normals on a line."""
    root, far = math.sqrt(2), gap / 2
    mean = root * math.sqrt(2 / math.pi) * math.exp(-(far**2)) + gap * math.erf(far)
    return 2 * mean - 2 * root * math.sqrt(2 / math.pi)


def test_energy_distance_of_normals():
    a, b = normal(3000, 1), normal(3000, 1, seed=1) + 1
    value, (low, high) = energy_distance(a[:, None], b[:, None])  # points of any shape
    assert low < energy_of_normals(1) < high
    assert high - low < 0.2 * value
    assert energy_distance(3 * a, 3 * b)[0] == pytest.approx(3 * value, rel=1e-9)


@pytest.mark.slow
def test_intervals_of_the_energy_distance_cover():
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        a, b = torch.randn(2, 300, 1, generator=generator)
        low, high = energy_distance(a, b + 1)[1]
        covered += low <= energy_of_normals(1) <= high
    assert 372 <= covered <= 388  # 95 % ± 2 %
