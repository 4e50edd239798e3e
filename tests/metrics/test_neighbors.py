"""Kernel distance, precision, recall, density and coverage against brute force."""

import math

import numpy as np
import pytest
import torch

from flowkit.metrics import kid, prdc, prdc_intervals, wilson
from flowkit.metrics.intervals import around, half_sampling, share_interval
from tests.metrics.samples import normal


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
    with pytest.raises(ValueError, match=r"b must have shape \(M, F\) .* got \(40, 4, 1\)"):
        kid(a, b[..., None], 5, 10)


def brute_prdc(real, fake, k):
    def radius(x, i):
        return sorted(math.dist(x[i], y) for y in x)[k]

    real, fake = real.tolist(), fake.tolist()
    inside_real = [[math.dist(x, y) < radius(real, i) for y in fake] for i, x in enumerate(real)]
    inside_fake = [[math.dist(x, y) <= radius(fake, j) for j, y in enumerate(fake)] for x in real]
    columns = list(zip(*inside_real, strict=True))
    closed = [any(math.dist(x, y) <= radius(real, i) for i, x in enumerate(real)) for y in fake]
    return (
        np.mean(closed),
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
    assert np.mean([v.density for v in values]) == pytest.approx(1, abs=0.036)


def test_balls_are_closed_for_precision_and_recall_and_open_for_density_and_coverage():
    """As published: points of distance 1; those of the other set lie on the border of a ball."""
    line, outside = torch.arange(4.0)[:, None], torch.tensor([[-1.0], [4.0]])
    assert prdc(line, outside, 1) == (1.0, 0.5 * 2, 0.0, 0.0)
    assert prdc(line, outside + torch.tensor([[-1e-6], [1e-6]]), 1).precision == 0


def test_copies_of_a_repeated_image_are_precise_and_its_neighbors_are_not():
    """Its closed ball has the radius 0, where squares leave round-off too; the open is empty."""
    image = 50 + normal(1, 30)
    real = torch.cat([image.expand(60, -1), 60 + normal(60, 30, seed=1)])
    fake = torch.cat([image.expand(50, -1), image + 1e-3 * normal(10, 30), normal(60, 30, seed=2)])
    found = prdc(real, fake, 3)
    assert found.precision == 50 / 120
    assert found.recall == 60 / 120
    assert found.density == found.coverage == 0


def test_a_common_translation_changes_no_value():
    """Features far from 0, each by another distance: squares of 1e14 leave no digits of 1."""
    shift = torch.tensor([1e7, -1e7, 3e6])
    real, fake = normal(200, 3), 0.7 * normal(150, 3, seed=1)
    assert prdc(real + shift, fake + shift) == prdc(real, fake)


def test_prdc_errors():
    with pytest.raises(ValueError, match=r"k must lie in \[1, 4\], got 5"):
        prdc(normal(9, 2), normal(5, 2))
    with pytest.raises(ValueError, match=r"fake must have shape \(M, F\) beside real"):
        prdc(normal(9, 2), normal(9, 3))
    with pytest.raises(ValueError, match=r"beside real \(9, 2, 1\), got \(9, 2\)"):
        prdc(normal(9, 2, 1), normal(9, 2))


def test_intervals_come_from_halves_of_each_class():
    """The saturated precision has the width of Wilson's interval of all fake samples."""
    classes = [torch.arange(90) % 3, torch.arange(60) % 2]
    real = normal(90, 2) + 4 * classes[0][:, None]
    fake = 0.3 * normal(60, 2, seed=1) + 4 * classes[1][:, None]
    found, intervals = prdc_intervals(real, fake, 4, strata=(classes[0], classes[1]))
    assert found == prdc(real, fake, 4)
    stds = half_sampling(
        lambda rows, fakes: torch.tensor(prdc(real[rows], fake[fakes], 4)), classes
    )
    assert found.precision == 1
    assert intervals["precision"] == wilson(1.0, 60)
    for k, name in ((1, "recall"), (3, "coverage")):
        expected = share_interval(found[k], stds[k].item(), 90)
        assert intervals[name] == pytest.approx(expected, rel=1e-12)
    assert intervals["density"] == around(found.density, stds[2].item(), (0, math.inf))
    assert intervals["recall"] != prdc_intervals(real, fake, 4)[1]["recall"]
    # Another confidence, and a density near 0.
    found, intervals = prdc_intervals(real, fake + 1, 4, strata=classes, confidence=0.8)
    stds = half_sampling(
        lambda rows, fakes: torch.tensor(prdc(real[rows], fake[fakes] + 1, 4)), classes
    )
    assert intervals["density"] == around(found.density, stds[2].item(), (0, math.inf), 0.8)
    assert intervals["density"].low < 1
    assert intervals["recall"] == share_interval(found.recall, stds[1].item(), 90, 0.8)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 15\], got 16"):
        prdc_intervals(real, fake, 16)
