"""Distance at infinitely many samples: known Gaussians, and the line by hand."""

import numpy as np
import pytest
import torch

from flowkit.metrics import (
    Moments,
    Statistics,
    frechet_distance,
    frechet_infinity,
    frechet_unbiased,
)
from tests.metrics.samples import F64, normal


def known(dim, gap, scale):
    """A Gaussian, the distance from the standard normal, and draws of both."""
    mean = torch.full((dim,), gap, dtype=F64)
    truth = dim * gap**2 + dim * (scale - 1) ** 2
    return Statistics(mean, scale**2 * torch.eye(dim, dtype=F64)), truth


def test_infinity_is_near_the_truth_where_the_distance_is_not():
    """16 features and 320 samples: the bias is larger than the interval."""
    law, truth = known(16, 0.1, 1.0)
    a, b = normal(320, 16), 0.1 + normal(320, 16, seed=1)
    for other in (law, b):
        _, (low, high) = frechet_infinity(a, other)
        assert low < truth < high
    assert frechet_distance(a, b) > high
    moments = Moments()
    moments.update(a)
    assert moments.statistics().distance(law) > frechet_infinity(a, law)[1].high


def test_the_line_by_hand():
    """Parts of all samples in a random order; 5 of them, since each has 4 samples per feature."""
    a, b = normal(103, 5), normal(140, 5, seed=1) + 1
    order = torch.Generator().manual_seed(7)
    a_parts, b_parts = (x[torch.randperm(len(x), generator=order)] for x in (a, b))
    means = []
    for k in range(1, 6):
        pairs = zip(a_parts.tensor_split(k), b_parts.tensor_split(k), strict=True)
        means.append(np.mean([frechet_distance(x, y) for x, y in pairs]))
    (slope, exact), cov = np.polyfit(range(1, 6), means, 1, cov="unscaled")
    residual = np.array(means) - slope * np.arange(1, 6) - exact
    error = (residual @ residual / 3 * cov[1, 1]) ** 0.5
    value, (low, high) = frechet_infinity(a, b, generator=torch.Generator().manual_seed(7))
    assert value == pytest.approx(exact, rel=1e-9)
    center, ends = frechet_unbiased(a, b)
    for end, plain in ((low, ends.low), (high, ends.high)):
        reach = ((plain - center) ** 2 + (1.959964 * error) ** 2) ** 0.5
        assert abs(end - value) == pytest.approx(reach, rel=1e-6)


def test_statistics_are_the_population():
    """Of a huge sample they are the limit: the distance to the sample goes there."""
    a, b = normal(400, 4), 1.2 * normal(200_000, 4, seed=1) + 0.5
    moments = Moments()
    moments.update(b)
    value, ends = frechet_unbiased(a, moments.statistics())
    sample, sample_ends = frechet_unbiased(a, b)
    assert value == pytest.approx(sample, abs=0.01 * (ends.high - ends.low))
    assert ends == pytest.approx(sample_ends, rel=0.01)


def test_infinity_errors():
    with pytest.raises(ValueError, match="the number of samples of b must be at least 20, got 19"):
        frechet_infinity(normal(30, 5), normal(19, 5))
    with pytest.raises(ValueError, match="b must have the 5 features of a, got 4"):
        frechet_infinity(normal(30, 5), known(4, 0, 1)[0])
    with pytest.raises(ValueError, match=r"a must be finite, got 1 NaN .* in sample 0"):
        frechet_infinity(
            torch.full((8, 1), torch.nan).index_fill(0, torch.arange(1, 8), 0), normal(8, 1)
        )


@pytest.mark.slow
@pytest.mark.parametrize(("gap", "scale", "sampled"), [(0.3, 1.0, False), (0.2, 1.5, True)])
def test_intervals_of_infinity_cover(gap, scale, sampled):
    law, truth = known(6, gap, scale)
    generator = torch.Generator().manual_seed(0)
    covered, values, biased = 0, [], 0
    for _ in range(400):
        a, b = torch.randn(2, 300, 6, generator=generator, dtype=F64)
        b = gap + scale * b if sampled else law
        value, (low, high) = frechet_infinity(a, b, generator=generator)
        covered += low <= truth <= high
        values.append(value)
        biased += low <= frechet_unbiased(a, b)[0] <= high
    assert 372 <= covered <= 388  # 95 % ± 2 %
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / 20)
    assert biased == 400  # both estimate the same
