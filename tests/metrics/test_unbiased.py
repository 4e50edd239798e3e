"""Unbiased distances: against brute force, and their coverage on known laws."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch.utils._python_dispatch import TorchDispatchMode

from flowkit.metrics import (
    frechet,
    frechet_distance,
    frechet_from_moments,
    frechet_unbiased,
    kernel_distance,
    kid,
)
from flowkit.metrics.intervals import jackknife
from flowkit.metrics.unbiased import _nodes, _rest
from tests.metrics.samples import F64, Mixture, brute_jackknife, normal


def frechet_of(a, b):
    def moments(x, weight):
        mean = weight @ x
        return mean, ((x - mean) * weight[:, None]).T @ (x - mean)

    return lambda *weights: frechet_from_moments(*moments(a, weights[0]), *moments(b, weights[1]))


def kernel_of(a, b):
    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def distance(u, v):
        same = u @ kernel(a, a) @ u + v @ kernel(b, b) @ v
        return (same - 2 * u @ kernel(a, b) @ v).item()

    return distance


@pytest.mark.parametrize(
    ("unbiased", "brute", "rel"),
    [(frechet_unbiased, frechet_of, 1e-6), (kernel_distance, kernel_of, 1e-9)],
)
def test_both_sets_lose_each_sample_within_its_class(unbiased, brute, rel):
    """Classes of unequal sizes, and of two samples in the other set."""
    a, b = normal(40, 4), 1.3 * normal(40, 4, seed=1) + 0.4
    labels = torch.arange(40) % 3, torch.arange(40) % 20
    a, b = a + 2 * labels[0][:, None], b + labels[1][:, None] / 4
    value, left_out = brute_jackknife(brute(a, b), (a, b), labels)
    estimate, variance = value, 0.0
    for values in left_out:
        count = len(values)
        estimate -= (count - 1) * (np.mean(values) - value)
        variance += (count - 1) / count * np.sum((np.array(values) - np.mean(values)) ** 2)
    found, (low, high) = unbiased(a, b, strata=labels)
    assert found == pytest.approx(estimate, rel=rel)
    # Far from 0 both ends solve (T − δ)² = z² r (δ + B / 2) with r = V / D.
    assert low > 0
    for end in (low, high):
        spread = variance / value * (end + (value - estimate) / 2)
        assert (found - end) ** 2 == pytest.approx(1.959964**2 * spread, rel=1e-5)


def test_one_class_is_no_class():
    a, b = normal(60, 5), normal(60, 5, seed=1)
    one = torch.full((60,), 7)
    for unbiased in (frechet_unbiased, kernel_distance):
        plain = unbiased(a, b)
        assert unbiased(a, b, strata=(one, None)) == plain
        assert unbiased(a, b, strata=(one, torch.arange(60) % 2)) != plain
        # In the other order the same, also for unequal numbers and classes.
        some = (torch.arange(40) % 4, torch.arange(60) % 3)
        swapped = unbiased(b, a[:40], strata=some[::-1])
        assert unbiased(a[:40], b, strata=some)[0] == pytest.approx(swapped[0], rel=1e-7)
        assert unbiased(a[:40], b, strata=some)[1] == pytest.approx(swapped[1], rel=1e-7)


def test_fixed_numbers_per_class_need_strata():
    """Far classes: their numbers hardly vary, though a jackknife without them thinks so."""
    law, generator = Mixture(10, 6), torch.Generator().manual_seed(0)
    law.means *= 3
    plain, strata = [], []
    for _ in range(40):
        (a, labels), (b, _) = (law.draw(120, generator, fixed=True) for _ in range(2))
        plain.append(frechet_unbiased(a, b)[0])
        strata.append(frechet_unbiased(a, b, strata=(labels, labels))[0])
    error = np.std(strata) / 40**0.5
    assert abs(np.mean(strata)) < 3 * error
    assert np.mean(plain) < -20 * error


def test_unequal_numbers_leave_less_than_a_deviation():
    """64 features: without the law of Marchenko and Pastur the mean is 1.4 deviations below 0."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(40):
        a = torch.randn(160, 64, generator=generator, dtype=F64)
        b = torch.randn(1500, 64, generator=generator, dtype=F64)
        values.append(frechet_unbiased(a, b)[0])
    assert abs(np.mean(values)) < 0.75 * np.std(values)
    assert frechet_distance(a, b) > 30 * np.std(values)


