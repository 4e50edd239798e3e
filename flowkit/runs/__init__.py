"""Tools of the recipes that read and write run folders.

A run folder is the output of ``flowkit train``. `Run` loads a run folder to sample from its module.
`saved_grid` and `own_grid` read grids that ``flowkit boss`` wrote. `own_sampler` is the sampler of
a run if nothing else is asked for. The feature functions build the networks of ``conf/metric`` and
``conf/perceptual``. `export` writes a flow as a file that needs no flowkit. `save_animation`
draws the episodes of a policy. The other files of this package hold starts, parts, records, tables
and plots for the recipes.
"""

from flowkit.runs.exporting import export
from flowkit.runs.features import (
    classifier_error,
    classifier_features,
    clip_features,
    dinov2_features,
    features_for,
    inception_features,
    network_features,
    pixel_features,
)
from flowkit.runs.rollout_pictures import save_animation
from flowkit.runs.run import Run, own_grid, own_sampler, saved_grid

__all__ = [
    "Run",
    "classifier_error",
    "classifier_features",
    "clip_features",
    "dinov2_features",
    "export",
    "features_for",
    "inception_features",
    "network_features",
    "own_grid",
    "own_sampler",
    "pixel_features",
    "save_animation",
    "saved_grid",
]
