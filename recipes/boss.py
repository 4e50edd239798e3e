"""Find the best grid of times for a sampler with few steps (BOSS).

flowkit boss run=runs/quickstart num_steps=8
flowkit boss run=runs/quickstart num_steps=8 metric=classifier       with Fréchet distances

Then sample with the grid:

flowkit sample run=runs/quickstart sampler=from_file \\
  sampler.grid.file=runs/quickstart/boss/grid.json

Or find a grid for a diffusers pipeline. A pipeline is a folder that ``save_pretrained`` wrote:

flowkit boss pipeline=stable-diffusion-3 prompt="a cat" num_steps=8

``sigmas.json`` then holds arguments of the pipeline's call, which draws with the found steps.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from flowkit import grids
from flowkit.boss import (
    BellmanInterval,
    OptimizedGrid,
    converged_costs,
    optimize_grid,
    search_rows,
)
from flowkit.boss.costs import check_num_steps, kind_of_step, make_field, rows_per_step
from flowkit.boss.guard import LEVEL
from flowkit.metrics import Features, as_saved, frechet_distance
from flowkit.metrics.comparison import unreliable
from flowkit.modules.callbacks import duration
from flowkit.places import check_writable
from flowkit.provenance import versions, write_text
from flowkit.runs import Run
from flowkit.runs.drawing import draw, like_test
from flowkit.runs.grid_plots import Row, plot, table_of
from flowkit.runs.records import kept_record, set_aside
from flowkit.runs.searching import PipelineModel, RunModel, Watched, load
from flowkit.runs.starts import FRESH
from flowkit.sampling import ODESampler
from flowkit.types import Cond

Model = RunModel | PipelineModel
FILES = ("grid-*.json", "sigmas*.json", "table.md", "grid.png")  # beside the main grid
ACCURATE_STEPS = 25  # RK4 steps of the reference for grids and adaptive solves


def boss(cfg: DictConfig) -> dict[str, Any]:
    """Search as configured; write ``grid.json``, ``table.md`` and ``grid.png``.

    The recommended grids of the other budgets go to ``grid-<steps>.json``. For a pipeline, each
    grid also has a file ``sigmas....json`` with the arguments of the pipeline's call. The files of
    an earlier, different search go to ``earlier-1`` (or the next free number).

    Returns:
        The provenance of the grid with all scores.
    """
    budgets = sorted({*cfg.budgets, cfg.num_steps})
    for budget in budgets:
        check_num_steps(budget, grids.uniform(cfg.fine_steps))
    model = load(cfg)
    out = Path(cfg.out) if cfg.out else model.folder / "boss"
    check_writable(out, "out")
    distance = None if cfg.metric is None else _distance(cfg, cast(RunModel, model).run)
    # Only standard normal noise can be drawn anew; source samples of data are few.
    extra_noises = cfg.extra_noises if model.starts.are_noise else 0
    work = _announce(cfg, budgets, extra_noises, model)
    found, interval, costs_noises = _search(cfg, model, budgets, extra_noises, work)
    table, reference = _compare(cfg, model, found, *model.starts(FRESH, cfg.fresh_noises))
    if distance is not None:
        for row in tqdm(table, desc="Fréchet distances", leave=False, disable=None):
            row.update(distance(_sampler(row, found, cfg.method)))
    made = {
        **model.made_with(cfg.method),
        "fine_steps": cfg.fine_steps,
        "seed": cfg.seed,
        "seeding": cfg.seeding,
        "num_noises": {
            "costs": costs_noises,
            "search": cfg.search_noises,
            "extra": extra_noises,
            "fresh": cfg.fresh_noises,
        },
        "test": {"method": "bootstrap-t, one-sided, for both grids together", "level": LEVEL},
        "reference": reference,
        "comparison": table,
        "versions": versions(),
    }
    return _write(out, cfg.num_steps, found, made, _describe(interval), model)


def _search(
    cfg: DictConfig, model: Model, budgets: list[int], extra_noises: int, work: int
) -> tuple[dict[int, OptimizedGrid], BellmanInterval, int]:
    """Return grids of all budgets, the interval of the Bellman grid, and the noises of costs."""
    fine = model.grid(cfg.fine_steps)
    with tqdm(total=work, desc="search", unit=" rows", leave=False, disable=None) as bar:
        velocity = Watched(model.velocity, bar)
        costs, interval = converged_costs(
            velocity,
            # The costs use other noises than the search, so that its scores are of unseen noises.
            lambda first, count: model.starts(cfg.search_noises + first, count),
            fine,
            cfg.num_steps,
            method=cfg.method,
            tolerance=cfg.tolerance,
            start=cfg.start,
            limit=cfg.limit,
            generator=torch.Generator().manual_seed(cfg.seed),
        )
        x0, cond = model.starts(0, cfg.search_noises)
        options = {"method": cfg.method, "fine_steps": fine, "costs": costs.mean(0)}
        options["extra_noises"] = extra_noises
        found = {
            budget: optimize_grid(
                velocity, x0, budget, cond, baseline=model.baseline(budget), **options
            )
            for budget in budgets
        }
    return found, interval, len(costs) * (cfg.start // 16)


def _write(
    out: Path,
    num_steps: int,
    found: dict[int, OptimizedGrid],
    made: dict[str, Any],
    bellman: dict[str, Any],
    model: Model,
) -> dict[str, Any]:
    """Write all grids, the table and the picture; return the provenance of the main grid.

    The main grid is written last and stands for all files.
    """
    out.mkdir(parents=True, exist_ok=True)
    table, best, main = table_of(made["comparison"]), found[num_steps], out / "grid.json"
    record = {**_own(best), "bellman": bellman, **made}
    earlier = kept_record(main) if main.is_file() else None
    if earlier is not None and earlier.get("provenance") != json.loads(json.dumps(record)):
        others = [file for name in FILES for file in sorted(out.glob(name))]
        set_aside([main, *others], "earlier")  # numbers in their names are budgets
    for budget, result in found.items():
        if budget != num_steps:
            grids.save(result.grid, out / f"grid-{budget}.json", **_own(result), **made)
        name = "sigmas.json" if budget == num_steps else f"sigmas-{budget}.json"
        model.write_sigmas(result.grid, out / name)
    write_text(out / "table.md", table)
    plot(best.grids, best.winner, made["comparison"], out / "grid.png")
    grids.save(best.grid, main, **record)
    print(f"{table}\nbest      {best.winner}, {num_steps} steps\ngrid      {out / 'grid.json'}")
    if isinstance(model, PipelineModel):
        print(f"sigmas    {out / 'sigmas.json'}  arguments of the pipeline's call")
    print(f"picture   {out / 'grid.png'}")
    return record


def _own(result: OptimizedGrid) -> dict[str, Any]:
    """Return the record of the search for one budget."""
    candidates = {name: grid.tolist() for name, grid in result.grids.items()}
    return {"objective": result.winner, "scores": result.scores, "grids": candidates}


def _announce(cfg: DictConfig, budgets: list[int], extra_noises: int, model: Model) -> int:
    """Print the network rows and the time that all will need at most.

    Returns:
        The number of samples in all evaluations of the search, at most.
    """
    method = kind_of_step(model.velocity, model.starts(0, 1)[1], cfg.method)
    options = {"method": method, "fine_steps": cfg.fine_steps, "extra_noises": extra_noises}
    by_budget = [search_rows(cfg.search_noises, budget, **options) for budget in budgets]
    per_noise = search_rows(3, cfg.num_steps, **options)["costs"] // 2
    factor, per_step = 2 if model.guided else 1, rows_per_step(method)
    steps = per_step * 3 * sum(budgets)
    accurate = per_step * cfg.fine_steps + 4 * ACCURATE_STEPS
    rows = {
        f"costs ({per_noise:,} x {cfg.start:,} to {cfg.limit:,} noises)": per_noise * cfg.limit,
        f"end-point search ({len(budgets)} budgets)": sum(r["endpoint"] for r in by_budget),
        "scores": sum(r["scores"] for r in by_budget),
        "errors on fresh noise, without adaptive": cfg.fresh_noises * (steps + accurate),
    }
    if cfg.metric is not None:
        rows["samples to measure, without adaptive"] = cfg.num_samples * steps
    print(f"network rows, at most{' (two per guided evaluation)' if model.guided else ''}:")
    for name, count in rows.items():
        print(f"  {name:<44} {factor * count:>14,}")
    seconds = sum(rows.values()) * _seconds_per_row(cfg, model)
    print(f"time      {duration(seconds)} by 3 evaluations; small batches take a few times as long")
    return sum(list(rows.values())[:3])


@torch.no_grad()
def _seconds_per_row(cfg: DictConfig, model: Model) -> float:
    """Return the time of an evaluation per sample, the median of three after a first one."""
    x0, cond = model.starts(0, min(cfg.batch_size, cfg.search_noises * 2 // 3))
    field, seconds = make_field(model.velocity, x0, cond, model.grid(1)), []
    for _ in range(4):
        began = time.perf_counter()
        field(x0, 0.5).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[1:])[1] / len(x0)


def _compare(
    cfg: DictConfig, model: Model, found: dict[int, OptimizedGrid], x0: Tensor, cond: Cond
) -> tuple[list[Row], dict[str, Any]]:
    """Measure the errors of all grids and of adaptive solves on fresh noise.

    Returns:
        The rows of the table, and a record of the accurate reference.
    """
    table: list[Row] = [
        {"grid": name, "steps": budget, "recommended": name == result.winner}
        for budget, result in found.items()
        for name in result.grids
    ]
    table += [
        {"grid": "adaptive", "steps": None, "recommended": False, "tolerance": tolerance}
        for tolerance in cfg.adaptive
    ]
    with torch.no_grad():
        target = ODESampler(model.grid(ACCURATE_STEPS), "rk4")(model.velocity, x0, cond)

        def measure(sampler: ODESampler) -> dict[str, Any]:
            solution = sampler.solve(model.velocity, x0, cond)
            error = (solution.x - target).double().square().mean().sqrt().item()
            return {"nfe": solution.nfe, "error": error}

        for row in tqdm(table, desc="errors", leave=False, disable=None):
            row.update(measure(_sampler(row, found, cfg.method)))
        fine = measure(ODESampler(model.grid(cfg.fine_steps), cfg.method))["error"]
    return table, {"method": "rk4", "steps": ACCURATE_STEPS, "error_of_the_fine_grid": fine}


def _sampler(row: Row, found: dict[int, OptimizedGrid], method: str) -> ODESampler:
    """Return the sampler of a row of the table."""
    if row["steps"] is None:
        return ODESampler(1, "dopri5", rtol=row["tolerance"], atol=row["tolerance"])
    return ODESampler(found[row["steps"]].grids[row["grid"]], method)


def _distance(cfg: DictConfig, run: Run) -> Callable[[ODESampler], dict[str, Any]]:
    """Return a function that measures the Fréchet distance and the NFE of a sampler.

    The measure is that of ``flowkit evaluate``.

    Raises:
        ValueError: If the data of the run are not images.
    """
    data = run.data
    if len(data.shape) != 3:
        raise ValueError(
            f"metric must be null for a run without images, got data of shape {data.shape}"
        )
    features: Features = instantiate(cfg.metric)(data)
    real = features(as_saved(data.test[:]["x1"]))
    x0, cond, source, _ = like_test(run, cfg)

    def measure(sampler: ODESampler) -> dict[str, Any]:
        samples, cost = draw(run, x0, cond, sampler)
        distance = frechet_distance(features(as_saved(samples)), real)
        return {
            "frechet_distance": distance,
            "frechet_nfe": cost["nfe"],
            "num_samples": source["num_samples"],
            "features": features.name,
            "unreliable": unreliable(source["num_samples"], len(real)),
        }

    return measure


def _describe(interval: BellmanInterval) -> dict[str, Any]:
    """Return the interval of the Bellman grid as JSON values."""
    return {
        "value": interval.value,
        "value_interval": list(interval.value_interval),
        "knots_interval": interval.knots_interval.tolist(),
    }


@hydra.main(version_base="1.3", config_path="../conf", config_name="boss")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit boss``."""
    boss(cfg)


if __name__ == "__main__":
    main()
