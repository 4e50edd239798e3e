"""Runs: what recipes share about the folders that training writes."""

from flowkit.runs.features import (
    classifier_features,
    features_for,
    inception_features,
    pixel_features,
)

__all__ = [
    "classifier_features",
    "features_for",
    "inception_features",
    "pixel_features",
]
