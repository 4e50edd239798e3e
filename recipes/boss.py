"""Find the best times for a sampler of few steps to stop at.

flowkit boss run=runs/digits num_steps=8
flowkit boss run=runs/digits num_steps=8 metric=classifier       Fréchet distances, too
flowkit sample run=runs/digits sampler=from_file sampler.grid.file=runs/digits/boss/grid.json
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
from flowkit.data.arrays import from_uint8
from flowkit.metrics import Features, frechet_distance, to_uint8, versions
from flowkit.modules import FlowModule, load_run
from flowkit.modules.runs import read_config
from flowkit.recipes._grids import Row, markdown, plot
from flowkit.recipes.sample import choose_labels, draw, given_source, test_data, weights
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.types import Cond, Velocity

FRESH = 1_000_000  # where the noises of the comparison start
ACCURATE_STEPS = 25  # of RK4: what grids and adaptive solves are compared with
Draw = Callable[[int, int], tuple[Tensor, Cond]]
"""``draw(first, count)``: source samples of those numbers, and their conditions."""


def boss(cfg: DictConfig) -> dict[str, Any]:
    """Search as configured; writes ``grid.json``, ``table.md`` and ``grid.png``.

    The recommended grids of the other budgets go to ``grid-<steps>.json``.

    Returns:
        The provenance of the grid, which holds all scores.
    """
    run = Path(cfg.run)
    out = Path(cfg.out) if cfg.out else run / "boss"
    trained, module = read_config(run), load_run(run).to(cfg.device)
    guidance = trained["guidance"] if cfg.guidance is None else cfg.guidance
    guidance = None if guidance == 1 else guidance
    velocity, draw_starts = module.guided(guidance), _starts(cfg, module, trained)
    budgets = sorted({*cfg.budgets, cfg.num_steps})
    _announce(cfg, budgets, guided=guidance is not None)
    found, interval, costs_noises = _search(cfg, velocity, draw_starts, budgets)
    table, reference = _compare(cfg, velocity, found, *draw_starts(FRESH, cfg.fresh_noises))
    if cfg.metric is not None:
        _add_distances(cfg, module, trained, guidance, found, draw_starts, table)
    made = {
        "model_hash": weights(module)["hash"],
        "method": cfg.method,
        "guidance": guidance,
        "condition": "none" if draw_starts(0, 1)[1] is None else "all in turn",
        "fine_steps": cfg.fine_steps,
        "seed": cfg.seed,
        "num_noises": {
            "costs": costs_noises,
            "search": cfg.search_noises,
            "fresh": cfg.fresh_noises,
        },
        "reference": reference,
        "comparison": table,
        "versions": versions(),
    }
    return _write(out, cfg.num_steps, found, made, _describe(interval))


def _starts(cfg: DictConfig, module: FlowModule, trained: dict[str, Any]) -> Draw:
    """Noise and classes in turn, or what the data of the run bring: training, then test split."""
    if module.sample_shape is None:
        raise RuntimeError("run must have trained at least one step, got no sample shape")
    shape = module.sample_shape
    data = test_data(trained) if trained.get("needs_data") else None

    def starts(first: int, count: int) -> tuple[Tensor, Cond]:
        seeds = range(cfg.seed + first, cfg.seed + first + count)
        x0 = None
        if data is None:
            labels = choose_labels(None, first % FRESH + count, trained["num_classes"])
            cond = None if labels is None else labels[first % FRESH :].to(cfg.device)
        else:
            split = data.train if first < FRESH else data.test
            batch = split[[(first + k) % len(split) for k in range(count)]]
            x0, cond = given_source(batch, data), _on(batch.get("cond"), cfg.device)
        return (seeded_noise(shape, seeds) if x0 is None else x0).to(cfg.device), cond

    return starts


def _on(cond: Cond, device: str) -> Cond:
    if isinstance(cond, Mapping):
        return {name: value.to(device) for name, value in cond.items()}
    return None if cond is None else cond.to(device)


def _search(
    cfg: DictConfig, velocity: Velocity, draw_starts: Draw, budgets: list[int]
) -> tuple[dict[int, OptimizedGrid], BellmanInterval, int]:
    """The grids of all budgets, the Bellman grid's interval, and the noises of the costs."""
    fine = grids.uniform(cfg.fine_steps)
    costs, interval = converged_costs(
        velocity,
        # other noises than those of the search, whose scores are to be of unseen ones
        lambda first, count: draw_starts(cfg.search_noises + first, count),
        fine,
        cfg.num_steps,
        method=cfg.method,
        tolerance=cfg.tolerance,
        start=cfg.start,
        limit=cfg.limit,
        generator=torch.Generator().manual_seed(cfg.seed),
    )
    x0, cond = draw_starts(0, cfg.search_noises)
    options = {"method": cfg.method, "fine_steps": fine, "costs": costs.mean(0)}
    found = {
        budget: optimize_grid(velocity, x0, budget, cond, **options)
        for budget in tqdm(budgets, desc="grids", leave=False, disable=None)
    }
    return found, interval, len(costs) * (cfg.start // 16)


def _write(
    out: Path,
    num_steps: int,
    found: dict[int, OptimizedGrid],
    made: dict[str, Any],
    bellman: dict[str, Any],
) -> dict[str, Any]:
    """Write all grids, the table and the picture; return the provenance of the one asked for."""
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    for budget, result in found.items():
        candidates = {name: grid.tolist() for name, grid in result.grids.items()}
        own = {"objective": result.winner, "scores": result.scores, "grids": candidates}
        if budget == num_steps:
            record = {**own, "bellman": bellman, **made}
            grids.save(result.grid, out / "grid.json", **record)
        else:
            grids.save(result.grid, out / f"grid-{budget}.json", **own, **made)
    table, best = markdown(made["comparison"]), found[num_steps]
    (out / "table.md").write_text(table)
    plot(best.grids, best.winner, made["comparison"], out / "grid.png")
    print(f"{table}\nbest      {best.winner}, {num_steps} steps\ngrid      {out / 'grid.json'}")
    print(f"picture   {out / 'grid.png'}")
    return record


def _announce(cfg: DictConfig, budgets: list[int], guided: bool) -> None:
    """Say what the search will take, before it starts."""
    options = {"method": cfg.method, "fine_steps": cfg.fine_steps}
    by_budget = [search_rows(cfg.search_noises, budget, **options) for budget in budgets]
    per_noise = search_rows(3, cfg.num_steps, **options)["costs"] // 2
    factor = 2 if guided else 1
    rows = {
        f"costs ({per_noise:,} x {cfg.start:,} to {cfg.limit:,} noises)": per_noise * cfg.limit,
        f"end-point search ({len(budgets)} budgets)": sum(r["endpoint"] for r in by_budget),
        "scores": sum(r["scores"] for r in by_budget),
    }
    print(f"network rows, at most{' (two per guided evaluation)' if guided else ''}:")
    for name, count in rows.items():
        print(f"  {name:<44} {factor * count:>14,}")


def _compare(
    cfg: DictConfig, velocity: Velocity, found: dict[int, OptimizedGrid], x0: Tensor, cond: Cond
) -> tuple[list[Row], dict[str, Any]]:
    """Errors on fresh noise to an accurate solution: of all grids, and of adaptive solves."""
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
        target = ODESampler(ACCURATE_STEPS, "rk4")(velocity, x0, cond)

        def measure(sampler: ODESampler) -> dict[str, Any]:
            solution = sampler.solve(velocity, x0, cond)
            error = (solution.x - target).double().square().mean().sqrt().item()
            return {"nfe": solution.nfe, "error": error}

        for row in tqdm(table, desc="errors", leave=False, disable=None):
            row.update(measure(_sampler(row, found, cfg.method)))
        fine = measure(ODESampler(cfg.fine_steps, cfg.method))["error"]
    return table, {"method": "rk4", "steps": ACCURATE_STEPS, "error_of_the_fine_grid": fine}


def _sampler(row: Row, found: dict[int, OptimizedGrid], method: str) -> ODESampler:
    """The sampler of a row of the table."""
    if row["steps"] is None:
        return ODESampler(1, "dopri5", rtol=row["tolerance"], atol=row["tolerance"])
    return ODESampler(found[row["steps"]].grids[row["grid"]], method)


def _add_distances(
    cfg: DictConfig,
    module: FlowModule,
    trained: dict[str, Any],
    guidance: float | None,
    found: dict[int, OptimizedGrid],
    draw_starts: Draw,
    table: list[Row],
) -> None:
    """Fréchet distances of samples by every row of the table to held-out data, into it."""
    data = test_data(trained)
    features: Features = instantiate(cfg.metric)(data)
    real = features(from_uint8(to_uint8(data.test[:]["x1"])))
    x0, cond = draw_starts(FRESH, cfg.num_samples)
    for row in tqdm(table, desc="Fréchet distances", leave=False, disable=None):
        sampler = _sampler(row, found, cfg.method)
        samples, cost = draw(module, x0.split(cfg.batch_size), cond, sampler, guidance)
        row["frechet_distance"] = frechet_distance(features(from_uint8(to_uint8(samples))), real)
        row["frechet_nfe"], row["features"] = cost["nfe"], features.name


def _describe(interval: BellmanInterval) -> dict[str, Any]:
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
