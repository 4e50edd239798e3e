"""Tools of the recipes that read and write run folders.

A run folder is the output of ``flowkit train``. `Run` loads a run folder to sample from its module,
and `saved_grid` reads a grid that ``flowkit boss`` wrote. The feature functions build the networks
of ``conf/metric`` and ``conf/perceptual``. The other files of this package hold starts, parts,
records, tables and plots for the recipes.
"""

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
