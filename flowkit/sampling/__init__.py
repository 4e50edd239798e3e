"""Samplers: ODE solvers on any grid, in both directions, with every evaluation counted."""

from flowkit.sampling.adaptive import ADAPTIVE
from flowkit.sampling.ode import ODESampler, Solution, sample_seeds, seeded_noise
from flowkit.sampling.solvers import FIXED

__all__ = [
    "ADAPTIVE",
    "FIXED",
    "ODESampler",
    "Solution",
    "sample_seeds",
    "seeded_noise",
]
