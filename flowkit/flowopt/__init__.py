"""FlowOpt: inversion and editing of samples by an optimization that needs no derivative.

A solver maps a latent ``z`` to a sample ``f(z)``. FlowOpt searches the latent whose sample is the
given image (an inversion), or walks from a target condition back towards that image (an edit). Use
it with any trained velocity, also a quantized or a remote one: it calls the whole solve and never
differentiates.

Source: Ronai, Kulikov, Michaeli, *FlowOpt: Fast Optimization Through Whole Flow Processes for
Training-Free Editing*, 2025 (arXiv 2510.22010).
"""

from flowkit.flowopt.objectives import LinearOperator
from flowkit.flowopt.optimize import Edit, FlowOpt
from flowkit.flowopt.step_size import StepBound, step_bound

__all__ = [
    "Edit",
    "FlowOpt",
    "LinearOperator",
    "StepBound",
    "step_bound",
]
