"""Runs: what recipes share about the folders that training writes."""

from flowkit.runs.features import (
    classifier_features,
    features_for,
    inception_features,
    pixel_features,
)
from flowkit.runs.run import Run

__all__ = [
    "Run",
    "classifier_features",
    "features_for",
    "inception_features",
    "pixel_features",
]
