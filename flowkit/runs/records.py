"""Records of runs: samplers from configurations, weights, files that are never overwritten."""

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flowkit import grids
from flowkit.modules import FlowModule, load_run
from flowkit.provenance import tensor_hash
from flowkit.sampling import ODESampler


def make_sampler(cfg: DictConfig, module: FlowModule, guidance: float | None) -> ODESampler:
    """Build a sampler; a grid from a file that was made for something else is warned about."""
    sampler = instantiate(cfg)
    if OmegaConf.is_dict(cfg.grid) and (file := cfg.grid.get("file")):
        used = {
            "model_hash": weights(module)["hash"],
            "method": sampler.method,
            "guidance": None if guidance == 1 else guidance,
        }
        grids.load(file, used)
    return sampler


def weights(module: FlowModule | Path) -> dict[str, Any]:
    """Return which weights a loaded module or a run holds: averaged or raw, their step and hash."""
    if isinstance(module, Path):
        module = load_run(module)
    return {**(module.weights or {}), "hash": tensor_hash(module.state_dict())}


def describe(sampler: ODESampler, guidance: float | None) -> dict[str, Any]:
    """Return what a sample depends on besides weights and start."""
    return {
        "method": sampler.method,
        "grid": sampler.times.tolist(),
        "rtol": sampler.rtol,
        "atol": sampler.atol,
        "guidance": guidance,
    }


def write_record(record: dict[str, Any], files: list[Path]) -> None:
    """Write a record to the first of its files, setting aside an earlier one that says otherwise.

    Then ``metrics.json`` becomes ``metrics-1.json`` (or the next number that is free), and its
    other files move likewise.
    """
    file, text = files[0], json.dumps(record, indent=2) + "\n"
    if file.is_file() and _timeless(file.read_text()) != _timeless(text):
        number = next(n for n in count(1) if not file.with_stem(f"{file.stem}-{n}").exists())
        for earlier in filter(Path.is_file, files):
            earlier.rename(earlier.with_stem(f"{earlier.stem}-{number}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _timeless(text: str) -> str:
    """A record without how long it took."""
    return re.sub(r'"seconds": [\d.]+', "", text)
