"""Lightning modules, one file per method, and the callbacks and strategies that train them.

Each module has a method ``loss(batch)`` and can also be used without a trainer. `FlowModule` is the
superclass of all modules of flows. It has the methods ``sample`` and ``solve``. `load_run` loads
the module of a run folder.
"""

from flowkit.modules.autoencoding import Autoencoding
from flowkit.modules.blockwise import BlockwiseFlowMatching
from flowkit.modules.callbacks import AveragedWeights, LastCheckpoint, SampleGrid
from flowkit.modules.checkpoints import load_run
from flowkit.modules.condition_grid import ConditionGrid
from flowkit.modules.conditional import ConditionalFlowMatching, WeightedFlowMatching
from flowkit.modules.flow import FlowModule
from flowkit.modules.latent import LatentFlowMatching, describe_latents, expected_losses
from flowkit.modules.latent_actions import LatentActions
from flowkit.modules.logs import LossPlot, MetricsTable
from flowkit.modules.mean_flow import MeanFlowMatching
from flowkit.modules.regression import Regression
from flowkit.modules.sharding import FullySharded
from flowkit.modules.sounds import SampleSounds
from flowkit.modules.straightening import Straightening
from flowkit.modules.symmetrical import SymmetricalFlowMatching

__all__ = [
    "Autoencoding",
    "AveragedWeights",
    "BlockwiseFlowMatching",
    "ConditionGrid",
    "ConditionalFlowMatching",
    "FlowModule",
    "FullySharded",
    "LastCheckpoint",
    "LatentActions",
    "LatentFlowMatching",
    "LossPlot",
    "MeanFlowMatching",
    "MetricsTable",
    "Regression",
    "SampleGrid",
    "SampleSounds",
    "Straightening",
    "SymmetricalFlowMatching",
    "WeightedFlowMatching",
    "describe_latents",
    "expected_losses",
    "load_run",
]
