"""How good predicted labels are: of images, with their probabilities, and of pixels."""

from typing import Any

import torch
from torch import Tensor

from flowkit.checks import as_labels, check_finite, check_labels


def classification_metrics(
    probabilities: Tensor, labels: Tensor, bins: int = 15, coverages: int = 20
) -> dict[str, Any]:
    """Measure class probabilities against the truth.

    - ``accuracy`` of the most probable class, over all images alike.
    - ``auc``: area under the receiver operating curve, one class against the rest, averaged over
      the classes that occur.
    - ``calibration_error``: mean distance of confidence and accuracy over bins of confidence.
    - ``negative_log_likelihood`` in nats (of probabilities of at least 1e-6) and ``brier_score``.
    - ``reliability``: ``confidence``, ``accuracy`` and ``share`` of each bin that is not empty.
    - ``selective``: ``accuracy`` of the most confident images, for each ``coverage``; and
      ``area_under_risk``, the mean error over all coverages.

    Sources: Guo et al., *On Calibration of Modern Neural Networks*, 2017 (arXiv 1706.04599),
    equation 3; Geifman & El-Yaniv, *Selective Classification for Deep Neural Networks*, 2017
    (arXiv 1705.08500).

    Args:
        probabilities: ``(N, K)``.
        labels: The true classes ``(N,)``.
        bins: Of confidence, evenly wide.
        coverages: Points of the selective curve.

    Returns:
        A record of plain types, ready for JSON.

    Raises:
        ValueError: If shapes do not fit or a value is out of range.

    >>> p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    >>> record = classification_metrics(p, torch.tensor([0, 1, 1]), coverages=3)
    >>> round(record["accuracy"], 3), [round(a, 3) for a in record["selective"]["accuracy"]]
    (0.667, [1.0, 1.0, 0.667])
    """
    from torchmetrics.functional.classification import binary_auroc

    labels = as_labels(labels, "labels")
    _check(probabilities, labels)
    probabilities, count = probabilities.double(), probabilities.shape[1]
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    truth = torch.nn.functional.one_hot(labels, count)
    present = labels.unique().tolist() if len(labels.unique()) > 1 else []
    reliability = _reliability(confidence, right, bins)
    areas = [float(binary_auroc(probabilities[:, k], truth[:, k])) for k in present]
    return {
        "num_samples": len(labels),
        "accuracy": right.mean().item(),
        "auc": sum(areas) / len(areas) if areas else None,
        "calibration_error": sum(
            share * abs(sure - accurate)
            for sure, accurate, share in zip(*reliability.values(), strict=True)
        ),
        "negative_log_likelihood": -probabilities[truth.bool()].clamp_min(1e-6).log().mean().item(),
        "brier_score": (probabilities - truth).square().sum(1).mean().item(),
        "reliability": reliability,
        "selective": _selective(confidence, right, coverages),
    }


def segmentation_metrics(
    masks: Tensor, truth: Tensor, num_classes: int, ignore_index: int | None = None
) -> dict[str, Any]:
    """Measure predicted masks against the truth.

    - ``pixel_accuracy``, over all pixels alike.
    - ``mean_iou``: intersection over union of each class, of all images together, averaged over
      the classes that occur in either; ``iou``: those of the classes, None where absent.
    - ``foreground_iou``: the same of all classes but 0, as one; None where absent.

    Where no pixel counts all are None.

    Args:
        masks: Labels ``(N, H, W)``.
        truth: Likewise.
        num_classes: Of the labels, 0 being the background.
        ignore_index: True label of pixels that do not count.

    Returns:
        A record of plain types, ready for JSON.

    Raises:
        ValueError: If shapes differ or a label is out of range.

    >>> truth = torch.tensor([[[0, 1], [1, 2]]])
    >>> record = segmentation_metrics(torch.tensor([[[0, 1], [2, 2]]]), truth, num_classes=3)
    >>> round(record["mean_iou"], 3), record["foreground_iou"]
    (0.667, 1.0)
    """
    from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex

    if masks.shape != truth.shape:
        raise ValueError(
            f"masks must have the shape of the truth, {tuple(truth.shape)}, "
            f"got {tuple(masks.shape)}"
        )
    masks, truth = as_labels(masks, "masks"), as_labels(truth, "truth")
    counted = torch.ones_like(truth, dtype=torch.bool)
    if ignore_index is not None:
        counted = truth != ignore_index
    masks, truth = masks[counted], truth[counted]
    check_labels(masks, num_classes, "masks")
    check_labels(truth, num_classes, "truth")
    jaccard = MulticlassJaccardIndex(num_classes, average=None)
    foreground = BinaryJaccardIndex()
    for part, true in zip(masks.split(1_000_000), truth.split(1_000_000), strict=True):
        jaccard.update(part, true)
        foreground.update(part > 0, (true > 0).long())
    present = (jaccard.confmat.sum(0) + jaccard.confmat.sum(1)) > 0
    iou = jaccard.compute().double()
    return {
        "num_pixels": len(truth),
        "pixel_accuracy": (masks == truth).double().mean().item() if len(truth) else None,
        "mean_iou": iou[present].mean().item() if len(truth) else None,
        "iou": [v if there else None for v, there in zip(iou.tolist(), present, strict=True)],
        "foreground_iou": float(foreground.compute()) if bool(present[1:].any()) else None,
    }


def _check(probabilities: Tensor, labels: Tensor) -> None:
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
            "probabilities must be non-negative and sum to 1, got values from "
            f"{low} and sums in [{total.min().item()}, {total.max().item()}]"
        )


def _reliability(confidence: Tensor, right: Tensor, bins: int) -> dict[str, list[float]]:
    """Mean confidence and accuracy of the images in each bin of confidence."""
    index = (confidence * bins).ceil().clamp(1, bins).long() - 1
    rows = [index == b for b in range(bins) if bool((index == b).any())]
    return {
        "confidence": [confidence[row].mean().item() for row in rows],
        "accuracy": [right[row].mean().item() for row in rows],
        "share": [row.double().mean().item() for row in rows],
    }


def _selective(confidence: Tensor, right: Tensor, coverages: int) -> dict[str, Any]:
    """Accuracy of the most confident images; equally confident ones count by their mean."""
    levels, group = confidence.unique(return_inverse=True)
    sums = torch.zeros_like(levels).index_add_(0, group, right)
    fair = sums / torch.zeros_like(levels).index_add_(0, group, torch.ones_like(right))
    ordered = fair[group][confidence.argsort(descending=True)]
    running = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    counts = [-(-len(ordered) * k // coverages) for k in range(1, coverages + 1)]
    return {
        "coverage": [count / len(ordered) for count in counts],
        "accuracy": [running[count - 1].item() for count in counts],
        "area_under_risk": (1 - running).mean().item(),
    }
