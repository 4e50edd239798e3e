"""Between flowkit's conventions and those of other toolkits."""

from flowkit.adapters.pipelines import DiffusersPipelineFlow
from flowkit.adapters.sigmas import to_sigmas

__all__ = ["DiffusersPipelineFlow", "to_sigmas"]
