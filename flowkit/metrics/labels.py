"""Quality of predicted labels: classes of images with probabilities, and labels of pixels."""

from collections.abc import Callable
from math import inf, isnan, nan
from typing import Any

import torch
from torch import Tensor

from flowkit.checks import as_labels, check_finite, check_labels
from flowkit.metrics.intervals import around, as_strata, half_sampling, share_interval, wilson

Scores = dict[str, float | None]
BOUNDS = {"negative_log_likelihood": (0.0, inf), "brier_score": (0.0, 2.0)}
"""Ranges of the metrics that have another range than [0, 1]."""
FEWEST = 8
"""Below this number of images, no intervals are computed from halves of the images."""


def classification_metrics(
    probabilities: Tensor, labels: Tensor, bins: int = 15, coverages: int = 20
) -> dict[str, Any]:
    """Compare class probabilities with the true classes.

    The confidence of an image is the probability of its most probable class. The metrics are:

    - ``accuracy``: share of images whose most probable class is the true class.
    - ``auc``: area under the receiver operating characteristic curve, one class against the rest,
      averaged over the classes in ``labels``; None if there is only one class.
    - ``calibration_error``: ``Σ_b share_b · |confidence_b − accuracy_b|`` over bins of confidence.
    - ``negative_log_likelihood``: mean of ``−log p`` of the true class in nats, with ``p`` at least
      1e-6.
    - ``brier_score``: mean of ``Σ_k (p_k − y_k)²``, with the one-hot true class ``y``.
    - ``reliability``: ``confidence``, ``accuracy`` and ``share`` of each bin with images.
    - ``selective``: for each ``coverage``, the ``accuracy`` of this share of the images, the most
      confident ones; ``area_under_risk`` is the mean error over all coverages.
    - ``…_interval`` of a number: its interval of a nominal coverage of 95 %, for the mean of the
      number over draws of this many images of each class. It is `wilson` for the accuracy, and else
      from random halves of each class, see `flowkit.metrics.intervals.half_sampling`; None for
      fewer than 8 images. ``auc`` and ``area_under_risk`` take it as shares of the images.

    Sources: Guo et al., *On Calibration of Modern Neural Networks*, 2017 (arXiv 1706.04599),
    equation 3; Geifman & El-Yaniv, *Selective Classification for Deep Neural Networks*, 2017
    (arXiv 1705.08500).

    Args:
        probabilities: Class probabilities ``(N, K)``; each row has the sum 1.
        labels: The true classes ``(N,)`` in ``[0, K)``.
        bins: Number of bins of confidence, all of the same width.
        coverages: Number of points of the selective curve.

    Returns:
        A record of plain types for JSON.

    Raises:
        ValueError: If a shape is wrong, or a value is out of range.
        TypeError: If ``labels`` does not hold integers.

    >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    >>> record = classification_metrics(p, torch.tensor([0, 1, 1]), coverages=3)
    >>> round(record["accuracy"], 3), [round(a, 3) for a in record["selective"]["accuracy"]]
    (0.667, [1.0, 1.0, 0.667])
    """
    labels = as_labels(labels, "labels")
    _check(probabilities, labels)
    probabilities = probabilities.double()
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()

    def scores(rows: Tensor | slice) -> Scores:
        reliability = _reliability(confidence[rows], right[rows], bins)
        selective = _selective(confidence[rows], right[rows], coverages)
        return {
            **_scores(probabilities[rows], labels[rows]),
            "calibration_error": sum(
                share * abs(sure - accurate)
                for sure, accurate, share in zip(*reliability.values(), strict=True)
            ),
            "area_under_risk": selective["area_under_risk"],
        }

    found = _with_intervals(scores, len(labels), labels)
    selective = _selective(confidence, right, coverages)
    area = "area_under_risk_interval"
    return {
        "num_samples": len(labels),
        "accuracy": right.mean().item(),
        "accuracy_interval": list(wilson(right.mean().item(), len(right))),
        **{k: v for k, v in found.items() if not k.startswith("area_under_risk")},
        "reliability": _reliability(confidence, right, bins),
        "selective": {**selective, area: found[area]},
    }


