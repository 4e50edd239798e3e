"""Measures of predicted labels, against brute force and closed forms."""

import json
import math

import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score, roc_auc_score

from flowkit.metrics import wilson
from flowkit.metrics.labels import classification_metrics, segmentation_metrics


def _random(n=500, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(n, k, generator=g, dtype=torch.float64)).softmax(1)
    labels = torch.multinomial(p, 1, generator=g)[:, 0]
    return p, labels


def test_accuracy_and_auc_are_those_of_scikit_learn():
    p, labels = _random()
    record = classification_metrics(p, labels)
    assert record["accuracy"] == pytest.approx(accuracy_score(labels, p.argmax(1)))
    expected = roc_auc_score(
        labels, p.double() / p.double().sum(1, keepdim=True), multi_class="ovr"
    )
    assert record["auc"] == pytest.approx(expected, rel=1e-12)
    json.dumps(record)


def test_probabilities_that_are_true_are_calibrated_and_sharpened_ones_are_not():
    p, labels = _random(20_000)
    honest = classification_metrics(p, labels)
    sharp = classification_metrics((4 * p.log()).softmax(1), labels)
    assert honest["calibration_error"] < 0.02
    assert sharp["calibration_error"] > 0.08
    assert honest["accuracy"] == sharp["accuracy"]
    assert honest["negative_log_likelihood"] < sharp["negative_log_likelihood"]
    assert honest["brier_score"] < sharp["brier_score"]
    for confidence, accuracy, share in zip(*honest["reliability"].values(), strict=True):
        assert accuracy == pytest.approx(confidence, abs=4 * (0.25 / (share * 20_000)) ** 0.5)
    assert sum(honest["reliability"]["share"]) == pytest.approx(1)


