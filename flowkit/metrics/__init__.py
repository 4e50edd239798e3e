"""Metrics of samples, images, labels and trajectories, as functions on tensors.

`image_metrics` and `point_metrics` compute all metrics of images or points and return a record for
JSON. The functions below them compute one metric each: Fréchet distances, kernel distance,
precision and recall, Wasserstein distance, path energy, and the quality of labels and masks.
Feature networks map images to vectors, in which these distances are measured.
"""

from flowkit.metrics.comparison import FeatureSet, feature_metrics
from flowkit.metrics.evaluate import image_metrics, point_metrics
from flowkit.metrics.extrapolation import frechet_infinity
from flowkit.metrics.features import (
    ConvClassifier,
    Features,
    Pixels,
    SeveralOutputs,
    distance_name,
    outputs_of,
    train_classifier,
)
from flowkit.metrics.frechet import frechet_distance, frechet_from_moments
from flowkit.metrics.inception import Inception, InceptionV3, inception
from flowkit.metrics.intervals import Interval, wilson
from flowkit.metrics.judges import Judge, PixelSVC, agreement
from flowkit.metrics.kernels import KernelDistance, cmmd, energy_distance, kernel_distance, kid
from flowkit.metrics.labels import classification_metrics
from flowkit.metrics.neighbors import PRDC, prdc, prdc_intervals
from flowkit.metrics.pictures import as_saved, colored, from_uint8, save_picture, to_uint8
from flowkit.metrics.pretrained import NetworkFeatures, Pretrained, pretrained
from flowkit.metrics.scores import inception_score
from flowkit.metrics.statistics import Moments, Statistics
from flowkit.metrics.stored import StoredFeatures
from flowkit.metrics.straightness import (
    normalized_path_energy,
    path_energy,
    wasserstein2,
    wasserstein2_interval,
)
from flowkit.metrics.two_samples import c2st, c2st_interval
from flowkit.metrics.unbiased import frechet_unbiased

__all__ = [
    "PRDC",
    "ConvClassifier",
    "FeatureSet",
    "Features",
    "Inception",
    "InceptionV3",
    "Interval",
    "Judge",
    "KernelDistance",
    "Moments",
    "NetworkFeatures",
    "PixelSVC",
    "Pixels",
    "Pretrained",
    "SeveralOutputs",
    "Statistics",
    "StoredFeatures",
    "agreement",
    "as_saved",
    "c2st",
    "c2st_interval",
    "classification_metrics",
    "cmmd",
    "colored",
    "distance_name",
    "energy_distance",
    "feature_metrics",
    "frechet_distance",
    "frechet_from_moments",
    "frechet_infinity",
    "frechet_unbiased",
    "from_uint8",
    "image_metrics",
    "inception",
    "inception_score",
    "kernel_distance",
    "kid",
    "normalized_path_energy",
    "outputs_of",
    "path_energy",
    "point_metrics",
    "prdc",
    "prdc_intervals",
    "pretrained",
    "save_picture",
    "to_uint8",
    "train_classifier",
    "wasserstein2",
    "wasserstein2_interval",
    "wilson",
]