def _scores(probabilities: Tensor, labels: Tensor) -> Scores:
    """Return the numbers of `classification_metrics` that need the probabilities of all classes."""
    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1])
    present = labels.unique().tolist() if len(labels.unique()) > 1 else []
    areas = [_area(probabilities[:, k], labels == k) for k in present]
    return {
        "auc": sum(areas) / len(areas) if areas else None,
        "negative_log_likelihood": -probabilities[truth.bool()].clamp_min(1e-6).log().mean().item(),
        "brier_score": (probabilities - truth).square().sum(1).mean().item(),
    }


def _area(scores: Tensor, positive: Tensor) -> float:
    """Return the share of pairs whose positive case has the higher score; ties count half."""
    above, others = scores[positive], scores[~positive].sort().values
    ranks = torch.searchsorted(others, above) + torch.searchsorted(others, above, right=True)
    return ranks.double().mean().item() / (2 * len(others))


def _with_intervals(
    scores: Callable[[Tensor | slice], Scores], count: int, labels: Tensor | None
) -> dict[str, Any]:
    """Return the scores of all images, and the interval of each from halves of the images."""
    found = scores(slice(None))
    stds = dict.fromkeys(found, nan)
    if count >= FEWEST:
        several = labels is not None and int(labels.unique(return_counts=True)[1].min()) > 1
        strata = as_strata(labels if several else None, count, "labels")
        halves = half_sampling(
            lambda rows: torch.tensor(
                [nan if value is None else value for value in scores(rows).values()]
            ),
            [strata],
        )
        stds = dict(zip(found, halves.tolist(), strict=True))
    record: dict[str, Any] = {}
    for name, value in found.items():
        record[name], interval = value, None
        if value is not None and not isnan(stds[name]):
            if name in ("auc", "area_under_risk"):
                interval = list(share_interval(value, stds[name], count))
            else:
                interval = list(around(value, stds[name], BOUNDS.get(name, (0.0, 1.0))))
        record[f"{name}_interval"] = interval
    return record


