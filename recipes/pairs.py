"""Make pairs of noise and sample, or segments of trajectories, for straightening.

flowkit pairs run=runs/digits out=pairs/reflow                             pairs, for reflow
flowkit pairs run=runs/digits out=pairs/boss grid=runs/digits/boss/grid.json    segments
flowkit pairs run=runs/digits out=pairs/both grid=[4,8]                    of several grids

Train on them with the network options of the run:

flowkit train module=straightening module.start=runs/digits data=pairs data.root=pairs/boss
"""

import json
import os
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from tqdm import tqdm

from flowkit import grids
from flowkit.boss import segments
from flowkit.data.pairs import FORMAT, FORMAT_VERSION, RECORD
from flowkit.metrics import versions
from flowkit.modules import load_run
from flowkit.modules.runs import read_config
from flowkit.recipes.sample import choose_labels, weights
from flowkit.sampling import seeded_noise


def pairs(cfg: DictConfig) -> Path:
    """Solve as configured; writes ``pairs-*.safetensors`` and ``pairs.json`` into a folder."""
    from safetensors.torch import save_file

    run, out = Path(cfg.run), Path(cfg.out)
    module, trained = load_run(run).to(cfg.device), read_config(run)
    guidance = trained["guidance"] if cfg.guidance is None else cfg.guidance
    guidance = None if guidance == 1 else guidance
    found = {"model_hash": weights(module)["hash"], "guidance": guidance}
    wanted = read_grids(cfg.grid, found)
    starts = range(0, cfg.num_noises, cfg.shard_size)
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "shards": [f"pairs-{k:05}.safetensors" for k in range(len(starts))],
        "rows_per_noise": sum(len(grid) - 1 for grid in wanted) or 1,
        "num_classes": trained["num_classes"],
        "provenance": {
            **found,
            "grids": [grid.tolist() for grid in wanted],
            "method": "euler",
            "fine_steps": cfg.fine_steps,
            "seeds": [cfg.seed, cfg.seed + cfg.num_noises],
            "shard_size": cfg.shard_size,
            "versions": versions(),
        },
    }
    _begin(out, record)
    labels = choose_labels(None, cfg.num_noises, trained["num_classes"])
    velocity = module.guided(guidance)
    bar = tqdm(total=cfg.num_noises, desc="noises", disable=None)
    for name, start in zip(record["shards"], starts, strict=True):
        stop = min(start + cfg.shard_size, cfg.num_noises)
        if not (out / name).is_file():
            parts = []
            for first in range(start, stop, cfg.batch_size):
                rows = slice(first, min(first + cfg.batch_size, stop))
                seeds = range(cfg.seed + rows.start, cfg.seed + rows.stop)
                x0 = seeded_noise(cast(tuple, module.sample_shape), seeds, cfg.device)
                cond = None if labels is None else labels[rows].to(cfg.device)
                parts.append(make(velocity, x0, cfg.fine_steps, wanted, cond))
                bar.update(len(x0))
            shard = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
            save_file(shard, out / f"{name}.partial")
            os.replace(out / f"{name}.partial", out / name)
    print(f"pairs     {out}, {cfg.num_noises * record['rows_per_noise']:,} rows")
    return out


def make(
    velocity: Any, x0: Tensor, fine_steps: int, wanted: list[Tensor], cond: Tensor | None
) -> dict[str, Tensor]:
    """Segments of all grids, those of one noise together; or pairs, if there are no grids."""
    made = [segments(velocity, x0, fine_steps, grid, cond) for grid in wanted or [1]]
    columns = {}
    for key in made[0]:
        if wanted or key not in ("t0", "t1"):
            by_noise = [cast(Any, part)[key].unflatten(0, (len(x0), -1)) for part in made]
            columns[key] = torch.cat(by_noise, 1).flatten(0, 1).cpu().contiguous()
    return columns


def read_grids(grid: Any, found: dict[str, Any]) -> list[Tensor]:
    """Grids of a file, a number of steps, or a list of them; files of another model warn."""
    if grid is None:
        return []
    items = list(grid) if isinstance(grid, ListConfig) else [grid]
    return [grids.uniform(g) if isinstance(g, int) else grids.load(g, found) for g in items]


def _begin(out: Path, record: dict[str, Any]) -> None:
    """Write the record, unless the folder holds one: it must then be of the same pairs."""
    file = out / RECORD
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n")
        return
    there = json.loads(file.read_text())
    for name, value in {**record, **record["provenance"]}.items():
        stored = {**there, **there.get("provenance", {})}.get(name)
        if name not in ("provenance", "versions") and stored != value:
            raise ValueError(
                f"out must be a new folder or hold the same pairs, got {out} with another {name}"
            )


@hydra.main(version_base="1.3", config_path="../conf", config_name="pairs")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit pairs``."""
    pairs(cfg)


if __name__ == "__main__":
    main()
