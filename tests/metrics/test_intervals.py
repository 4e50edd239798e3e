"""Intervals of shares, halves and other metrics: closed forms, and coverage."""

import numpy as np
import pytest
import torch

from flowkit.metrics import point_metrics, prdc, prdc_intervals, wasserstein2_interval, wilson
from flowkit.metrics.intervals import around, half_sampling, share_interval
from flowkit.metrics.labels import classification_metrics, segmentation_metrics
from flowkit.sampling import Solution
from tests.metrics.samples import F64, Mixture, normal


@pytest.mark.parametrize(("hits", "count"), [(8, 10), (1, 40), (199, 200), (50, 100)])
def test_both_ends_of_wilson_solve_its_equation(hits, count):
    for confidence, z in ((0.95, 1.9599640), (0.8, 1.2815516)):
        low, high = wilson(hits / count, count, confidence)
        assert 0 < low < hits / count < high < 1
        for end in (low, high):
            assert (hits / count - end) ** 2 == pytest.approx(
                z**2 * end * (1 - end) / count, rel=1e-6
            )


def test_wilson_of_cases_that_agree_has_a_width():
    z2 = 1.9599640**2
    assert wilson(1.0, 30) == pytest.approx((30 / (30 + z2), 1.0), rel=1e-7)
    assert wilson(0.0, 30) == pytest.approx((0.0, z2 / (30 + z2)), rel=1e-7)
    for count in range(1, 200):  # round-off puts no end out of range
        assert wilson(1.0, count).high == 1
        assert wilson(0.0, count).low == 0


def test_a_share_counts_as_the_cases_of_its_deviation():
    # (0.25 · 96 + 2) / 100 = 0.26
    assert share_interval(0.25, 0.1, 96) == pytest.approx(wilson(0.25, 0.26 * 0.74 / 0.01))
    assert share_interval(1.0, 0.0, 96) == wilson(1.0, 96)
    assert share_interval(0.5, 1e-9, 96) == wilson(0.5, 96)  # no more cases than samples
    assert share_interval(0.5, 0.0, 96, 0.8) == wilson(0.5, 96, 0.8)


def test_the_interval_around_a_value_is_clipped():
    assert around(0.5, 0.1) == pytest.approx((0.5 - 0.2009575, 0.5 + 0.2009575))  # t₄₉ = 2.00958
    assert around(0.9, 0.1) == pytest.approx((0.9 - 0.2009575, 1))
    assert around(0.1, 0.1, (0, 5), 0.9, freedom=9) == pytest.approx((0, 0.1 + 0.1833113))