class Largest(TorchDispatchMode):
    """Keeps the number of values in the largest new tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        parts = found if isinstance(found, (tuple, list)) else [found]
        self.numel = max(self.numel, *(x.numel() for x in parts if isinstance(x, torch.Tensor)), 0)
        return found


def test_blocks_of_samples_give_the_value_of_all_at_once(monkeypatch):
    """No tensor is as large as the features, and the results agree to round-off."""
    a, b = normal(600, 4) @ normal(4, 4, seed=2) + 3, normal(200, 4, seed=1)
    strata = torch.arange(600) % 2, None
    monkeypatch.setattr(frechet, "ROWS", 600)
    whole, plain = frechet_unbiased(a, b, strata=strata), frechet_distance(a, b)
    monkeypatch.setattr(frechet, "ROWS", 5)
    with Largest() as most:
        value, ends = frechet_unbiased(a, b, strata=strata)
        assert frechet_distance(a, b) == pytest.approx(plain, rel=1e-10)
    assert [value, *ends] == pytest.approx([whole[0], *whole[1]], rel=1e-10)
    assert most.numel == 600  # a number for each sample


def mean_root(c):
    """Return ``E √λ`` under the law of Marchenko and Pastur of ratio ``c < 1``."""
    low, width = (1 - c**0.5) ** 2, 4 * c**0.5

    def part(angle):  # λ = low + width sin²
        value = low + width * np.sin(angle) ** 2
        return (width * np.sin(angle) * np.cos(angle)) ** 2 / (np.pi * c * value**0.5)

    return quad(part, 0, np.pi / 2)[0]


@pytest.mark.parametrize("numbers", [(100, 200), (20, 1000), (1000, 20)])
def test_what_the_jackknife_leaves_follows_the_law_of_marchenko_and_pastur(numbers):
    """Of a bias ``β(ν) = −2 F (E √λ − 1)`` of equal covariances it leaves ``(ν β)'``."""
    eye, number = torch.eye(8, dtype=F64), 1 / abs(1 / numbers[0] - 1 / numbers[1])

    def whole(number):
        return -2 * 8 * number * (mean_root(8 / number) - 1)

    step = 1e-3 * number
    slope = (whole(number + step) - whole(number - step)) / (2 * step)
    # Roots 2 and 3 of the covariances: the trace of the root is 6 F.
    assert _rest(2 * eye, 3 * eye, *numbers) == pytest.approx(6 * slope, rel=1e-5)


