"""flowkit: flow matching, from training to sampling, editing and measuring."""

from pathlib import Path as _Path

from flowkit import boss, codecs, couplings, exact, grids, nn, paths, times
from flowkit._version import __version__
from flowkit.autoencoders import Identity, KLAutoencoder
from flowkit.couplings import Gibbs, Independent, MinibatchOT, Pairs, Sinkhorn, suggest_epsilon
from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.flowopt import Edit, FlowOpt, step_bound
from flowkit.guidance import Autoguidance, ClassifierFree, DropCond
from flowkit.likelihood import LogLikelihood, log_likelihood
from flowkit.losses import flow_matching_loss
from flowkit.paths import VP, Affine, BrownianBridge, Cosine, Linear
from flowkit.sampling import ODESampler, Solution, seeded_noise
from flowkit.times import Beta, LogitNormal, Stratified, Uniform
from flowkit.types import Batch, Cond, Velocity

# In a checkout recipes/ and conf/ lie beside this package; in a wheel they lie inside it.
if not (_Path(__file__).parent / "recipes").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

__all__ = [
    "VP",
    "Affine",
    "Autoguidance",
    "Batch",
    "Beta",
    "BrownianBridge",
    "ClassifierFree",
    "Cond",
    "Cosine",
    "DropCond",
    "Edit",
    "FlowOpt",
    "GaussianFlow",
    "Gibbs",
    "Identity",
    "Independent",
    "KLAutoencoder",
    "Linear",
    "LogLikelihood",
    "LogitNormal",
    "MinibatchOT",
    "MixtureFlow",
    "ODESampler",
    "Pairs",
    "Sinkhorn",
    "Solution",
    "Stratified",
    "Uniform",
    "Velocity",
    "__version__",
    "boss",
    "codecs",
    "couplings",
    "exact",
    "flow_matching_loss",
    "grids",
    "log_likelihood",
    "nn",
    "paths",
    "seeded_noise",
    "step_bound",
    "suggest_epsilon",
    "times",
]