@pytest.mark.parametrize(("largest", "skip"), [(2000, 2), (150, 4)])
def test_halves_give_the_deviation_of_a_mean(largest, skip):
    """Over draws of halves: var(x) / N, and only the variance within classes with classes."""
    x = normal(600) + 10 * (torch.arange(600) % 3)
    sizes = []

    def measure(rows):
        sizes.append(len(rows))
        assert len(rows.unique()) == len(rows)
        return x[rows].mean()[None]

    for labels, expected in (
        (torch.zeros(600).long(), x.var().item()),
        (torch.arange(600) % 3, (x - x.view(-1, 3).mean(0).repeat(200)).square().mean().item()),
    ):
        std = half_sampling(measure, [labels], 400, largest).item()
        assert std == pytest.approx((expected / 600) ** 0.5, rel=0.15)  # 4 / √800
    assert set(sizes) == {600 // skip}


def test_each_sample_is_in_half_of_the_halves():
    """Classes of three samples, of which a half takes one or two."""
    counts = torch.zeros(30)

    def count(rows):
        counts[rows] += 1
        return torch.zeros(1)

    half_sampling(count, [torch.arange(30) // 3], 400)
    assert (counts / 400 - 0.5).abs().max() < 0.1  # 4 standard deviations


def test_a_small_set_beside_a_large_one_keeps_its_neighbors():
    found, intervals = prdc_intervals(normal(4001, 2), normal(8, 2, seed=1), 2)
    assert intervals["recall"].low <= found.recall <= intervals["recall"].high
    sizes = set()
    half_sampling(
        lambda *rows: torch.tensor([sizes.add(tuple(map(len, rows))) or 0.0]),
        [torch.zeros(n).long() for n in (5000, 100)],
        largest=500,
        fewest=20,
    )
    assert sizes == {(1000, 20)}


def test_the_interval_of_w2_has_the_deviation_of_a_translation():
    """Far apart W2² varies as 2 ‖shift‖ (mean b − mean a), and single points as their distance."""
    a, b = normal(300, 2), normal(300, 2, seed=1)
    shift = torch.tensor([1e4, 0.0], dtype=F64)
    value, (low, high) = wasserstein2_interval(a, b + shift)
    std = ((a[:, 0].var() + b[:, 0].var()) / 300).sqrt().item()
    assert (high - low) / 2 == pytest.approx(1.959964 * std, rel=1e-3)
    assert low < value < high
    ninety = wasserstein2_interval(a, b + shift, confidence=0.9)[1]
    assert (ninety.high - ninety.low) / (high - low) == pytest.approx(1.644854 / 1.959964, rel=1e-3)
    # Two small sets of the same kind: W2² is .02, and its potentials are 0 and .04.
    value, (low, high) = wasserstein2_interval(torch.tensor([[0.0], [0.2]]), torch.zeros(3, 1))
    assert (value**2, low) == pytest.approx((0.02, 0))
    assert high**2 == pytest.approx(0.02 + 1.959964 * 0.02, rel=1e-6)
    with pytest.raises(ValueError, match="the number of points must be at least 2, got 1"):
        wasserstein2_interval(a[:1], b)


def test_intervals_of_the_path_energy():
    """Constant velocities towards far points: energy and W2² both vary with the distances."""
    source, gap = normal(200, 2), torch.tensor([1e4, 0.0], dtype=F64)
    ends = normal(200, 2, seed=1) + gap
    record = point_metrics(normal(200, 2, seed=2) + gap, ends, torch.stack([source, ends]), 1)
    energies = (ends - source).square().sum(1)
    low, high = record["path_energy_interval"]
    student = 1.9719565  # t₁₉₉
    error = student * (energies.var() / 200).sqrt().item()
    assert (high + low) / 2 == pytest.approx(energies.mean().item())
    assert (high - low) / 2 == pytest.approx(error, rel=1e-6)
    # The part of the source cancels in the ratio: energy and W2² lose the same by a shift of it.
    low, high = record["normalized_path_energy_interval"]
    both = (ends[:, 0].var() + normal(200, 2, seed=2)[:, 0].var()).item()
    ends_of_ratio = student * 2 / 1e4 * (both / 200) ** 0.5
    ratio = record["path_energy"] / record["transport_w2_squared"] - 1
    expected = sorted(abs(ratio + sign * ends_of_ratio) for sign in (-1, 1))
    assert abs(ratio) > ends_of_ratio  # both ends on one side of 0
    assert [low, high] == pytest.approx(expected, abs=0.02 * ends_of_ratio)
    straight = point_metrics(ends, ends, torch.stack([source, source + gap]), 1)
    assert straight["normalized_path_energy_interval"][0] == 0
    assert record["w2_squared_interval"] == pytest.approx([end**2 for end in record["w2_interval"]])
    assert record["transport_w2_interval"][0] < record["transport_w2"]


def test_intervals_of_a_short_path_by_hand():
    """From one source to the points 1 and 2: W2² = 2.5, and the potentials are 0 and 1, 4."""
    energies = torch.tensor([0.25, 0.5, 0.75], dtype=F64)[:, None]
    path = torch.stack([torch.zeros_like(energies), energies.sqrt()])
    real = torch.tensor([[1.0], [2.0]], dtype=F64)
    record = point_metrics(real, path[1], Solution(path[1], 1, 3, path), 1)
    assert record["transport_w2_squared"] == pytest.approx(2.5)
    assert record["normalized_path_energy"] == pytest.approx(0.8)
    student = 4.3026527  # t₂, for three trajectories
    reach = student * (0.0625 / 3) ** 0.5
    assert record["path_energy_interval"] == pytest.approx([0, 0.5 + reach], rel=1e-6)
    # The ratio is .2, and its interval above −1 has the ends −1 and −.8 + reach < 0.
    reach = student * (0.0625 / 3 + 0.2**2 * 4.5 / 2) ** 0.5 / 2.5
    interval = record["normalized_path_energy_interval"]
    assert interval == pytest.approx([0.8 - reach, 1], rel=1e-6)


@pytest.mark.slow
def test_intervals_of_neighbors_cover_the_mean():
    law, generator = Mixture(5, 4), torch.Generator().manual_seed(0)
    found, ends = [], []
    for _ in range(100):
        (a, y), (b, z) = law.draw(100, generator, True), law.draw(80, generator, True)
        values, intervals = prdc_intervals(a, b, 3, strata=(y, z))
        assert values == prdc(a, b, 3)
        found.append(values)
        ends.append([intervals[name] for name in values._fields])
    mean = np.mean(found, 0)
    low, high = np.array(ends)[..., 0], np.array(ends)[..., 1]
    covered = ((low <= mean) & (mean <= high)).mean(0)
    assert (covered >= 0.88).all()  # 95 % − 3.2 standard deviations
    assert ((high - low).mean(0) < 7 * np.std(found, 0)).all()


@pytest.mark.slow
@pytest.mark.parametrize("far", [0.3, 1.0])
def test_intervals_of_w2_cover_the_mean(far):
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(300):
        a, b = torch.randn(2, 200, 2, generator=generator, dtype=F64)
        value, (low, high) = wasserstein2_interval(a, 1.2 * b + far)
        found.append((value, low, high))
    values, low, high = np.array(found).T
    covered = ((low <= values.mean()) & (values.mean() <= high)).mean()
    assert 0.91 <= covered <= 0.985  # 95 % ± 3 standard deviations


@pytest.mark.slow
def test_intervals_of_labels_cover_the_mean():
    generator, found = torch.Generator().manual_seed(0), []
    names = ["accuracy", "calibration_error", "negative_log_likelihood", "brier_score"]
    for _ in range(100):
        labels = torch.arange(150) % 3
        logits = 2 * torch.nn.functional.one_hot(labels, 3) + torch.randn(
            150, 3, generator=generator
        )
        record = classification_metrics(logits.double().softmax(1), labels)
        share = torch.rand(40, 1, 1, generator=generator) / 2
        truth = torch.randint(3, (40, 6, 6), generator=generator)
        wrong = torch.rand(40, 6, 6, generator=generator) < share
        record |= segmentation_metrics(torch.where(wrong, 0, truth), truth, 3)
        keys = [*names, "pixel_accuracy", "mean_iou", "foreground_iou"]
        found.append([[record[key], *record[f"{key}_interval"]] for key in keys])
    values, low, high = np.moveaxis(np.array(found), 2, 0)
    covered = ((low <= values.mean(0)) & (values.mean(0) <= high)).mean(0)
    assert (covered >= 0.88).all()  # 95 % − 3.2 standard deviations
    assert ((high - low).mean(0) < 5 * values.std(0)).all()
