"""Lightning modules, one file per method, what trains them, and loading of runs."""

from flowkit.modules.autoencoding import Autoencoding
from flowkit.modules.blockwise import BlockwiseFlowMatching
from flowkit.modules.callbacks import LastCheckpoint, SampleGrid
from flowkit.modules.checkpoints import load_run
from flowkit.modules.condition_grid import ConditionGrid
from flowkit.modules.conditional import ConditionalFlowMatching, WeightedFlowMatching
from flowkit.modules.flow import FlowModule
from flowkit.modules.latent import LatentFlowMatching, describe_latents, expected_losses
from flowkit.modules.sharding import FullySharded
from flowkit.modules.straightening import Straightening
from flowkit.modules.symmetrical import SymmetricalFlowMatching

__all__ = [
    "Autoencoding",
    "BlockwiseFlowMatching",
    "ConditionGrid",
    "ConditionalFlowMatching",
    "FlowModule",
    "FullySharded",
    "LastCheckpoint",
    "LatentFlowMatching",
    "SampleGrid",
    "Straightening",
    "SymmetricalFlowMatching",
    "WeightedFlowMatching",
    "describe_latents",
    "expected_losses",
    "load_run",
]
