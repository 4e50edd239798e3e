"""Samplers: ODE and SDE solvers on any grid, with every evaluation counted."""

from flowkit.sampling.adaptive import ADAPTIVE
from flowkit.sampling.mean import MeanVelocity
from flowkit.sampling.ode import ODESampler, Solution, sample_seeds, seeded_noise
from flowkit.sampling.sde import Sampler, SDESampler
from flowkit.sampling.solvers import FIXED

__all__ = [
    "ADAPTIVE",
    "FIXED",
    "MeanVelocity",
    "ODESampler",
    "SDESampler",
    "Sampler",
    "Solution",
    "sample_seeds",
    "seeded_noise",
]