def test_calibration_error_by_hand():
    p = torch.tensor([[0.75, 0.25]] * 4 + [[0.05, 0.95]] * 2, dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    record = classification_metrics(p, labels, bins=10)
    assert record["calibration_error"] == pytest.approx((4 * 0 + 2 * 0.45) / 6, rel=1e-12)
    assert record["reliability"]["accuracy"] == pytest.approx([0.75, 0.5])


def test_scores_and_bins_by_hand():
    """Four bins: confidences up to .5, and 1/2 itself, lie in the second."""
    p = torch.tensor([[0.5, 0.5], [0.8, 0.2], [0.0, 1.0]], dtype=torch.float64)
    record = classification_metrics(p, torch.tensor([0, 1, 1]), bins=4)
    nll = -(math.log(0.5) + math.log(0.2) + math.log(1.0)) / 3
    assert record["negative_log_likelihood"] == pytest.approx(nll, rel=1e-12)
    assert record["brier_score"] == pytest.approx((0.5 + 1.28 + 0) / 3, rel=1e-12)
    assert record["reliability"]["confidence"] == pytest.approx([0.5, 0.9])
    impossible = classification_metrics(p[2:], torch.tensor([0]))
    assert impossible["negative_log_likelihood"] == pytest.approx(-math.log(1e-6))


def test_the_calibration_error_is_that_of_the_reliability_beside_it():
    """Probabilities of exactly 1, which clipping makes, belong to the last bin."""
    p = torch.tensor([[1.0, 0.0]] * 10 + [[0.97, 0.03]] * 10, dtype=torch.float64)
    labels = torch.tensor([0] * 9 + [1] + [0] * 8 + [1] * 2)
    record = classification_metrics(p, labels)
    assert record["calibration_error"] == pytest.approx(0.985 - 0.85, rel=1e-12)
    assert len(record["reliability"]["share"]) == 1


def test_where_nothing_counts_there_is_no_number():
    masks = torch.zeros(1, 2, 2, dtype=torch.uint8)
    record = segmentation_metrics(masks, masks + 255, 3, ignore_index=255)
    assert [record[name] for name in ("pixel_accuracy", "mean_iou", "foreground_iou")] == [None] * 3
    record = segmentation_metrics(masks, masks, 3)
    assert (record["mean_iou"], record["foreground_iou"]) == (1, None)


def test_the_selective_curve_by_brute_force():
    p, labels = _random(200)
    record = classification_metrics(p, labels, coverages=8)["selective"]
    order = p.max(1).values.argsort(descending=True)
    right = (p.argmax(1) == labels)[order].double()
    assert record["accuracy"] == pytest.approx([right[: 25 * k].mean().item() for k in range(1, 9)])
    risks = [1 - right[:n].mean().item() for n in range(1, 201)]
    assert record["area_under_risk"] == pytest.approx(sum(risks) / 200, rel=1e-12)
    assert record["coverage"] == [k / 8 for k in range(1, 9)]


def test_equally_confident_images_count_by_their_mean_whatever_their_order():
    p = torch.tensor([[0.8, 0.2]] * 4)
    one = classification_metrics(p, torch.tensor([0, 0, 1, 1]), coverages=4)["selective"]
    other = classification_metrics(p, torch.tensor([1, 1, 0, 0]), coverages=4)["selective"]
    assert one["accuracy"] == other["accuracy"] == [0.5] * 4


def test_classes_that_do_not_occur_have_no_auc():
    p, labels = _random(300)
    padded = torch.cat([p, torch.zeros(300, 2)], 1)
    expected = classification_metrics(p, labels)["auc"]
    assert classification_metrics(padded, labels)["auc"] == pytest.approx(expected)
    assert classification_metrics(p[labels == 0], labels[labels == 0])["auc"] is None


def test_iou_is_that_of_scikit_learn():
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (5, 6, 7), generator=g)
    others = torch.randint(4, (5, 6, 7), generator=g)
    masks = torch.where(torch.rand(5, 6, 7, generator=g) < 0.7, truth, others)
    record = segmentation_metrics(masks, truth, num_classes=6)
    a, b = masks.flatten(), truth.flatten()
    assert record["mean_iou"] == pytest.approx(jaccard_score(b, a, average="macro"), rel=1e-12)
    assert record["iou"][:4] == pytest.approx(list(jaccard_score(b, a, average=None)), rel=1e-12)
    assert record["iou"][4:] == [None, None]
    foreground = jaccard_score(b > 0, a > 0)
    assert record["foreground_iou"] == pytest.approx(foreground, rel=1e-12)
    assert foreground < 1
    assert record["pixel_accuracy"] == pytest.approx((a == b).double().mean().item())
    json.dumps(record)


def test_ignored_pixels_do_not_count():
    truth = torch.tensor([[[0, 1, 9], [1, 2, 9]]])
    masks = torch.tensor([[[0, 1, 2], [1, 2, 0]]])
    record = segmentation_metrics(masks, truth, num_classes=3, ignore_index=9)
    assert (record["mean_iou"], record["foreground_iou"], record["num_pixels"]) == (1, 1, 4)
    with pytest.raises(ValueError, match=r"truth must hold labels in \[0, 2\], got values in"):
        segmentation_metrics(masks, truth, num_classes=3)


def test_ties_count_half_in_the_area():
    p = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.2, 0.8], [0.9, 0.1]], dtype=torch.float64)
    # Pairs of class 1 (0.5, 0.8) with class 0 (0.5, 0.1): 1/2 + 1 + 1 + 1 of 4.
    assert classification_metrics(p, torch.tensor([0, 1, 1, 0]))["auc"] == 3.5 / 4


