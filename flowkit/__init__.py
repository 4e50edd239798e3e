"""flowkit: flow matching, from training to sampling, editing and measuring.

The public names of the nouns are imported when they are first used, so that ``import flowkit``
loads torch and nothing heavier.
"""

import os as _os
import sys

# `python -m flowkit`, which also starts the processes of several devices, puts the working folder
# first: a file `hydra.py` there would be imported in place of the package. It comes last,
# before any other import.
if sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)].partition(".")[0] == "flowkit":
    _folder = _os.getcwd()
    sys.path[:] = [place for place in sys.path if place not in ("", _folder)] + [_folder]

from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

from flowkit._version import __version__

if TYPE_CHECKING:
    from flowkit import (
        blockwise,
        boss,
        couplings,
        exact,
        flowopt,
        grids,
        guidance,
        likelihood,
        losses,
        nn,
        paths,
        sampling,
        symmetrical,
        times,
        velocity,
    )
    from flowkit.autoencoders import Identity, KLAutoencoder
    from flowkit.couplings import (
        Gibbs,
        Independent,
        MinibatchOT,
        Pairs,
        Sinkhorn,
        suggest_epsilon,
    )
    from flowkit.exact import GaussianFlow, MixtureFlow
    from flowkit.flowopt import Edit, FlowOpt, step_bound
    from flowkit.guidance import Autoguidance, ClassifierFree, DropCond
    from flowkit.likelihood import LogLikelihood, log_likelihood
    from flowkit.losses import flow_matching_loss
    from flowkit.paths import VP, Affine, BrownianBridge, Cosine, Linear
    from flowkit.sampling import ODESampler, SDESampler, Solution, seeded_noise
    from flowkit.times import Beta, LogitNormal, Stratified, Uniform
    from flowkit.types import Batch, Cond
    from flowkit.velocity import Velocity

_HOMES = {
    "autoencoders": ("Identity", "KLAutoencoder"),
    "couplings": ("Gibbs", "Independent", "MinibatchOT", "Pairs", "Sinkhorn", "suggest_epsilon"),
    "exact": ("GaussianFlow", "MixtureFlow"),
    "flowopt": ("Edit", "FlowOpt", "step_bound"),
    "guidance": ("Autoguidance", "ClassifierFree", "DropCond"),
    "likelihood": ("LogLikelihood", "log_likelihood"),
    "losses": ("flow_matching_loss",),
    "paths": ("VP", "Affine", "BrownianBridge", "Cosine", "Linear"),
    "sampling": ("ODESampler", "SDESampler", "Solution", "seeded_noise"),
    "times": ("Beta", "LogitNormal", "Stratified", "Uniform"),
    "types": ("Batch", "Cond"),
    "velocity": ("Velocity",),
}
_MODULES = (*_HOMES, "adapters", "blockwise", "boss", "data", "grids", "inpainting", "metrics")
_MODULES += ("modules", "nn", "runs", "symmetrical")


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of them, when it is first used."""
    if name in _MODULES:
        return import_module(f"flowkit.{name}")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"flowkit.{home}"), name)
    raise AttributeError(f"module 'flowkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


def _find_beside(name: str) -> None:
    """Let a folder beside this package, as in a checkout, be found as one within it."""
    folder = _CHECKOUT / name
    spec = spec_from_file_location(
        f"flowkit.{name}", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is not None and spec.loader is not None:
        sys.modules[spec.name] = module = module_from_spec(spec)
        spec.loader.exec_module(module)
        globals()[name] = module


# In a wheel recipes and configuration lie inside this package, in a checkout beside it.
_CHECKOUT = _Path(__file__).parent.parent
if all((_CHECKOUT / file).is_file() for file in ("recipes/train.py", "conf/train.yaml")):
    for _folder in ("recipes", "conf"):
        _find_beside(_folder)

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
    "SDESampler",
    "Sinkhorn",
    "Solution",
    "Stratified",
    "Uniform",
    "Velocity",
    "__version__",
    "blockwise",
    "boss",
    "couplings",
    "exact",
    "flow_matching_loss",
    "flowopt",
    "grids",
    "guidance",
    "likelihood",
    "log_likelihood",
    "losses",
    "nn",
    "paths",
    "sampling",
    "seeded_noise",
    "step_bound",
    "suggest_epsilon",
    "symmetrical",
    "times",
    "velocity",
]
