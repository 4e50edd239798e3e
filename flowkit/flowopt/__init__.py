"""FlowOpt: inversion and editing by zero-order optimization of the start of a flow."""

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
