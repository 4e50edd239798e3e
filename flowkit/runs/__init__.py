"""Runs: what recipes share about the folders that training writes."""

from flowkit.runs.features import (
    classifier_error,
    classifier_features,
    features_for,
    inception_features,
    pixel_features,
)
from flowkit.runs.run import Run, saved_grid

__all__ = [
    "Run",
    "classifier_error",
    "classifier_features",
    "features_for",
    "inception_features",
    "pixel_features",
    "saved_grid",
]
