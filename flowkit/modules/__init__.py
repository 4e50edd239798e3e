"""Lightning modules, one file per method, and loading of runs."""

from flowkit.modules.blockwise import BlockwiseFlowMatching
from flowkit.modules.conditional import ConditionalFlowMatching
from flowkit.modules.flow import FlowModule
from flowkit.modules.latent import LatentFlowMatching
from flowkit.modules.runs import load_run
from flowkit.modules.straightening import Straightening
from flowkit.modules.symmetrical import SymmetricalFlowMatching
from flowkit.modules.weighted import WeightedFlowMatching

__all__ = [
    "BlockwiseFlowMatching",
    "ConditionalFlowMatching",
    "FlowModule",
    "LatentFlowMatching",
    "Straightening",
    "SymmetricalFlowMatching",
    "WeightedFlowMatching",
    "load_run",
]
