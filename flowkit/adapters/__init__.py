"""Between flowkit's conventions and those of other toolkits."""

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
