"""Tabulate and plot quality and cost of samples: runs x solvers x grids x evaluations.

flowkit report run=runs/quickstart
flowkit report run=runs/quickstart solvers=[euler,heun] nfe=[4,8,16] num_samples=5000
flowkit report run=runs/latent guidance=[1,1.5,2] solvers=[heun] nfe=[50] grids.shifted=null
flowkit report run=[runs/flow,runs/reflow,runs/mean] names=[flow,reflow,mean flow] \\
  solvers=[euler] grids.shifted=null

Quality is the distance to the test split: the Fréchet distance of images, or the W2 of points. The
floor is the distance of equally many training samples. Images also have precision, recall and the
share that a judge recognizes as their class. Several scales of guidance give a further picture,
with each metric over the scale. Times count only the sampling, summed over all processes.

Several runs have the same data, labels, seeds and features, and each its own guidance and grids. A
run of mean velocities takes Euler steps only. The cost of a training, with that of the run it
learnt from, is what `flowkit train` has recorded.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.hub import results_of
from flowkit.metrics import (
    StoredFeatures,
    agreement,
    as_saved,
    frechet_distance,
    prdc,
    to_uint8,
    wasserstein2,
)
from flowkit.metrics.comparison import unreliable
from flowkit.modules.flow import labels_of
from flowkit.places import check_writable
from flowkit.provenance import cache_folder, versions, write_json, write_text
from flowkit.runs import Run
from flowkit.runs.drawing import draw_parts, like_test
from flowkit.runs.features import judge_of
from flowkit.runs.known_data import place_of
from flowkit.runs.parts import Columns, Parts, hash_of
from flowkit.runs.processes import launch, say
from flowkit.runs.records import kept_record, set_aside
from flowkit.runs.report_plots import Row, plot, plot_guidance, tables
from flowkit.runs.training_cost import read_cost
from flowkit.sampling import MeanVelocity, ODESampler
from flowkit.types import Batch, Cond

STEP = {"euler": 1, "ab2": 1, "midpoint": 2, "heun": 2, "rk4": 4}
"""Evaluations per step; ab2 needs one more evaluation to start."""

VERSION = 2  # of report.json
FILES = ("report.json", "report.md", "report.png", "guidance.png")


class Measure(NamedTuple):
    """Measure of samples, and its values for real data."""

    name: str
    hash: str | None
    """Hash of the features."""
    see: Callable[[Tensor], Columns]
    """Maps a batch of samples to the columns that are measured."""
    numbers: Callable[[Columns], Row]
    """Maps the columns of all samples to ``distance`` and other numbers, and those of few images to
    their names as ``unreliable``."""
    real: dict[str, float]
    """Numbers of equally many training samples; ``class_agreement`` is of the test split."""


def report(cfg: DictConfig) -> list[Row]:
    """Measure as configured; write ``report.json``, ``report.md`` and ``report.png``.

    Several scales of guidance also give ``guidance.png``. An earlier report with cells that this
    one does not have keeps its files under new names, see `set_aside`.

    Returns:
        A row per cell: ``name`` of the run, ``solver``, ``grid``, ``guidance``, ``nfe``, ``steps``,
        ``distance``, ``milliseconds``, ``network_rows_per_sample``; for images also ``precision``,
        ``recall``, ``density``, ``coverage``, and with classes ``class_agreement``. The list is
        empty on all processes but the first.
    """
    fabric = launch(cfg)
    check_at_least(cfg.num_samples, 2, "num_samples")
    scales = list(cfg.guidance) if OmegaConf.is_list(cfg.guidance) else [cfg.guidance]
    if not scales or (None in scales and len(scales) > 1):
        raise ValueError(f"guidance must be null, a number or a list of numbers, got {scales}")
    out = _folder(cfg)
    check_writable(out, "out")
    runs = _runs(cfg, scales[0], fabric.device)
    cells = list(_cells(cfg, runs, scales))
    for run in runs.values():
        run.reuse_features(cfg.feature_mode, cfg.tolerance, cfg.seed, cfg.seeding)
    first = next(iter(runs.values()))
    starts = {name: like_test(run, cfg) for name, run in runs.items()}
    with fabric.rank_zero_first():
        measure = _measure(cfg, first, next(iter(starts.values()))[1])
    record = _record(cfg, first, measure)
    told = [_told(name, run) for name, run in runs.items()]
    settings = [{**_model(run), **run.describe(sampler)} for _, run, sampler in cells]
    kept, others = _kept(out / "report.json", record, {json.dumps(own) for own in settings})
    fabric.barrier()  # every process reads the file before the first process writes
    if others and fabric.is_global_zero:
        set_aside([out / name for name in FILES])
    rows: list[Row] = []
    for (cell, run, sampler), own in zip(cells, settings, strict=True):
        x0, cond, source, _ = starts[cell["name"]]
        key = json.dumps(own)
        if key not in kept:
            parts = Parts(out, {**record, **source, "cond": hash_of(cond), **own}, fabric)
            drawn, cost = draw_parts(run, x0, cond, sampler, measure.see, parts)
            kept[key] = {}
            if fabric.is_global_zero:
                kept[key] = _measured(measure, drawn, cost, sampler)
                parts.remove()
        rows.append({**cell, **kept[key], "key": key})
        if fabric.is_global_zero:  # after every cell, so that a growing table can be read
            write_json(out / "report.json", {**record, "runs": told, "rows": rows})
    if not fabric.is_global_zero:
        return []
    _show(rows, measure, told, out, len(scales) > 1)
    return rows


def _show(
    rows: list[Row], measure: Measure, runs: list[dict[str, Any]], out: Path, scales: bool
) -> None:
    """Write the tables and the pictures; with several scales also the picture of guidance."""
    text = tables(rows, measure.name, measure.real, runs)
    write_text(out / "report.md", text)
    plot(rows, measure.name, measure.real["distance"], out / "report.png")
    print(f"{text}\npicture   {out / 'report.png'}")
    if scales:
        plot_guidance(rows, measure.name, measure.real, out / "guidance.png")
        print(f"guidance  {out / 'guidance.png'}")


# --- runs and cells ---------------------------------------------------------------------------


def _folders(cfg: DictConfig) -> list[Path]:
    """Return the folders of the runs."""
    return [Path(run) for run in ([cfg.run] if isinstance(cfg.run, str) else cfg.run)]


def _folder(cfg: DictConfig) -> Path:
    """Return the folder of the report."""
    folders = _folders(cfg)
    own = results_of(folders[0]) / "report" if len(folders) == 1 else "runs/report"
    return Path(cfg.out or own)


def _runs(cfg: DictConfig, guidance: float | None, device: torch.device) -> dict[str, Run]:
    """Load the runs, by their names.

    Raises:
        ValueError: If there is not a name of its own for each run, or if their data differ.
    """
    folders = _folders(cfg)
    names = [folder.name for folder in folders] if cfg.names is None else list(cfg.names)
    if len(names) != len(folders) or len(set(names)) < len(names):
        fix = "; give names=[...]" if cfg.names is None else ""
        raise ValueError(f"names must be {len(folders)} different names, got {names}{fix}")
    options = (cfg.weights, device, guidance, cfg.trust)
    runs = {
        name: Run.load(folder, *options, **place_of(cfg))
        for name, folder in zip(names, folders, strict=True)
    }
    _check_same_data(list(runs.values()))
    return runs


def _check_same_data(runs: Sequence[Run]) -> None:
    """Require the same data of all runs; features, judge, labels and floor then are the same, too.

    Raises:
        ValueError: If the data of two runs differ.
    """
    first, *others = runs
    for run in others:
        differing = [
            f"{name} split"
            for name in ("train", "test")
            if first.data.fingerprint(name) != run.data.fingerprint(name)
        ]
        if first.data.num_classes != run.data.num_classes:
            differing.append("number of classes")
        if differing:
            raise ValueError(
                f"run must hold runs of the same data, got {first.folder} and {run.folder}, which "
                f"differ in {' and '.join(differing)}"
            )


def _model(run: Run) -> dict[str, Any]:
    """Return the record of what the samples of a run depend on beside sampler and seeds."""
    mode = getattr(run.module.velocity, "feature_mode", None)
    return {"weights": run.weights, "feature_mode": mode}


def _told(name: str, run: Run) -> dict[str, Any]:
    """Return the record of a run: name, folder, weights, guidance that is learnt, cost."""
    learnt = getattr(run.module, "guidance_scale", None)
    folder, cost = str(run.folder), read_cost(run.folder)
    return {"name": name, "folder": folder, **_model(run), "learnt_guidance": learnt, "cost": cost}


def _record(cfg: DictConfig, run: Run, measure: Measure) -> dict[str, Any]:
    """Return the part of the record that all cells share."""
    return {
        "version": VERSION,
        "sampling": {
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


def _cells(
    cfg: DictConfig, runs: Mapping[str, Run], scales: Sequence[float | None]
) -> Iterator[tuple[Row, Run, ODESampler]]:
    """Yield the words of every cell, its run under its guidance, and its sampler.

    Raises:
        ValueError: If the training of a run does not allow a scale of guidance.
    """
    for name, run in runs.items():
        guided = [replace(run, guidance=s) for s in scales] if cfg.guidance is not None else [run]
        for one in guided:
            one.module.guided(one.guidance)  # refuses a wrong scale now
        for solver, grid, sampler in _samplers(cfg, run):
            for one in guided:
                cell = {"name": name, "solver": solver, "grid": grid, "guidance": one.guidance}
                yield cell, one, sampler


def _samplers(cfg: DictConfig, run: Run) -> list[tuple[str, str, ODESampler]]:
    """Return solver, name of the grid and sampler of every cell of a run.

    Raises:
        TypeError: If ``nfe`` is not a list.
        ValueError: If a solver is unknown or would not use the means of a run of mean velocities,
            or if no solver fits a number of evaluations.
    """
    if not OmegaConf.is_list(cfg.nfe):
        raise TypeError(f"nfe must be a list of numbers, such as [4, 8], got {cfg.nfe}")
    solvers = _solvers(list(cfg.solvers), run)
    counts: list[int] = sorted({*cfg.nfe, *([2, 4] if 1 in cfg.nfe else [])})
    nodes = OmegaConf.merge(cfg, {"run": str(run.place)}).grids  # in a grid ${run} is this run
    made = {name: instantiate(node) for name, node in nodes.items() if node}
    samplers = []
    for solver in solvers:
        for name, make in made.items():
            for nfe in counts:
                steps = nfe // STEP[solver] - (solver == "ab2")
                if steps > 0 and (grid := make(steps)) is not None:
                    samplers.append((solver, name, ODESampler(grid, solver)))
    if not samplers:
        raise ValueError(
            f"nfe must hold a number that fits a solver, got {list(cfg.nfe)} for "
            f"{', '.join(solvers)}"
        )
    return samplers


def _solvers(solvers: list[str], run: Run) -> list[str]:
    """Return the solvers of a run: of mean velocities Euler alone, which uses the means.

    Raises:
        ValueError: If a solver is unknown, or if Euler is missing for mean velocities.
    """
    if unknown := [solver for solver in solvers if solver not in STEP]:
        raise ValueError(f"solvers must be among {', '.join(STEP)}, got {unknown[0]}")
    if not isinstance(run.module.velocity, MeanVelocity) or solvers == ["euler"]:
        return solvers
    if "euler" not in solvers:
        raise ValueError(
            f"solvers must hold euler for the mean velocities of {run.folder}, got "
            f"{', '.join(solvers)}"
        )
    say(f"solvers   euler alone for {run.folder}, since others do not use mean velocities")
    return ["euler"]


# --- measures ---------------------------------------------------------------------------------


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

    def distances(seen: Tensor) -> Row:
        neighbors = min(5, len(seen) - 1, len(reference) - 1)
        near = prdc(reference, seen, k=neighbors)._asdict()
        return {"distance": frechet_distance(seen, reference), **near}

    recognized, real = _judge(run, order, cond)

    def numbers(drawn: Columns) -> Row:
        few = unreliable(len(drawn["features"]), len(reference))
        marked = {"unreliable": [{"frechet_distance": "distance"}.get(name, name) for name in few]}
        return {**distances(drawn["features"]), **recognized(drawn["images"]), **marked}

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


def _kept(
    file: Path, record: Mapping[str, Any], keys: Collection[str]
) -> tuple[dict[str, Row], bool]:
    """Return the numbers of an earlier call with the same record, by the key of the cell.

    Also return True if the earlier report has another record, or cells beside those of ``keys``.
    """
    earlier = kept_record(file)
    if any(earlier.get(name) != value for name, value in record.items()):
        return {}, bool(earlier)
    cell = ("name", "solver", "grid", "guidance", "key")
    kept = {row["key"]: {k: v for k, v in row.items() if k not in cell} for row in earlier["rows"]}
    return kept, not kept.keys() <= set(keys)


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit report``."""
    report(cfg)


if __name__ == "__main__":
    main()
