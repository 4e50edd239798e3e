"""Make pairs of noise and sample, or segments of trajectories, for straightening.

flowkit pairs run=runs/quickstart out=pairs/reflow             pairs, for reflow
flowkit pairs run=runs/quickstart out=pairs/both grid=[4,8]    segments of two grids
flowkit pairs run=runs/quickstart out=pairs/boss grid=runs/quickstart/boss/grid.json

Then train on the pairs, and sample with their grid, which is copied to their folder:

flowkit train module=straightening module.start=runs/quickstart data=pairs data.root=pairs/boss
flowkit sample run=... sampler=from_file sampler.grid.file=pairs/boss/grid-8.json
"""

from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from tqdm import tqdm

from flowkit import grids
from flowkit.boss import segments
from flowkit.data.pairs import FORMAT, FORMAT_VERSION, RECORD, to_columns
from flowkit.provenance import read_json, versions, write_atomically, write_json
from flowkit.runs import Run
from flowkit.runs.known_data import copy_data_record, place_of
from flowkit.runs.training_cost import clocks, origin, read_cost, write_cost
from flowkit.sampling import sample_seeds
from flowkit.types import Cond
from flowkit.velocity import Velocity


def pairs(cfg: DictConfig) -> Path:
    """Solve as configured; write ``pairs-*.safetensors`` and ``pairs.json`` to a folder.

    The grids of segments go to ``grid-<steps>.json``, the time of the solves to ``training.json``.
    """
    from safetensors.torch import save_file

    run, out = (
        Run.load(cfg.run, cfg.weights, cfg.device, cfg.guidance, cfg.trust, **place_of(cfg)),
        Path(cfg.out),
    )
    velocity, made_with = run.velocity, run.made_with("euler")
    starts = run.starts(cfg.seed, cfg.seeding)
    wanted = read_grids(cfg.grid, made_with)
    record = {
        **_record(cfg, made_with, wanted),
        "num_classes": run.num_classes,
        "x0_is_noise": starts.are_noise,
        "encoded_by": getattr(run.module.autoencoder, "hash", None),
        "source": run.config["data"],
    }
    _begin(out, record, wanted)
    copy_data_record(run.folder, out)
    bar = tqdm(total=cfg.num_noises, desc="noises", disable=None)
    for k, name in enumerate(record["shards"]):
        start = k * cfg.shard_size
        stop = min(start + cfg.shard_size, cfg.num_noises)
        if (out / name).is_file():
            bar.update(stop - start)
            continue
        parts, began = [], clocks()
        for first in range(start, stop, cfg.batch_size):
            x0, cond = starts(first, min(cfg.batch_size, stop - first))
            parts.append(make(velocity, x0, cfg.fine_steps, wanted, cond))
            bar.update(len(x0))
        shard = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if k == 0 or read_cost(out):  # else the cost of earlier files is not known
            source = origin(run.folder, run.weights["hash"])
            write_cost(out, began, run.device, {"start": source})
        write_atomically(out / name, partial(save_file, shard))  # last: its work is then recorded
    bar.close()
    print(f"pairs     {out}, {cfg.num_noises * record['rows_per_noise']:,} rows")
    return out


def _record(cfg: DictConfig, made_with: dict[str, Any], wanted: list[Tensor]) -> dict[str, Any]:
    """Return a record of the content of the files and of their origin."""
    seeds = sample_seeds(cfg.seed, 0, cfg.num_noises, cfg.seeding)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "shards": [
            f"pairs-{k:05}.safetensors" for k in range(-(-cfg.num_noises // cfg.shard_size))
        ],
        "rows_per_noise": sum(len(grid) - 1 for grid in wanted) or 1,
        "provenance": {
            **made_with,
            "grids": [grid.tolist() for grid in wanted],
            "fine_steps": cfg.fine_steps,
            "seeds": [seeds.start, seeds.stop],
            "seeding": cfg.seeding,
            "shard_size": cfg.shard_size,
            "versions": versions(),
        },
    }


def make(
    velocity: Velocity, x0: Tensor, fine_steps: int, wanted: list[Tensor], cond: Cond
) -> dict[str, Tensor]:
    """Return the columns of segments of all grids by one solve, or of pairs if there is no grid.

    Segments of one noise are consecutive rows.
    """
    times = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), *wanted]).unique()
    columns = to_columns(segments(velocity, x0, fine_steps, times, cond))
    places = [torch.searchsorted(times, grid) for grid in wanted or [times[[0, -1]]]]
    starts = torch.cat([knots[:-1] for knots in places])
    ends = torch.cat([knots[1:] - 1 for knots in places])  # the last piece of a segment
    kept = {}
    for key, column in columns.items():
        if wanted or key not in ("t0", "t1"):
            by_noise = column.unflatten(0, (len(x0), -1))
            rows = by_noise[:, ends if key in ("x1", "t1") else starts]
            kept[key] = rows.flatten(0, 1).cpu().contiguous()
    return kept


def read_grids(grid: Any, used: dict[str, Any]) -> list[Tensor]:
    """Return the grids of a file, of a number of steps, or of a list of both.

    A file made with another model gives a warning.

    Raises:
        ValueError: If two grids have the same number of steps.
    """
    if grid is None:
        return []
    items = list(grid) if isinstance(grid, ListConfig) else [grid]
    wanted = [grids.uniform(g) if isinstance(g, int) else grids.load(g, used) for g in items]
    steps = [len(times) - 1 for times in wanted]
    if len(set(steps)) < len(steps):
        raise ValueError(f"grid must hold grids of different numbers of steps, got {steps}")
    return wanted


def _begin(out: Path, record: dict[str, Any], wanted: list[Tensor]) -> None:
    """Write the record and the grids, unless the folder already holds the same record.

    Raises:
        ValueError: If the folder holds other pairs.
    """
    file = out / RECORD
    if file.is_file():
        try:
            there = dict(read_json(file))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{RECORD} must describe the pairs of the folder, got {file}: {error}; delete the "
                "folder to have its pairs made again"
            ) from error
        for name, value in {**record, **record["provenance"]}.items():
            stored = {**there, **there.get("provenance", {})}.get(name)
            # the seeds themselves are compared, so their rule needs no comparison
            if name not in ("provenance", "versions", "seeding") and stored != value:
                raise ValueError(
                    f"out must be a new folder or hold the same pairs, got {out} with another "
                    f"{name}"
                )
        return
    out.mkdir(parents=True, exist_ok=True)
    for grid in wanted:
        # The grid is for students. Their weights are not known yet, but they need no guidance.
        own = {"objective": "straightening", "method": "euler", "guidance": None}
        taught_by = record["provenance"]["model_hash"]
        grids.save(grid, out / f"grid-{len(grid) - 1}.json", **own, taught_by=taught_by)
    write_json(file, record)


@hydra.main(version_base="1.3", config_path="../conf", config_name="pairs")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit pairs``."""
    pairs(cfg)


if __name__ == "__main__":
    main()