def test_intervals_of_labels_by_hand():
    p, labels = _random(200)
    record = classification_metrics(p, labels)
    assert record["accuracy_interval"] == list(wilson(record["accuracy"], 200))
    # The mean of a sum over images: its deviation is known.
    losses = -p[torch.arange(200), labels].log()
    spread = torch.cat([losses[labels == k] - losses[labels == k].mean() for k in range(4)])
    low, high = record["negative_log_likelihood_interval"]
    assert (low + high) / 2 == pytest.approx(losses.mean().item(), rel=1e-9)
    std = spread.std().item() / 200**0.5
    assert (high - low) / 2 == pytest.approx(2.009575 * std, rel=0.35)  # 3.5 / √100
    for name in ("auc", "calibration_error", "brier_score"):
        low, high = record[f"{name}_interval"]
        assert low < record[name] < high
    low, high = record["selective"]["area_under_risk_interval"]
    assert low < record["selective"]["area_under_risk"] < high
    assert not [name for name in record if name.startswith("area_under_risk")]
    # A perfect order does not vary, but counts as the share of as many images.
    sure = classification_metrics(torch.eye(2)[labels % 2], labels % 2)
    assert (sure["auc"], sure["selective"]["area_under_risk"]) == (1, 0)
    assert sure["auc_interval"] == list(wilson(1, 200))
    assert sure["selective"]["area_under_risk_interval"] == list(wilson(0, 200))
    few = classification_metrics(p[:7], labels[:7])
    assert few["brier_score_interval"] is None
    assert few["accuracy_interval"] is not None


def test_intervals_are_of_halves_of_each_class_and_of_the_range_of_the_number():
    """Equal losses within a class do not vary at all, beyond a loss of 1 nat too."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.05], dtype=torch.float64).repeat_interleave(2)
    p, labels = torch.stack([1 - p, p, 0 * p, 0 * p], 1), torch.arange(4).repeat_interleave(2)
    p = torch.stack([row.roll(int(k) - 1) for row, k in zip(p, labels, strict=True)])
    record = classification_metrics(p, labels)
    for name in ("negative_log_likelihood", "brier_score"):
        assert record[name] > 1
        assert record[f"{name}_interval"] == pytest.approx([record[name]] * 2, abs=1e-6)
    lone = torch.cat([labels, torch.tensor([3, 3, 2, 2])])  # class 0 twice ...
    one = lone[1:]  # ... and then once: all images are one stratum
    low, high = classification_metrics(torch.cat([p, p[:4]])[1:], one)["brier_score_interval"]
    assert low < high


def test_all_confidences_have_a_bin():
    """The first of one bin; sums of 1.0005 pass for 1, and lie in the last."""
    p = torch.tensor([[0.5, 0.5], [1.0005, 0.0]], dtype=torch.float64)
    for bins in (1, 4):
        reliability = classification_metrics(p, torch.tensor([0, 0]), bins=bins)["reliability"]
        assert sum(reliability["share"]) == 1


def test_an_image_is_one_case_of_a_mask():
    """Whole images right or wrong: the pixels of an image do not count as independent."""
    truth = torch.randint(2, (100, 5, 5), generator=torch.Generator().manual_seed(0))
    wrong = (torch.arange(100) % 4 == 0).view(-1, 1, 1)
    record = segmentation_metrics(torch.where(wrong, 1 - truth, truth), truth, 2)
    low, high = record["pixel_accuracy_interval"]
    assert record["pixel_accuracy"] == 0.75
    assert (high - low) / 2 == pytest.approx(2.009575 * (0.75 * 0.25 / 100) ** 0.5, rel=0.35)
    assert record["mean_iou_interval"][0] < record["mean_iou"] < record["mean_iou_interval"][1]


def test_bad_input_is_refused():
    p, labels = _random(10)
    with pytest.raises(ValueError, match=r"labels must have shape \(N,\) beside probabilities"):
        classification_metrics(p, labels[:9])
    with pytest.raises(ValueError, match="probabilities must be non-negative and sum to 1, got"):
        classification_metrics(2 * p, labels)
    with pytest.raises(ValueError, match="probabilities must be finite, got 1 NaN"):
        classification_metrics(
            p.clone().index_fill_(0, torch.tensor([0]), float("nan"))[:, :1], labels * 0
        )
    with pytest.raises(ValueError, match=r"labels must hold labels in \[0, 3\], got values in"):
        classification_metrics(p, labels + 4)
    with pytest.raises(ValueError, match="masks must have the shape of the truth"):
        segmentation_metrics(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).long(), 2)
