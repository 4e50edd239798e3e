"""Loading finished (or running) runs."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from flowkit.modules.flow import FlowModule

CONFIG, CHECKPOINT = "config.yaml", "checkpoints/last.ckpt"


def load_run(folder: str | Path, checkpoint: str | Path | None = None) -> FlowModule:
    """Rebuild the module of a run folder, in ``eval`` mode on the CPU.

    Reads the resolved ``config.yaml`` and, weights only, the last checkpoint: the averaged weights
    unless the run averaged none (``callback=raw``); ``module.weights`` says which, and their step.
    Building runs the classes that the configuration names, so load only runs you trust.

    Args:
        folder: What ``flowkit train`` wrote.
        checkpoint: Another checkpoint than the last.

    Raises:
        FileNotFoundError: If the folder is not a run or has no checkpoint yet.
        ValueError: If the run is of something else than a flow.
        RuntimeError: If the checkpoint is damaged or of another model, naming the file.
        ImportError: If a class of the configuration cannot be imported from here.
    """
    folder = Path(folder)
    config = read_config(folder)
    if "module" not in config:
        raise ValueError(f"run must be a flow that `flowkit train` wrote, got {folder}")
    module = build(config["module"])
    file = folder / CHECKPOINT if checkpoint is None else Path(checkpoint)
    restore(module, read_checkpoint(file), file)
    return module.eval().requires_grad_(False)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return what a run goes on from: what Lightning saved when SLURM stopped it, or the last."""
    saved = sorted(Path(folder).glob("hpc_ckpt_*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    last = Path(folder) / CHECKPOINT
    return saved[-1] if saved else last if last.is_file() else None


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the resolved configuration of a run folder.

    Raises:
        FileNotFoundError: If the folder is not a run.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"run must be a folder with a {CONFIG}, got {folder}")
    return yaml.safe_load(file.read_text())


def restore(module: FlowModule, state: dict[str, Any], file: Path) -> None:
    """Load a checkpoint that was read from ``file`` into its module.

    Raises:
        RuntimeError: If it is of another model, naming the file.
    """
    misfit = _MISFIT.format(file)
    try:
        module.on_load_checkpoint(state)
    except KeyError as error:  # other errors, of an autoencoder say, speak for themselves
        raise RuntimeError(misfit) from error
    try:
        module.load_state_dict(state["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise RuntimeError(misfit) from error
    kind = "averaged" if "current_model_state" in state else "raw"
    module.weights = {"kind": kind, "step": state["global_step"]}


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


def build(node: Any) -> Any:
    """Build a resolved configuration: Hydra's ``_target_``, ``_args_`` and ``_partial_``, no more.

    >>> build({"_target_": "fractions.Fraction", "_args_": [1, 2]})
    Fraction(1, 2)
    """
    if isinstance(node, list):
        return [build(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: build(value) for key, value in node.items()}
    kwargs = {k: build(v) for k, v in node.items() if k not in _CONTROLS}
    target, args = _locate(node["_target_"]), build(node.get("_args_", []))
    if node.get("_partial_", False):
        return partial(target, *args, **kwargs)
    return target(*args, **kwargs)


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
