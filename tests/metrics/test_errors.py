"""Errors of the metrics begin with the name of the argument."""

import math

import pytest
import torch

from flowkit.metrics import (
    ConvClassifier,
    PixelSVC,
    frechet_distance,
    frechet_from_moments,
    frechet_unbiased,
    kid,
    point_metrics,
    prdc,
    train_classifier,
    wasserstein2,
)
from flowkit.metrics.labels import classification_metrics, segmentation_metrics
from tests.metrics.samples import normal

EYE, BROKEN = torch.eye(3), torch.full((4, 3), math.nan)
IMAGES, LABELS = normal(5, 1, 4, 4, dtype=torch.float32), torch.arange(5) % 2
MASKS = torch.zeros(2, 3, 3).long()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: frechet_distance(BROKEN, EYE), ValueError, "a must be finite, got 12 NaN"),
        (
            lambda: frechet_from_moments(EYE[0], EYE, EYE[0] * math.nan, EYE),
            ValueError,
            "mean_b must be finite, got 3 NaN",
        ),
        (
            lambda: frechet_from_moments(EYE[0], EYE[:2], EYE[0], EYE),
            ValueError,
            r"cov_a must have shape \(3, 3\), got \(2, 3\)",
        ),
        (lambda: frechet_unbiased(EYE, normal(9, 3)), ValueError, "a must have at least 2 samples"),
        (lambda: prdc(BROKEN, EYE, 1), ValueError, "real must be finite, got 12 NaN"),
        (lambda: prdc(EYE, BROKEN, 1), ValueError, "fake must be finite, got 12 NaN"),
        (lambda: kid(EYE, EYE, 0, 2), ValueError, "subsets must be at least 1, got 0"),
        (lambda: wasserstein2(EYE, BROKEN), ValueError, "b must be finite, got 12 NaN"),
        (lambda: point_metrics(EYE, EYE[:1]), ValueError, "the number of points must be at least"),
        (lambda: PixelSVC(EYE, LABELS[:3], 1), ValueError, "limit must be at least 2, got 1"),
        (
            lambda: PixelSVC(EYE, torch.tensor([0, 4, 4]), 2, torch.Generator().manual_seed(1)),
            ValueError,
            r"labels must hold two classes or more, got \[4\]",
        ),
        (
            lambda: train_classifier(IMAGES, LABELS, 2, epochs=0),
            ValueError,
            "epochs must be at least 1, got 0",
        ),
        (
            lambda: train_classifier(IMAGES[:1], LABELS[:1], 2),
            ValueError,
            "the number of images must be at least 2, got 1",
        ),
        (lambda: ConvClassifier((1, 9, 3), 2), ValueError, "shape's sides must be at least 4, got"),
        (
            lambda: classification_metrics(EYE, torch.rand(3)),
            TypeError,
            "labels must hold integer labels",
        ),
        (
            lambda: segmentation_metrics(MASKS / 2, MASKS, 2),
            TypeError,
            "masks must hold integer labels",
        ),
        (
            lambda: segmentation_metrics(MASKS, MASKS / 2, 2),
            TypeError,
            "truth must hold integer labels",
        ),
        (
            lambda: segmentation_metrics(MASKS + 2, MASKS, 2),
            ValueError,
            r"masks must hold labels in \[0, 1\]",
        ),
    ],
)
def test_the_argument_is_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_the_fewest_images_make_a_classifier():
    """Two images of the smallest sides; a judge of one image of each class."""
    images, labels = IMAGES[:2], LABELS[:2]
    net = train_classifier(images, labels, 2, epochs=1)
    assert net(images).shape[0] == 2
    assert PixelSVC(images, labels, 2).predict(images).tolist() == [0, 1]
