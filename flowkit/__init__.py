"""flowkit: flow matching, from training to sampling, editing and measuring."""

from pathlib import Path as _Path

from flowkit import couplings, exact, grids, nn, paths, times
from flowkit._version import __version__
from flowkit.couplings import Independent, MinibatchOT, Sinkhorn
from flowkit.guidance import Autoguidance, ClassifierFree, DropCond
from flowkit.likelihood import LogLikelihood, log_likelihood
from flowkit.losses import flow_matching_loss
from flowkit.paths import VP, Affine, BrownianBridge, Cosine, Linear
from flowkit.sampling import ODESampler, Solution, seeded_noise
from flowkit.types import Batch, Cond, Velocity

# In a checkout recipes/ and conf/ lie beside this package; in a wheel they lie inside it.
if not (_Path(__file__).parent / "recipes").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__all__ = [
    "VP",
    "Affine",
    "Autoguidance",
    "Batch",
    "BrownianBridge",
    "ClassifierFree",
    "Cond",
    "Cosine",
    "DropCond",
    "Independent",
    "Linear",
    "LogLikelihood",
    "MinibatchOT",
    "ODESampler",
    "Sinkhorn",
    "Solution",
    "Velocity",
    "__version__",
    "couplings",
    "exact",
    "flow_matching_loss",
    "grids",
    "log_likelihood",
    "nn",
    "paths",
    "seeded_noise",
    "times",
]
