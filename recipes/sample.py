"""Draw samples from a run and save them, with a picture.

flowkit sample run=runs/quickstart                        every class in turn
flowkit sample run=runs/quickstart labels=[3,8] num_samples=20 guidance=2
flowkit sample run=runs/quickstart sampler=euler sampler.grid=8
flowkit sample run=runs/blocks feature_mode=cached            of blocks: the trunk once a segment
flowkit sample run=runs/quickstart num_samples=50000 device=cuda devices=8

Samples start from noise, one seed each. Where the data of the run bring source samples, or
conditions that are no labels, they start from those of the test split, and are at most as many.
"""

import json
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit import grids
from flowkit.metrics import tensor_hash, versions
from flowkit.metrics.pictures import save_picture
from flowkit.modules import FlowModule, load_run
from flowkit.modules.runs import read_config
from flowkit.recipes._features import loaded
from flowkit.recipes._parts import Parts, draw_parts, hash_of, launch
from flowkit.recipes._starts import choose_labels, choose_samples, given_source, start, test_data
from flowkit.sampling import ODESampler
from flowkit.types import Cond


def sample(cfg: DictConfig) -> Tensor:
    """Sample as configured; writes ``samples.pt``, ``samples.png`` and ``samples.json``.

    Returns:
        The samples; none on other processes than the first.
    """
    run, fabric = Path(cfg.run), launch(cfg)
    trained, module = read_config(run), loaded(cfg, fabric.device, cfg.guidance)
    sampler = make_sampler(cfg.sampler, module, cfg.guidance)
    chosen = "all classes in turn" if cfg.labels is None else "the labels asked for, in turn"
    if trained.get("needs_data"):
        data = test_data(trained)
        batch = choose_samples(data, cfg.labels, cfg.num_samples)
        cond, size, chosen = batch.get("cond"), len(batch["x1"]), "of the test split"
        x0, source = start(module, cfg, size, given_source(batch, data))
    else:
        cond = choose_labels(cfg.labels, cfg.num_samples, trained["num_classes"])
        x0, source = start(module, cfg, cfg.num_samples)
    folder = Path(cfg.out) if cfg.out else run / "drawn"
    used = {"weights": weights(module), **describe(sampler, cfg.guidance), **source}
    used |= {"mode": [cfg.feature_mode, cfg.tolerance], "cond": hash_of(cond)}
    parts = Parts(folder, used, fabric)
    drawn, cost = draw_parts(module, x0, cond, sampler, cfg.guidance, parts=parts)
    if not fabric.is_global_zero:
        return torch.empty(0)

    samples = drawn["samples"]
    record = {
        "weights": used["weights"],
        "sampling": {
            **describe(sampler, cfg.guidance),
            **cost,
            **source,
            "conditions": None if cond is None else chosen,
            "labels": None if cfg.labels is None else list(cfg.labels),
            "cond": hash_of(cond),
        },
        "versions": versions(),
    }
    files = [folder / f"samples.{kind}" for kind in ("json", "png", "pt")]
    write_record(record, files)
    torch.save({"samples": samples, "cond": cond}, files[2])
    save_picture(samples, files[1])
    parts.remove()
    print(f"picture   {files[1]}\nsamples   {files[2]}")
    return samples


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


def draw(
    module: FlowModule,
    x0: Sequence[Tensor],
    cond: Cond,
    sampler: ODESampler,
    guidance: float | None,
) -> tuple[Tensor, dict[str, Any]]:
    """Carry batches of source samples to data, with a progress bar; the short `draw_parts`."""
    columns, cost = draw_parts(module, x0, cond, sampler, guidance)
    return columns["samples"], cost


# --- records -----------------------------------------------------------------------------------


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


@hydra.main(version_base="1.3", config_path="../conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit sample``."""
    sample(cfg)


if __name__ == "__main__":
    main()
