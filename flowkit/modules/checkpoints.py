"""Run folders: their configuration and weights, read and built.

Everything stored passes through here: a configuration through `read_config`, which knows the names
of earlier versions, and what a configuration stands for through `build`.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from flowkit.checks import check_choice
from flowkit.modules.earlier import current
from flowkit.modules.flow import FlowModule

CONFIG, CHECKPOINT = "config.yaml", "checkpoints/last.ckpt"
UNRESOLVED = "unresolved.yaml"  # the configuration with its references, for `resume` to change


def load_run(
    folder: str | Path, checkpoint: str | Path | None = None, weights: str = "averaged"
) -> FlowModule:
    """Rebuild the module of a run folder, in ``eval`` mode on the CPU.

    Reads the resolved ``config.yaml`` and, weights only, the last checkpoint; ``module.weights``
    says which weights these are, and their step. Runs of earlier versions are read as well.
    Building runs the classes that the configuration names, so load only runs you trust.

    Args:
        folder: What ``flowkit train`` wrote.
        checkpoint: Another checkpoint than the last.
        weights: ``"averaged"``, or ``"raw"``, those of the last step; a run that averaged none
            (``callback=raw``) has raw ones only.

    Raises:
        FileNotFoundError: If the folder is not a run or has no checkpoint yet.
        ValueError: If the run is of something else than a flow, or weights of another kind.
        RuntimeError: If the checkpoint is damaged or of another model, naming the file.
        ImportError: If a class of the configuration cannot be imported from here.
    """
    check_choice(weights, ("averaged", "raw"), "weights")
    folder = Path(folder)
    config = read_config(folder)
    if "module" not in config:
        raise ValueError(f"run must be a flow that `flowkit train` wrote, got {folder}")
    module = build(config["module"])
    file = folder / CHECKPOINT if checkpoint is None else Path(checkpoint)
    restore(module, read_checkpoint(file), file, weights)
    return module.eval().requires_grad_(False)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return what a run goes on from: what Lightning saved when SLURM stopped it, or the last."""
    saved = sorted(Path(folder).glob("hpc_ckpt_*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    last = Path(folder) / CHECKPOINT
    return saved[-1] if saved else last if last.is_file() else None


def read_config(folder: str | Path, file: str = CONFIG) -> dict[str, Any]:
    """Read the resolved configuration of a run folder, or the unresolved one, in today's names.

    Raises:
        FileNotFoundError: If the folder is not a run.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(f"run must be a folder with a {file}, got {folder}")
    return current(yaml.safe_load(path.read_text()))


def restore(
    module: FlowModule, state: dict[str, Any], file: Path, weights: str = "averaged"
) -> None:
    """Load a checkpoint that was read from ``file`` into its module.

    Raises:
        RuntimeError: If it is of another model, naming the file.
    """
    misfit = _MISFIT.format(file)
    try:
        module.on_load_checkpoint(state)
    except KeyError as error:  # other errors, of an autoencoder say, speak for themselves
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
    """Read a checkpoint, weights only.

    Raises:
        FileNotFoundError: If there is none.
        RuntimeError: If it cannot be read or is of something else, naming the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint must be a file, got {file}; has the run saved one?")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise RuntimeError(f"checkpoint must be readable, got {file}: {error}") from error
    if not isinstance(state, dict) or not {"state_dict", "global_step"} <= state.keys():
        raise RuntimeError(_MISFIT.format(file))
    return state


def build(node: Any, recursive: bool = True) -> Any:
    """Build a resolved configuration, as Hydra's ``instantiate(node, _convert_="all")`` does.

    Modules load runs, and this layer must work without Hydra, so that this stands here. Containers
    are plain ones already, whatever ``_convert_`` says.

    >>> build({"_target_": "fractions.Fraction", "_args_": [1, 2]})
    Fraction(1, 2)
    """
    if isinstance(node, list):
        return [build(item, recursive) for item in node]
    if not isinstance(node, dict):
        return node
    recursive = node.get("_recursive_", recursive)
    if "_target_" not in node:
        return {key: build(value, recursive) for key, value in node.items()}
    given = {key: value for key, value in node.items() if key not in _CONTROLS}
    args = node.get("_args_", [])
    if recursive:
        given, args = build(given), build(args)
    target = _locate(node["_target_"])
    return partial(target, *args, **given) if node.get("_partial_") else target(*args, **given)


_CONTROLS = {"_target_", "_args_", "_partial_", "_convert_", "_recursive_"}


def _locate(name: str) -> Any:
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
        f"_target_ must name something importable, got {name!r}; run from the folder that holds "
        f"{parts[0]}, or add it to PYTHONPATH"
    )
