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
    """Rebuild the module of a run folder, with its averaged weights, in ``eval`` mode on the CPU.

    Reads the resolved ``config.yaml`` and, weights only, the last checkpoint. Building runs the
    classes that the configuration names, so load only runs you trust.

    Args:
        folder: What ``flowkit train`` wrote.
        checkpoint: Another checkpoint than the last.

    Raises:
        FileNotFoundError: If the folder is not a run or has no checkpoint yet.
        RuntimeError: If the checkpoint is damaged or of another model, naming the file.
    """
    folder = Path(folder)
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"run must be a folder with a {CONFIG}, got {folder}")
    module = build(yaml.safe_load(config.read_text())["module"])
    state = read_checkpoint(folder / CHECKPOINT if checkpoint is None else Path(checkpoint))
    try:
        module.on_load_checkpoint(state)
        module.load_state_dict(state["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise RuntimeError(
            f"checkpoint of {folder} must fit the module of its {CONFIG}, "
            "got another model or format"
        ) from error
    return module.eval().requires_grad_(False)


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint, weights only.

    Raises:
        FileNotFoundError: If there is none.
        RuntimeError: If it cannot be read, naming the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint must be a file, got {file}; has the run saved one?")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        raise RuntimeError(f"checkpoint must be readable, got {file}: {error}") from error


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
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(f"_target_ must name something importable, got {name!r}")
