"""Reading of run folders: configuration, checkpoint, and the module that they describe.

Every stored configuration is read by `read_config`, which translates names of earlier versions.
`build` makes the objects that a configuration describes, after `trust.check`.
"""

import importlib
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from flowkit.checks import check_choice
from flowkit.modules.earlier import current
from flowkit.modules.flow import FlowModule
from flowkit.modules.listed import find
from flowkit.modules.trust import CONTROLS, check, substituted, trusting
from flowkit.provenance import bounded, read_bounded

CONFIG, CHECKPOINT = "config.yaml", "checkpoints/last.ckpt"
UNRESOLVED = "unresolved.yaml"  # the configuration with its references; `resume` changes values


def load_run(
    folder: str | Path,
    checkpoint: str | Path | None = None,
    weights: str = "averaged",
    trust: Sequence[str] = (),
) -> FlowModule:
    """Rebuild the module of a run folder, in ``eval`` mode on the CPU.

    The function reads the resolved ``config.yaml`` and, with torch's ``weights_only``, the last
    checkpoint. ``module.weights`` records the kind and the step of the weights. Runs of earlier
    versions load as well. The configuration may name the classes that flowkit lists, see
    `flowkit.modules.listed`, and those that you trust.

    Args:
        folder: Run folder that ``flowkit train`` wrote.
        checkpoint: Checkpoint file; None is the last checkpoint of the run.
        weights: ``"averaged"``, or ``"raw"`` for the weights of the last step. A run without
            averaged weights (``callback=raw``) always gives its raw weights.
        trust: Dotted names of other classes that the configuration may name, for example
            ``["mypackage.Net"]``: their code runs. See also `trust.trust_file`.

    Raises:
        FileNotFoundError: If the folder is not a run, or has no checkpoint yet.
        ValueError: If the run does not train a flow, if ``weights`` is another word, or if the
            configuration names a class that is neither listed nor trusted.
        RuntimeError: If the checkpoint is damaged or belongs to another model.
        ImportError: If a class that the configuration names cannot be imported.
    """
    check_choice(weights, ("averaged", "raw"), "weights")
    folder = Path(folder)
    config = read_config(folder)
    if "module" not in config:
        raise ValueError(f"run must be a run of `flowkit train` with a flow, got {folder}")
    with trusting(trust):
        module = build(config["module"], "module")
    file = folder / CHECKPOINT if checkpoint is None else Path(checkpoint)
    restore(module, read_checkpoint(file), file, weights)
    return module.eval().requires_grad_(False)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint from which a run continues, or None if there is no checkpoint.

    A checkpoint that Lightning saved when SLURM stopped the job has precedence over the last one.
    """
    saved = sorted(Path(folder).glob("hpc_ckpt_*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    last = Path(folder) / CHECKPOINT
    return saved[-1] if saved else last if last.is_file() else None


def read_config(folder: str | Path, file: str = CONFIG) -> dict[str, Any]:
    """Read a configuration file of a run folder, with the names of this version.

    Raises:
        FileNotFoundError: If the folder has no such file.
        ValueError: If the file is not YAML of a mapping, or is too large or too deep.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(f"run must be a folder with a {file}, got {folder}")
    text = read_bounded(path)
    try:
        found = bounded(_Loader(text).get_single_data(), path)
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"configuration must be plain YAML, got {path}: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"configuration must be a mapping, got {type(found).__name__} in {path}")
    return current(found)


class _Loader(yaml.SafeLoader):
    """YAML of plain types as OmegaConf reads it: ``1e-3`` is a number, a date is a string."""

    yaml_implicit_resolvers: ClassVar[Any] = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":timestamp", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse keys ``<<``: merged mappings can grow without a bound.

        Raises:
            ConstructorError: If there is such a key.
        """
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "keys << are not read")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def restore(
    module: FlowModule, state: dict[str, Any], file: Path, weights: str = "averaged"
) -> None:
    """Load the state of a checkpoint into its module.

    Args:
        module: The module, built from the configuration of the run.
        state: Content of the checkpoint, see `read_checkpoint`.
        file: File of the checkpoint, for error messages.
        weights: ``"averaged"`` or ``"raw"``.

    Raises:
        RuntimeError: If the checkpoint belongs to another model.
    """
    misfit = _MISFIT.format(file)
    try:
        module.on_load_checkpoint(state)
    except KeyError as error:  # messages of other errors, for example of an autoencoder, are clear
        raise RuntimeError(misfit) from error
    averaged = weights == "averaged" and "current_model_state" in state
    raw = state.get("current_model_state", state["state_dict"])
    try:
        module.load_state_dict(state["state_dict"] if averaged else raw)
    except (KeyError, RuntimeError) as error:
        raise RuntimeError(misfit) from error
    module.weights = {"kind": "averaged" if averaged else "raw", "step": state["global_step"]}


_MISFIT = "checkpoint must fit the configured module, got another model or format in {}"


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU, with torch's ``weights_only``.

    Raises:
        FileNotFoundError: If the file does not exist.
        RuntimeError: If the file cannot be read or is not a checkpoint.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint must be a file, got {file}; has the run saved a checkpoint?"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of errors for a damaged file
        raise RuntimeError(f"checkpoint must be readable, got {file}: {error}") from error
    if not isinstance(state, dict) or not {"state_dict", "global_step"} <= state.keys():
        raise RuntimeError(_MISFIT.format(file))
    return state


def build(node: Any, place: str = "configuration") -> Any:
    """Build a resolved configuration, as Hydra's ``instantiate(node, _convert_="all")`` does.

    Modules load runs, and this layer must work without Hydra, so this function replaces Hydra's.
    Containers are plain dictionaries and lists, so ``_convert_`` has no effect. The whole tree is
    checked before the first call.

    Args:
        node: The configuration.
        place: Name of the node, for errors.

    Raises:
        ImportError: If a ``_target_`` cannot be imported.
        ValueError: If a ``_target_`` is neither listed nor trusted, see `trust.check`.

    >>> build({"_target_": "flowkit.paths.Linear", "sigma": 0.5})
    Linear(sigma_min=0.0, sigma=0.5)
    """
    check(node, place)
    return _built(node)


def _built(node: Any, recursive: bool = True) -> Any:
    """Build a checked configuration."""
    if isinstance(node, str):
        return substituted(node)
    if isinstance(node, list):
        return [_built(item, recursive) for item in node]
    if not isinstance(node, dict):
        return node
    recursive = node.get("_recursive_", recursive)
    if "_target_" not in node:
        return {key: _built(value, recursive) for key, value in node.items()}
    given = {key: value for key, value in node.items() if key not in CONTROLS}
    args = node.get("_args_", [])
    if recursive:
        given, args = _built(given), _built(args)
    target = find(node["_target_"]) or _locate(node["_target_"])
    return partial(target, *args, **given) if node.get("_partial_") else target(*args, **given)


def _locate(name: str) -> Any:
    """Import the object of a dotted name."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:cut])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not (module + ".").startswith(error.name + "."):
                raise
            continue
        for attribute in parts[cut:]:
            found = getattr(found, attribute, None)
        if found is not None:
            return found
    raise ImportError(
        f"_target_ must name an importable object, got {name!r}; run in the folder that holds "
        f"{parts[0]}, or add that folder to PYTHONPATH"
    )
