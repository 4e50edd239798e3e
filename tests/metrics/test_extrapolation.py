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
    """Every k-th of a random order; 5 parts, since each has 4 samples per feature."""
    a, b = normal(103, 5), normal(140, 5, seed=1) + 1
    order = torch.Generator().manual_seed(7)
    sets = [x[torch.randperm(len(x), generator=order)] for x in (a, b)]
    means, inverses = [], []
    for k in range(1, 6):
        parts = [[x[i::k] for i in range(k)] for x in sets]
        means.append(np.mean([frechet_distance(x, y) for x, y in zip(*parts, strict=True)]))
        inverses.append(
            np.mean([len(x) / len(y) for x, ys in zip(sets, parts, strict=True) for y in ys])
        )
    (slope, exact), cov = np.polyfit(inverses, means, 1, cov="unscaled")
    residual = np.array(means) - slope * np.array(inverses) - exact
    error = (residual @ residual / 3 * cov[1, 1]) ** 0.5
    value, (low, high) = frechet_infinity(a, b, generator=torch.Generator().manual_seed(7))
    assert value == pytest.approx(exact, rel=1e-9)
    center, ends = frechet_unbiased(a, b)
    for end, plain in ((low, ends.low), (high, ends.high)):
        reach = ((plain - center) ** 2 + (1.959964 * error) ** 2) ** 0.5
        assert abs(end - value) == pytest.approx(reach, rel=1e-6)


def draws(count, labels, dim, far):
    """Pairs of sets of the same classes, far from each other."""
    means = far * normal(int(labels.max()) + 1, dim, seed=5)[labels]
    for seed in range(count):
        a, b = normal(2, len(labels), dim, seed=100 + seed) + means
        yield a, b


def test_fixed_numbers_per_class_need_strata():
    """Beside the unbiased distance: parts of random classes have a bias that the sets lack."""
    labels = torch.arange(240) % 10
    strata, generator = (labels, labels), torch.Generator().manual_seed(0)
    exact, plain, found = [], [], []
    for a, b in draws(25, labels, 8, 2.0):
        exact.append(frechet_unbiased(a, b, strata=strata)[0])
        plain.append(frechet_infinity(a, b, generator=generator)[0])
        found.append(frechet_infinity(a, b, strata=strata, generator=generator)[0])
    gaps = [(np.mean(values) - np.mean(exact)) / np.std(exact) for values in (found, plain)]
    assert -1 < gaps[0] < 1
    assert gaps[1] < -4


def test_classes_of_any_order_and_size_keep_their_shares():
    """A class that is nowhere near the others, with 3 of 103 samples: each part has one of them."""
    labels = torch.tensor([0] * 3 + [1] * 100)
    a, b = normal(2, 103, 2) + 30 * (labels == 0)[:, None]
    generator = torch.Generator().manual_seed(0)
    _, (low, high) = frechet_infinity(a, b, strata=(labels, labels), generator=generator)
    assert low < 0 < high < 30  # a part with a class twice is 300 away
    with pytest.raises(ValueError, match="each class in strata of b must be at least 3, got 2"):
        frechet_infinity(a, b[1:], strata=(labels, labels[1:]))


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
    with pytest.raises(ValueError, match="the number of samples of b must be at least 60, got 59"):
        frechet_infinity(normal(60, 5), normal(59, 5))
    with pytest.raises(ValueError, match="b must have the 5 features of a, got 4"):
        frechet_infinity(normal(60, 5), known(4, 0, 1)[0])
    with pytest.raises(ValueError, match=r"a must be finite, got 1 NaN .* in sample 0"):
        frechet_infinity(
            torch.full((12, 1), torch.nan).index_fill(0, torch.arange(1, 12), 0), normal(12, 1)
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


@pytest.mark.slow
def test_intervals_of_infinity_cover_at_the_fewest_samples():
    """12 samples per feature; independent, and 12 of each class."""
    law, truth = known(16, 0.1, 1.0)
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(600):
        a = torch.randn(192, 16, generator=generator, dtype=F64)
        _, (low, high) = frechet_infinity(a, law, generator=generator)
        covered += low <= truth <= high
    assert 555 <= covered <= 585  # 95 % ± 2.5 %
    labels, covered = torch.arange(192) % 16, 0
    for a, b in draws(200, labels, 16, 2.0):
        _, (low, high) = frechet_infinity(a, b, strata=(labels, labels), generator=generator)
        covered += low <= 0 <= high
    assert 182 <= covered <= 199  # 95 % ± 3 standard deviations
