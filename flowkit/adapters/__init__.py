"""Adapters: velocities from networks of other conventions, and grids for other toolkits.

flowkit's time is 0 at noise and 1 at data, and its networks predict velocities. Use an adapter for
a pretrained network with another time axis (`from_reversed_time`) or another prediction
(`from_noise_prediction`, `from_data_prediction`). `DiffusersPipelineFlow` adapts complete
text-to-image pipelines of diffusers. `to_sigmas` converts a grid to noise levels for diffusers'
schedulers.
"""

from flowkit.adapters.conventions import (
    from_data_prediction,
    from_noise_prediction,
    from_reversed_time,
)
from flowkit.adapters.pipelines import DiffusersPipelineFlow
from flowkit.adapters.sigmas import to_sigmas

__all__ = [
    "DiffusersPipelineFlow",
    "from_data_prediction",
    "from_noise_prediction",
    "from_reversed_time",
    "to_sigmas",
]
