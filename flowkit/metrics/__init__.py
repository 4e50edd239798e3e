"""Metrics: plain functions on tensors, and the record that an evaluation leaves behind."""

from flowkit.metrics.evaluate import image_metrics, point_metrics
from flowkit.metrics.features import (
    ConvClassifier,
    Features,
    Pixels,
    inception,
    train_classifier,
)
from flowkit.metrics.frechet import (
    Interval,
    frechet_distance,
    frechet_from_moments,
    frechet_unbiased,
)
from flowkit.metrics.judges import Judge, PixelSVC, agreement
from flowkit.metrics.labels import classification_metrics
from flowkit.metrics.neighbors import PRDC, KernelDistance, kid, prdc
from flowkit.metrics.pictures import as_saved, colored, from_uint8, save_picture, to_uint8
from flowkit.metrics.stored import StoredFeatures
from flowkit.metrics.straightness import normalized_path_energy, path_energy, wasserstein2

__all__ = [
    "PRDC",
    "ConvClassifier",
    "Features",
    "Interval",
    "Judge",
    "KernelDistance",
    "PixelSVC",
    "Pixels",
    "StoredFeatures",
    "agreement",
    "as_saved",
    "classification_metrics",
    "colored",
    "frechet_distance",
    "frechet_from_moments",
    "frechet_unbiased",
    "from_uint8",
    "image_metrics",
    "inception",
    "kid",
    "normalized_path_energy",
    "path_energy",
    "point_metrics",
    "prdc",
    "save_picture",
    "to_uint8",
    "train_classifier",
    "wasserstein2",
]
