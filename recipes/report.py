"""Tabulate and plot what a run's samples cost and are worth: solvers x grids x evaluations.

flowkit report run=runs/quickstart
flowkit report run=runs/quickstart solvers=[euler,heun] nfe=[4,8,16] num_samples=5000

Quality is the Fréchet distance of images, or the W2 of points, to the test split; its floor is that
of as many training samples. Seconds are of the sampling alone, of all processes together.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit import grids
from flowkit.checks import check_at_least
from flowkit.data import SplitData
from flowkit.metrics import StoredFeatures, as_saved, frechet_distance, wasserstein2
from flowkit.modules.checkpoints import read_config
from flowkit.provenance import versions
from flowkit.runs.features import cache_folder
from flowkit.runs.parts import Parts, draw_parts, hash_of, launch
from flowkit.runs.records import describe, weights
from flowkit.runs.run import loaded
from flowkit.runs.starts import like_test, test_data
from flowkit.sampling import ODESampler

Row = dict[str, Any]
STEP = {"euler": 1, "ab2": 1, "midpoint": 2, "heun": 2, "rk4": 4}
"""Evaluations of a step; ab2 needs one more to start."""


class Measure(NamedTuple):
    """How good samples are: the distance of what is seen of them to what is seen of the data."""

    name: str
    hash: str | None
    """Of the features."""
    see: Callable[[Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], float]
    reference: Tensor
    floor: float
    """The distance of as many training samples."""


def report(cfg: DictConfig) -> list[Row]:
    """Measure as configured; writes ``report.json``, ``report.md`` and ``report.png``.

    Returns:
        A row per cell: ``solver``, ``grid``, ``nfe``, ``steps``, ``distance`` and ``milliseconds``;
        none on other processes than the first.
    """
    run, fabric = Path(cfg.run), launch(cfg)
    out = Path(cfg.out) if cfg.out else run / "report"
    check_at_least(cfg.num_samples, 2, "num_samples")
    trained = read_config(run)
    guidance = trained["guidance"] if cfg.guidance is None else cfg.guidance
    module = loaded(cfg, fabric.device, guidance)
    module.guided(guidance)
    if not OmegaConf.is_list(cfg.nfe):
        raise TypeError(f"nfe must be a list of numbers, such as [4, 8], got {cfg.nfe}")
    cells = list(_cells(cfg))
    if not cells:
        raise ValueError(
            f"nfe must hold a number that a solver can spend, got {list(cfg.nfe)} for "
            f"{', '.join(cfg.solvers)}"
        )
    data = test_data(trained)
    test = data.test[:]
    with fabric.rank_zero_first():
        measure = _measure(cfg, data, test["x1"])
    x0, cond, source, _ = like_test(cfg, module, test, data)
    record = {
        "weights": weights(module),
        "sampling": {
            "guidance": guidance,
            "feature_mode": getattr(module.velocity, "feature_mode", None),
            "tolerance": cfg.tolerance,
            "seed": cfg.seed,
            "num_samples": cfg.num_samples,
        },
        "measure": {
            "name": measure.name,
            "features": measure.hash,
            "test": data.fingerprint("test"),
            "floor": measure.floor,
        },
        "versions": versions(),
    }
    used = {**record, **source, "cond": hash_of(cond)}
    finish = lambda x: {"seen": measure.see(x)}  # noqa: E731
    kept = _kept(out / "report.json", record)
    fabric.barrier()  # all have read what the first is about to write
    rows: list[Row] = []
    for solver, name, sampler in cells:
        key = json.dumps(describe(sampler, guidance))
        if key not in kept:
            parts = Parts(out, {**used, **describe(sampler, guidance)}, fabric)
            drawn, cost = draw_parts(module, x0, cond, sampler, guidance, finish, parts)
            kept[key] = {}
            if fabric.is_global_zero:
                kept[key] = _measured(measure, drawn["seen"], cost, sampler)
                parts.remove()
        rows.append({"solver": solver, "grid": name, **kept[key], "key": key})
        if fabric.is_global_zero:  # after every cell: a long table can be read as it grows
            (out / "report.json").write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n")
    if not fabric.is_global_zero:
        return []
    table = _table(rows, measure)
    (out / "report.md").write_text(table)
    _plot(rows, measure, out / "report.png")
    print(f"{table}\npicture   {out / 'report.png'}")
    return rows


def saved(num_steps: int, folder: str) -> Tensor | None:
    """Return the grid of so many steps that `flowkit boss` wrote to a folder; None without one."""
    file = Path(folder) / f"grid-{num_steps}.json"
    return grids.load(file) if file.is_file() else None


def _cells(cfg: DictConfig) -> Iterator[tuple[str, str, ODESampler]]:
    """Solver, name of the grid and sampler of every cell."""
    made = {name: instantiate(node) for name, node in cfg.grids.items() if node}
    for solver in cfg.solvers:
        if solver not in STEP:
            raise ValueError(f"solvers must be among {', '.join(STEP)}, got {solver}")
        for name, make in made.items():
            for nfe in cfg.nfe:
                steps = nfe // STEP[solver] - (solver == "ab2")
                if steps > 0 and (grid := make(steps)) is not None:
                    yield solver, name, ODESampler(grid, solver)


def _measure(cfg: DictConfig, data: SplitData, test: Tensor) -> Measure:
    count = cfg.num_samples
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(cfg.seed))
    train = data.train[order[:count]]["x1"]
    if len(data.shape) == 3:
        features = instantiate(cfg.metric)(data)
        stored = StoredFeatures(features, cache_folder())
        reference = stored(as_saved(test))
        floor = frechet_distance(stored(as_saved(train)), reference)
        name = f"Fréchet distance ({features.name})"
        see = lambda x: features(as_saved(x))  # noqa: E731
        return Measure(name, features.hash, see, frechet_distance, reference, floor)
    reference = test[:count]
    floor = wasserstein2(train[: len(reference)], reference)
    return Measure("W2", None, lambda x: x, wasserstein2, reference, floor)


def _measured(
    measure: Measure, seen: Tensor, cost: dict[str, Any], sampler: ODESampler
) -> dict[str, Any]:
    """The numbers of a cell."""
    return {
        "nfe": round(cost["nfe"]),
        "steps": len(sampler.times) - 1,
        "distance": measure.distance(seen, measure.reference),
        "milliseconds": 1e3 * cost["seconds"] / len(seen),
    }


def _kept(file: Path, record: Mapping[str, Any]) -> dict[str, Row]:
    """Rows of an earlier call that measured the same, by what they depend on."""
    earlier = json.loads(file.read_text()) if file.is_file() else {}
    if any(earlier.get(name) != value for name, value in record.items()):
        return {}
    names = ("nfe", "steps", "distance", "milliseconds")
    return {row["key"]: {name: row[name] for name in names} for row in earlier["rows"]}


def _table(rows: list[Row], measure: Measure) -> str:
    header = ["solver", "grid", "steps", "NFE", measure.name, "ms a sample"]
    lines = [header, ["---", "---", *["---:"] * 4]]
    for row in rows:
        numbers = [f"{row['distance']:.3f}", f"{row['milliseconds']:.2f}"]
        lines.append([row["solver"], row["grid"], str(row["steps"]), str(row["nfe"]), *numbers])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{text}\nAs many training samples: {measure.floor:.3f}\n"


def _plot(rows: list[Row], measure: Measure, file: Path) -> None:
    """Distance over evaluations, and over time; a color a solver, a line style a grid."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    solvers, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("solver", "grid"))
    styles = ["-", "--", ":", "-."]
    labels = ("evaluations of the network", "milliseconds a sample")
    for axes, key, label in zip(panels, ("nfe", "milliseconds"), labels, strict=True):
        for k, solver in enumerate(solvers):
            for j, name in enumerate(names):
                mine = [row for row in rows if (row["solver"], row["grid"]) == (solver, name)]
                line = {"color": f"C{k}", "linestyle": styles[j % 4], "marker": "o", "ms": 4}
                values = [[row[name] for row in mine] for name in (key, "distance")]
                axes.plot(*values, label=f"{solver}, {name}", **line)
        axes.axhline(measure.floor, color="0.5", lw=1, label="training samples")
        axes.set(xscale="log", yscale="log", xlabel=label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    counts = sorted({row["nfe"] for row in rows})
    panels[0].set_xticks(counts, map(str, counts))
    panels[0].minorticks_off()
    panels[0].set_ylabel(measure.name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=120)


@hydra.main(version_base="1.3", config_path="../conf", config_name="report")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit report``."""
    report(cfg)


if __name__ == "__main__":
    main()
