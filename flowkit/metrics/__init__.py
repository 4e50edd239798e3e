"""Metrics: plain functions on tensors, and the record that an evaluation leaves behind."""

from flowkit.metrics.evaluate import image_metrics, point_metrics
from flowkit.metrics.features import (
    ConvClassifier,
    Features,
    Pixels,
    inception,
    train_classifier,
)
from flowkit.metrics.frechet import frechet_distance, frechet_from_moments, frechet_unbiased
from flowkit.metrics.intervals import Interval, bootstrap
from flowkit.metrics.judges import Judge, PixelSVC, agreement
from flowkit.metrics.kernel import KernelDistance, kid
from flowkit.metrics.neighbors import PRDC, prdc
from flowkit.metrics.provenance import tensor_hash, versions
from flowkit.metrics.quantize import to_uint8
from flowkit.metrics.stored import StoredFeatures
from flowkit.metrics.straightness import normalized_path_energy, path_energy
from flowkit.metrics.wasserstein import wasserstein2

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
    "bootstrap",
    "frechet_distance",
    "frechet_from_moments",
    "frechet_unbiased",
    "image_metrics",
    "inception",
    "kid",
    "normalized_path_energy",
    "path_energy",
    "point_metrics",
    "prdc",
    "tensor_hash",
    "to_uint8",
    "train_classifier",
    "versions",
    "wasserstein2",
]
