"""Lightning modules, one file per method, and loading of runs."""

from flowkit.modules.conditional import ConditionalFlowMatching
from flowkit.modules.flow import FlowModule
from flowkit.modules.runs import load_run

__all__ = ["ConditionalFlowMatching", "FlowModule", "load_run"]
