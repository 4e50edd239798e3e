"""Quality of predicted labels: classes of images with probabilities, and labels of pixels."""

from typing import Any

import torch
from torch import Tensor

from flowkit.checks import as_labels, check_finite, check_labels


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
    """Compare predicted masks with true masks.

    The intersection over union (IoU) of a class is
    ``|predicted ∩ true| / |predicted ∪ true|`` over the pixels of all images together. The metrics
    are:

    - ``pixel_accuracy``: share of pixels with the true label.
    - ``iou``: IoU of each class; None for a class that is neither predicted nor true.
    - ``mean_iou``: mean of ``iou`` over the other classes.
    - ``foreground_iou``: IoU of the union of all classes except 0; None if there is no such pixel.

    If all pixels are ignored, all metrics are None.

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
    index = (confidence * bins).ceil().clamp(1, bins).long() - 1
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
    running = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    counts = [-(-len(ordered) * k // coverages) for k in range(1, coverages + 1)]
    return {
        "coverage": [count / len(ordered) for count in counts],
        "accuracy": [running[count - 1].item() for count in counts],
        "area_under_risk": (1 - running).mean().item(),
    }
