"""Adapters: velocities from networks of other conventions, and grids for other toolkits.

flowkit's time is 0 at noise and 1 at data, and its networks predict velocities. Use an adapter for
a pretrained network with another time axis (`from_reversed_time`) or another prediction
(`from_noise_prediction`, `from_data_prediction`). `DataPrediction` and `NoisePrediction` are
modules: they train a network that predicts data or noise. `DiffusersPipelineFlow` adapts complete
text-to-image pipelines of diffusers. `to_sigmas` converts a grid to noise levels for diffusers'
schedulers.
"""

from flowkit.adapters.conventions import (
    from_data_prediction,
    from_noise_prediction,
    from_reversed_time,
)
from flowkit.adapters.pipelines import DiffusersPipelineFlow
from flowkit.adapters.predictions import DataPrediction, NoisePrediction
from flowkit.adapters.sigmas import to_sigmas

__all__ = [
    "DataPrediction",
    "DiffusersPipelineFlow",
    "NoisePrediction",
    "from_data_prediction",
    "from_noise_prediction",
    "from_reversed_time",
    "to_sigmas",
]