def test_nodes_integrate_the_roots_of_very_different_eigenvalues():
    """``1/π ∫ (m / (s² + m))² ds = √m / 4``."""
    squares = torch.tensor([1e-12, 1e12, 1e36], dtype=F64)
    nodes, steps = _nodes(squares)
    found = (squares[:, None] / (nodes**2 + squares[:, None])).square() @ steps
    torch.testing.assert_close(found, squares.sqrt() / 4, rtol=1e-8, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_unbiased_distance_is_quadratic_in_the_scale(scale):
    a, b = normal(60, 4), 2 * normal(40, 4, seed=1)
    b[:, 3] = 3.0
    value, interval = frechet_unbiased(a, b)
    scaled, wider = frechet_unbiased(scale * a, scale * b)
    assert scaled / scale**2 == pytest.approx(value, rel=1e-9)
    assert [end / scale**2 for end in wider] == pytest.approx(interval, rel=1e-9)


def test_constant_features_add_nothing():
    a, b = normal(60, 4), 1.5 * normal(60, 4, seed=1)
    padded = [torch.cat([x, torch.full((60, 2), 3.0)], 1) for x in (a, b)]
    value, interval = frechet_unbiased(a, b)
    more, wider = frechet_unbiased(*padded)
    assert more == pytest.approx(value, rel=1e-7)
    assert wider == pytest.approx(interval, rel=1e-7)
    # One set has no spread at all: only means and traces, which have closed forms.
    point = torch.zeros(60, 4)
    exact = (a.mean(0).square() + (1 - 1 / 60) * a.var(0)).sum().item()
    assert frechet_unbiased(a, point)[0] == pytest.approx(exact, rel=1e-9)
    assert frechet_unbiased(point, point + 1) == (4, (4, 4))
    for unbiased in (frechet_unbiased, kernel_distance):
        assert unbiased(point, point[:30]) == (0, (0, 0))
    # Spread in different directions, and unequal numbers: again no trace of a root.
    a, b = a[:40].clone(), b.clone()
    a[:, 2:], b[:, :2] = 0, 1
    gap = (a.mean(0) - b.mean(0)).square().sum()
    exact = gap + sum((1 - 1 / len(x)) * x.var(0).sum() for x in (a, b))
    assert frechet_unbiased(a, b)[0] == pytest.approx(exact.item(), rel=1e-9)


def test_the_kernel_distance_is_the_mean_of_kid_over_subsets():
    a, b = normal(40, 3), normal(40, 3, seed=1) + 0.5
    value, _ = kernel_distance(a, b)
    assert value == pytest.approx(kid(a, b, subsets=1, subset_size=40).mean, rel=1e-10)
    halves = kid(a, b, subsets=400, subset_size=20, generator=torch.Generator().manual_seed(0))
    assert value == pytest.approx(halves.mean, abs=4 * halves.std / 20)


@pytest.mark.parametrize(
    ("value", "rest", "spread"),
    [(9, 0, 0.01), (0.5, 0, 0.01), (0.3, 0.1, 0.01), (0.12, 0, 0.01), (0.02, 0, 0.001)],
)
def test_the_ends_of_the_interval_solve_their_equation(value, rest, spread):
    """Far, near, and far below 0, where both ends are negative."""
    changes, strata = [spread * normal(50) + 0.005], [torch.arange(50) % 2]
    estimate, (low, high) = jackknife(value, changes, strata, 0.9, rest)
    bias = sum(24 * changes[0][k::2].mean().item() for k in (0, 1)) + rest
    assert estimate == pytest.approx(value - bias, rel=1e-12)
    variance = sum(24**2 / 25 * changes[0][k::2].var().item() for k in (0, 1))
    for end in (low, high):
        square = 1.6448536**2 * variance / value * (max(end, 0) + bias / 2)
        assert (estimate - end) ** 2 == pytest.approx(square, rel=1e-6)
    assert low < estimate < high


def test_the_same_samples_have_a_finite_interval():
    """The value is 0 to round-off, which is no scale for the ratio of variance and distance."""
    a = normal(50, 3)
    value, (low, high) = frechet_unbiased(a, a)
    assert low < value < 0 < high < 3


def test_more_samples_in_one_set_widen_the_interval():
    """Equal laws of 128 features, 256 and 2560 samples: half of the correction on each side."""
    generator = torch.Generator().manual_seed(5)
    covered = 0
    for _ in range(12):
        a, b = torch.randn(2816, 128, generator=generator).double().split([256, 2560])
        _, (low, high) = frechet_unbiased(a, b)
        covered += low <= 0 <= high
    assert covered >= 10


@pytest.mark.parametrize("dim", [1, 4])
def test_two_samples_per_feature_are_enough(dim):
    sets = normal(2 * dim, dim), 2 * normal(2 * dim, dim, seed=1)
    labels = [torch.zeros(2 * dim)] * 2
    value, left_out = brute_jackknife(frechet_of(*sets), sets, labels)
    bias = sum((2 * dim - 1) * (np.mean(values) - value) for values in left_out)
    assert frechet_unbiased(*sets)[0] == pytest.approx(value - bias, rel=1e-6)


def test_unbiased_errors():
    a = normal(10, 3)
    with pytest.raises(ValueError, match="b must have at least 2 samples per feature, got 5 sam"):
        frechet_unbiased(a, a[:5])
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=f"confidence must lie .* 0 and 1, got {confidence}$"):
            frechet_unbiased(a, a, confidence=confidence)
    alone = torch.tensor([1] * 9 + [4])
    for unbiased in (frechet_unbiased, kernel_distance):
        with pytest.raises(
            ValueError, match=r"strata of b must hold at least 2 .* one of class 4;"
        ):
            unbiased(a, a, strata=(None, alone))
        with pytest.raises(ValueError, match=r"strata of a must have shape \(10,\), got \(9,\)"):
            unbiased(a, a, strata=(alone[:9], None))
        with pytest.raises(TypeError, match="strata of a must hold integer labels"):
            unbiased(a, a, strata=(alone / 2, None))
        for wrong in (alone, (alone,)):
            with pytest.raises(TypeError, match="strata must be the labels of both sets, got"):
                unbiased(a, a, strata=wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixed", "shift"),
    [
        ((True, True), 0.0),
        ((True, True), 0.25),
        ((True, False), 0.25),
        ((True, False), 0.0),
        ((False, False), 0.6),
    ],
)
def test_intervals_cover_the_true_distance(shift, fixed):
    """Independent, stratified and half-stratified draws; equal, near and far laws."""
    first, second = Mixture(5, 6), Mixture(5, 6, shift=shift, scale=1 + shift / 2)
    truth = frechet_from_moments(*first.moments(), *second.moments())
    generator, covered, values = torch.Generator().manual_seed(0), 0, []
    for _ in range(400):
        (a, y), (b, z) = first.draw(300, generator, fixed[0]), second.draw(200, generator, fixed[1])
        strata = (y if fixed[0] else None, z if fixed[1] else None)
        value, (low, high) = frechet_unbiased(a, b, strata=strata)
        covered += low <= truth <= high
        values.append(value)
    assert 366 <= covered <= 395  # 95 % ± 3.2 standard deviations
    assert np.mean(values) == pytest.approx(truth, abs=4 * np.std(values) / 20)
