"""The test of a gain, and what passes for noise."""

import pytest
import torch
from scipy.stats import ttest_1samp

from flowkit.boss.guard import is_gain, is_noise
from tests.boss.fields import F64, noise


def certain(gains, level=0.05):
    return is_gain(gains, level, torch.Generator().manual_seed(0))


def standardized(gains, ratio):
    """Shift gains so that their mean is ``ratio`` standard errors."""
    return gains - gains.mean() + ratio * gains.std() / len(gains) ** 0.5


def test_on_even_gains_the_test_is_the_t_test():
    """Its p-value is between 1.6 and 1.7 standard errors for a level of 5 %."""
    gains = torch.special.ndtri((torch.arange(400, dtype=F64) + 0.5) / 400)
    for ratio, level, found in ((1.5, 0.05, 0), (1.8, 0.05, 1), (1.8, 0.025, 0), (2.1, 0.025, 1)):
        p = ttest_1samp(standardized(gains, ratio), 0, alternative="greater").pvalue
        assert (p <= level) == found
        assert certain(standardized(gains, ratio), level) == found
        assert certain(3 * standardized(gains, ratio), level) == found
    assert certain(standardized(gains, 9), 0.001)
    assert not certain(standardized(gains, 9), 0.0009)  # more than 999 bootstrap samples can show


def test_rare_losses_count_for_more_than_in_a_t_test():
    """And rare gains for less."""
    gains = noise(400, dtype=F64)
    gains[:4] -= 20
    for ratio in (2.2, 2.6):
        losses = standardized(gains, ratio)
        assert ttest_1samp(losses, 0, alternative="greater").pvalue < 0.025
        assert not certain(losses, 0.025)
    assert certain(standardized(-gains, 1.8), 0.025)


def test_what_is_no_gain():
    assert not certain(torch.zeros(50, dtype=F64))
    assert not certain(torch.full((50,), -1.0, dtype=F64))
    assert not certain(torch.tensor([torch.nan, 1.0, 2.0], dtype=F64))
    assert not certain(-1 - noise(50, dtype=F64).abs())
    assert certain(torch.full((50,), 1e-9, dtype=F64))
    assert not certain(torch.tensor([1.0, 1.1], dtype=F64))  # two samples prove nothing
    assert certain(1 + noise(50, dtype=F64).abs())


@pytest.mark.slow
def test_gains_without_mean_are_found_at_the_level():
    """Skewed gains: exponential losses, 300 of them, 400 repeats."""
    losses = torch.empty(400, 300, dtype=F64).exponential_(
        generator=torch.Generator().manual_seed(0)
    )
    found = sum(certain(1 - rows, 0.1) for rows in losses)
    assert 22 <= found <= 58  # 40 and three standard deviations


@pytest.mark.parametrize("shape", [(400, 2), (200, 3, 4), (60, 400)])
def test_what_passes_for_noise(shape):
    """Mean, size and its variance each tell that samples are no noise."""
    x = noise(*shape)
    assert is_noise(x)
    off = 6 / x.numel() ** 0.5
    assert not is_noise(x + off + x.mean().abs())
    assert not is_noise(x * (1 + 1.5 * off))
    ring = x / x.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.ndim - 1))
    assert not is_noise(ring * x[0].numel() ** 0.5)  # right mean square, but all of one size
    assert not is_noise(torch.zeros(shape))


@pytest.mark.parametrize("errors", [-5.02, -4.98, 4.98, 5.02])
@pytest.mark.parametrize("moment", ["mean", "energy", "variance of the energy"])
def test_noise_is_within_five_standard_errors(moment, errors):
    """Opposite rows of two sizes, so that all three values are known exactly.

    Standard errors of normal noise are 1/√(N d) of the mean, √(2 d/N) of the mean of ``‖x‖²``, and
    √((κ − 1)/N) times the variance of it, with its kurtosis κ = 3 + 12/d.
    """
    count, size = 4000, 12
    off = {name: errors * (name == moment) for name in ("mean", "energy", "variance of the energy")}
    energy = size + off["energy"] * (2 * size / count) ** 0.5
    var = 2 * size * (1 + off["variance of the energy"] * ((2 + 12 / size) / count) ** 0.5)
    spread = (var * (count - 1) / count) ** 0.5
    half = noise(count // 2, size, dtype=F64)
    half *= (energy + spread * (-1) ** torch.arange(count // 2)).sqrt()[:, None] / half.norm(
        dim=1, keepdim=True
    )
    x = torch.cat([half, -half]) + off["mean"] / (count * size) ** 0.5
    assert is_noise(x) == (abs(errors) < 5)