def segmentation_metrics(
    masks: Tensor, truth: Tensor, num_classes: int, ignore_index: int | None = None
) -> dict[str, Any]:
    """Compare predicted masks with true masks.

    The intersection over union (IoU) of a class is
    ``|predicted ∩ true| / |predicted ∪ true|`` over the pixels of all images together. The metrics
    are:

    - ``pixel_accuracy``: share of pixels with the true label.
    - ``mean_iou``: mean of ``iou`` over the classes that are predicted or true.
    - ``foreground_iou``: IoU of the union of all classes except 0; None if there is no such pixel.
    - ``iou``: IoU of each class; None for a class that is neither predicted nor true.

    If all pixels are ignored, all metrics are None. The ``…_interval`` of the first three has a
    nominal coverage of 95 % for the mean over draws of this many images. It comes from random
    halves of the images, since the pixels of an image are not independent; None for fewer than 8
    images.

    Args:
        masks: Predicted labels ``(N, H, W)``.
        truth: True labels ``(N, H, W)``.
        num_classes: Number of classes; label 0 is the background.
        ignore_index: True label of the pixels that are ignored; None ignores no pixel.

    Returns:
        A record of plain types for JSON.

    Raises:
        ValueError: If the shapes differ, or a label is out of range.
        TypeError: If a mask does not hold integers.

    >>> truth = torch.tensor([[[0, 1], [1, 2]]])
    >>> record = segmentation_metrics(torch.tensor([[[0, 1], [2, 2]]]), truth, num_classes=3)
    >>> round(record["mean_iou"], 3), record["foreground_iou"]
    (0.667, 1.0)
    """
    if masks.shape != truth.shape:
        raise ValueError(
            f"masks must have the shape of the truth, {tuple(truth.shape)}, "
            f"got {tuple(masks.shape)}"
        )
    masks, truth = as_labels(masks, "masks"), as_labels(truth, "truth")
    counted = torch.ones_like(truth, dtype=torch.bool)
    if ignore_index is not None:
        counted = truth != ignore_index
    check_labels(masks[counted], num_classes, "masks")
    check_labels(truth[counted], num_classes, "truth")
    size = max(1, 10_000_000 // num_classes**2)  # images at a time, for the memory
    parts = [
        _pixel_counts(*part, num_classes)
        for part in zip(masks.split(size), truth.split(size), counted.split(size), strict=True)
    ]
    overlaps, unions, front = (torch.cat(kind) for kind in zip(*parts, strict=True))
    pixels = counted.flatten(1).sum(1)

    def scores(rows: Tensor | slice) -> Scores:
        iou = overlaps[rows].sum(0) / unions[rows].sum(0)  # NaN for a class without a pixel
        overlap, union = front[rows].sum(0)
        values = {
            "pixel_accuracy": overlaps[rows].sum() / pixels[rows].sum(),
            "mean_iou": iou.nanmean(),
            "foreground_iou": overlap / union,
        }
        return {name: None if v.isnan() else v.item() for name, v in values.items()}

    iou = overlaps.sum(0) / unions.sum(0)
    return {
        "num_pixels": int(pixels.sum()),
        **_with_intervals(scores, len(truth), None),
        "iou": [None if v != v else v for v in iou.tolist()],
    }


def _pixel_counts(
    masks: Tensor, truth: Tensor, counted: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Count the pixels of each of ``B`` images.

    Returns:
        Intersection ``(B, K)`` and union ``(B, K)`` of each class, and both of all classes except 0
        together ``(B, 2)``.
    """
    shape = (len(masks), num_classes, num_classes)
    first = torch.arange(len(masks), device=masks.device).view(-1, *(1,) * (masks.ndim - 1))
    cells = ((first * num_classes + truth) * num_classes + masks)[counted]
    table = cells.bincount(minlength=len(masks) * num_classes**2).view(shape).double()
    overlaps = table.diagonal(dim1=1, dim2=2)
    both = table[:, 1:, 1:].sum((1, 2))
    either = table.sum((1, 2)) - table[:, 0, 0]
    return overlaps, table.sum(1) + table.sum(2) - overlaps, torch.stack([both, either], 1)


def _check(probabilities: Tensor, labels: Tensor) -> None:
    """Check the shapes and values of probabilities ``(N, K)`` and labels ``(N,)``."""
    if probabilities.ndim != 2 or labels.shape != (len(probabilities),) or not len(labels):
        raise ValueError(
            "labels must have shape (N,) beside probabilities (N, K), "
            f"got {tuple(labels.shape)} beside {tuple(probabilities.shape)}"
        )
    check_labels(labels, probabilities.shape[1], "labels")
    check_finite(probabilities, "probabilities")
    low, total = probabilities.min().item(), probabilities.sum(1)
    if low < 0 or not bool(((total - 1).abs() < 1e-3).all()):
        raise ValueError(
            "probabilities must be non-negative and sum to 1, got a smallest value of "
            f"{low} and sums in [{total.min().item()}, {total.max().item()}]"
        )


def _reliability(confidence: Tensor, right: Tensor, bins: int) -> dict[str, list[float]]:
    """Return mean confidence, accuracy and share of images for each bin with images."""
    index = (confidence * bins).ceil().clamp(max=bins).long() - 1
    rows = [index == b for b in range(bins) if bool((index == b).any())]
    return {
        "confidence": [confidence[row].mean().item() for row in rows],
        "accuracy": [right[row].mean().item() for row in rows],
        "share": [row.double().mean().item() for row in rows],
    }


def _selective(confidence: Tensor, right: Tensor, coverages: int) -> dict[str, Any]:
    """Return the selective curve. Images of equal confidence share their mean accuracy."""
    levels, group = confidence.unique(return_inverse=True)
    sums = torch.zeros_like(levels).index_add_(0, group, right)
    fair = sums / torch.zeros_like(levels).index_add_(0, group, torch.ones_like(right))
    ordered = fair[group][confidence.argsort(descending=True)]
    running = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    counts = [-(-len(ordered) * k // coverages) for k in range(1, coverages + 1)]
    return {
        "coverage": [count / len(ordered) for count in counts],
        "accuracy": [running[count - 1].item() for count in counts],
        "area_under_risk": (1 - running).mean().item(),
    }
