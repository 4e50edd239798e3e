"""Samplers: ODE solvers on any grid, in both directions, with every evaluation counted."""

from flowkit.sampling.mean import MeanVelocity
from flowkit.sampling.ode import ODESampler, Solution, sample_seeds, seeded_noise
from flowkit.sampling.solvers import ADAPTIVE, FIXED

__all__ = [
    "ADAPTIVE",
    "FIXED",
    "MeanVelocity",
    "ODESampler",
    "Solution",
    "sample_seeds",
    "seeded_noise",
]
