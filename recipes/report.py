"""Tabulate and plot quality and cost of samples: solvers x grids x evaluations.

flowkit report run=runs/quickstart
flowkit report run=runs/quickstart solvers=[euler,heun] nfe=[4,8,16] num_samples=5000
flowkit report run=runs/latent guidance=[1,1.5,2] solvers=[heun] nfe=[50] grids.shifted=null

Quality is the distance to the test split: the Fréchet distance of images, or the W2 of points. The
floor is the distance of equally many training samples. Images also have precision, recall and the
share that a judge recognizes as their class. Several scales of guidance give a further picture,
with each metric over the scale. Times count only the sampling, summed over all processes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics import (
    StoredFeatures,
    agreement,
    as_saved,
    frechet_distance,
    prdc,
    to_uint8,
    wasserstein2,
)
from flowkit.modules.flow import labels_of
from flowkit.provenance import cache_folder, versions, write_json, write_text
from flowkit.runs import Run
from flowkit.runs.drawing import draw_parts, like_test
from flowkit.runs.features import judge_of
from flowkit.runs.known_data import place_of
from flowkit.runs.parts import Columns, Parts, hash_of
from flowkit.runs.processes import launch
from flowkit.runs.records import kept_record
from flowkit.runs.report_plots import Row, plot, plot_guidance
from flowkit.runs.tables import markdown
from flowkit.sampling import ODESampler
from flowkit.types import Batch, Cond

STEP = {"euler": 1, "ab2": 1, "midpoint": 2, "heun": 2, "rk4": 4}
"""Evaluations per step; ab2 needs one more evaluation to start."""


class Measure(NamedTuple):
    """Measure of samples, and its values for real data."""

    name: str
    hash: str | None
    """Hash of the features."""
    see: Callable[[Tensor], Columns]
    """Maps a batch of samples to the columns that are measured."""
    numbers: Callable[[Columns], dict[str, float]]
    """Maps the columns of all samples to ``distance`` and other numbers."""
    real: dict[str, float]
    """Numbers of equally many training samples; ``class_agreement`` is of the test split."""


def report(cfg: DictConfig) -> list[Row]:
    """Measure as configured; write ``report.json``, ``report.md`` and ``report.png``.

    Several scales of guidance also give ``guidance.png``.

    Returns:
        A row per cell: ``solver``, ``grid``, ``guidance``, ``nfe``, ``steps``, ``distance``,
        ``milliseconds``, ``network_rows_per_sample``; for images also ``precision``, ``recall``,
        ``density``, ``coverage``, and with classes ``class_agreement``. The list is empty on all
        processes but the first.
    """
    fabric = launch(cfg)
    check_at_least(cfg.num_samples, 2, "num_samples")
    scales = list(cfg.guidance) if OmegaConf.is_list(cfg.guidance) else [cfg.guidance]
    if not scales or (None in scales and len(scales) > 1):
        raise ValueError(f"guidance must be null, a number or a list of numbers, got {scales}")
    first = Run.load(cfg.run, cfg.weights, fabric.device, scales[0], cfg.trust, **place_of(cfg))
    runs = [first, *(replace(first, guidance=scale) for scale in scales[1:])]
    for run in runs:
        run.module.guided(run.guidance)  # refuses a scale that the run's training does not allow
    first.reuse_features(cfg.feature_mode, cfg.tolerance, cfg.seed, cfg.seeding)
    out = Path(cfg.out) if cfg.out else first.folder / "report"
    cells = [(*cell, run) for cell in _cells(cfg) for run in runs]
    x0, cond, source, _ = like_test(first, cfg)
    with fabric.rank_zero_first():
        measure = _measure(cfg, first, cond)
    record = _record(cfg, first, measure)
    used = {**record, **source, "cond": hash_of(cond)}
    kept = _kept(out / "report.json", record)
    fabric.barrier()  # every process reads the file before the first process writes
    rows: list[Row] = []
    for solver, name, sampler, run in cells:
        key = json.dumps(run.describe(sampler))
        if key not in kept:
            parts = Parts(out, {**used, **run.describe(sampler)}, fabric)
            drawn, cost = draw_parts(run, x0, cond, sampler, measure.see, parts)
            kept[key] = {}
            if fabric.is_global_zero:
                kept[key] = _measured(measure, drawn, cost, sampler)
                parts.remove()
        cell = {"solver": solver, "grid": name, "guidance": run.guidance}
        rows.append({**cell, **kept[key], "key": key})
        if fabric.is_global_zero:  # after every cell, so that a growing table can be read
            write_json(out / "report.json", {**record, "rows": rows})
    if not fabric.is_global_zero:
        return []
    _show(rows, measure, out)
    return rows


def _record(cfg: DictConfig, run: Run, measure: Measure) -> dict[str, Any]:
    """Return the part of the record that all cells share."""
    return {
        "weights": run.weights,
        "sampling": {
            "feature_mode": getattr(run.module.velocity, "feature_mode", None),
            "tolerance": cfg.tolerance,
            "seed": cfg.seed,
            "seeding": cfg.seeding,
            "num_samples": cfg.num_samples,
        },
        "measure": {
            "name": measure.name,
            "features": measure.hash,
            "test": run.data.fingerprint("test"),
            "floor": measure.real["distance"],
            "real": measure.real,
        },
        "versions": versions(),
    }


def _show(rows: list[Row], measure: Measure, out: Path) -> None:
    """Write the table and the pictures; with several scales also the picture of guidance."""
    table = _table(rows, measure)
    write_text(out / "report.md", table)
    plot(rows, measure.name, measure.real["distance"], out / "report.png")
    print(f"{table}\npicture   {out / 'report.png'}")
    if len({row["guidance"] for row in rows}) > 1:
        plot_guidance(rows, measure.name, measure.real, out / "guidance.png")
        print(f"guidance  {out / 'guidance.png'}")


def _cells(cfg: DictConfig) -> list[tuple[str, str, ODESampler]]:
    """Return solver, name of the grid and sampler of every cell.

    Raises:
        TypeError: If ``nfe`` is not a list.
        ValueError: If a solver is unknown, or if no solver fits a number of evaluations.
    """
    if not OmegaConf.is_list(cfg.nfe):
        raise TypeError(f"nfe must be a list of numbers, such as [4, 8], got {cfg.nfe}")
    made = {name: instantiate(node) for name, node in cfg.grids.items() if node}
    cells = []
    for solver in cfg.solvers:
        if solver not in STEP:
            raise ValueError(f"solvers must be among {', '.join(STEP)}, got {solver}")
        for name, make in made.items():
            for nfe in cfg.nfe:
                steps = nfe // STEP[solver] - (solver == "ab2")
                if steps > 0 and (grid := make(steps)) is not None:
                    cells.append((solver, name, ODESampler(grid, solver)))
    if not cells:
        raise ValueError(
            f"nfe must hold a number that fits a solver, got {list(cfg.nfe)} for "
            f"{', '.join(cfg.solvers)}"
        )
    return cells


def _measure(cfg: DictConfig, run: Run, cond: Cond) -> Measure:
    """Return the measure of images or of points."""
    data, test, count = run.data, run.data.test[:], cfg.num_samples
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(cfg.seed))
    if len(data.shape) != 3:
        reference = test["x1"][:count]
        train = data.train[order[: len(reference)]]["x1"]
        real = {"distance": wasserstein2(train, reference)}
        far = lambda drawn: {"distance": wasserstein2(drawn["points"], reference)}  # noqa: E731
        return Measure("W2", None, lambda x: {"points": x}, far, real)
    features = instantiate(cfg.metric)(data)
    stored = StoredFeatures(features, cache_folder())
    reference = stored(as_saved(test["x1"]))

    def see(samples: Tensor) -> Columns:
        images = to_uint8(samples)
        return {"images": images, "features": features(as_saved(images))}

    def distances(seen: Tensor) -> dict[str, float]:
        neighbors = min(5, len(seen) - 1, len(reference) - 1)
        near = prdc(reference, seen, k=neighbors)._asdict()
        return {"distance": frechet_distance(seen, reference), **near}

    recognized, real = _judge(run, order, cond)

    def numbers(drawn: Columns) -> dict[str, float]:
        return {**distances(drawn["features"]), **recognized(drawn["images"])}

    real |= distances(stored(as_saved(data.train[order[:count]]["x1"])))
    return Measure(f"Fréchet distance ({features.name})", features.hash, see, numbers, real)


def _judge(
    run: Run, order: Tensor, cond: Cond
) -> tuple[Callable[[Tensor], dict[str, float]], dict[str, float]]:
    """Return the function that measures ``class_agreement``, and the value of the test split.

    Without several classes the function and the value are empty.
    """
    data, test = run.data, run.data.test[:]
    shown = labels_of(test, data.num_classes)
    labels = labels_of(Batch(x1=test["x1"], cond=cond), data.num_classes)
    train = data.train[order[:10_000]]
    judge = judge_of(train["x1"], labels_of(train, data.num_classes))
    if labels is None or shown is None or judge is None:
        return lambda images: {}, {}

    def recognized(images: Tensor, classes: Tensor = labels) -> dict[str, float]:
        hits = agreement(judge, as_saved(images), classes)
        return {"class_agreement": hits.double().mean().item()}

    return recognized, recognized(test["x1"], shown)


def _measured(
    measure: Measure, drawn: Columns, cost: dict[str, Any], sampler: ODESampler
) -> dict[str, Any]:
    """Return the numbers of a cell."""
    return {
        "nfe": round(cost["nfe"]),
        "steps": len(sampler.times) - 1,
        **measure.numbers(drawn),
        "milliseconds": 1e3 * cost["seconds"] / len(next(iter(drawn.values()))),
        "network_rows_per_sample": cost["network_rows_per_sample"],
    }


def _kept(file: Path, record: Mapping[str, Any]) -> dict[str, Row]:
    """Return the numbers of an earlier call with the same record, by the key of the cell."""
    earlier = kept_record(file)
    if any(earlier.get(name) != value for name, value in record.items()):
        return {}
    cell = ("solver", "grid", "guidance", "key")
    return {row["key"]: {k: v for k, v in row.items() if k not in cell} for row in earlier["rows"]}


def _table(rows: list[Row], measure: Measure) -> str:
    """Return a Markdown table: one line per cell, with the columns that have numbers."""
    several = len({row["guidance"] for row in rows}) > 1
    more = [n for n in ("class_agreement", "precision", "recall") if n in rows[0]]
    header = ["solver", "grid", *(["guidance"] if several else []), "steps", "NFE", measure.name]
    lines = []
    for row in rows:
        scale = [str(row["guidance"])] if several else []
        cost = [str(row["steps"]), str(row["nfe"])]
        numbers = [f"{row[n]:.3f}" for n in ("distance", *more)] + [f"{row['milliseconds']:.2f}"]
        lines.append([row["solver"], row["grid"], *scale, *cost, *numbers])
    text = markdown([*header, *(n.replace("_", " ") for n in more), "ms per sample"], lines, (0, 1))
    return f"{text}\nFloor, equally many training samples: {measure.real['distance']:.3f}\n"


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit report``."""
    report(cfg)


if __name__ == "__main__":
    main()
