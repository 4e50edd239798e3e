"""Train couplings on several problems and seeds, and tabulate their metrics.

flowkit compare experiment=toy_table hydra.run.dir=runs/toy_table
flowkit compare experiment=toy_table seeds=[42] 'evaluate=["sampler=euler", "sampler.grid=20"]'

Every cell of the table is an ordinary run folder. Finished cells are kept. So the same command
continues a stopped table, and a longer list adds cells. With other options for a cell, its earlier
folder and the earlier table get new names, as ``seed-0-1`` and ``table-1.md``.
"""

import csv
import io
import logging
import shutil
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import hydra
from hydra import compose
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from flowkit.checks import check_at_least
from flowkit.metrics.pictures import save_figure
from flowkit.modules.trust import trusting
from flowkit.provenance import write_json, write_text
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.train import train
from flowkit.rules import check
from flowkit.runs.locks import locked
from flowkit.runs.records import file_names, kept_record, set_aside
from flowkit.runs.tables import markdown, titled

Row = dict[str, Any]


def compare(cfg: DictConfig) -> list[Row]:
    """Run the missing cells; write ``table.md``, ``table.csv`` and ``table.png``.

    Returns:
        One row per cell: ``problem``, ``coupling``, ``seed``, the numbers of `evaluate`, and the
        ``seconds`` of training.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in ("seeds", "problems", "couplings"):
        check_at_least(len(cfg[name]), 1, f"number of {name}")
    out = Path(cfg.out)
    # Seeds change last, so that a stopped table is complete for its first seeds.
    cells = list(product(cfg.seeds, cfg.problems, cfg.couplings))
    _check_cells(cfg)  # before a folder is emptied
    with locked(out):  # a second call would empty the folders in which this one trains
        rows = _run_cells(cfg, out, cells)
    print((out / "table.md").read_text() + f"\npicture   {out / 'table.png'}")
    return rows


def _run_cells(cfg: DictConfig, out: Path, cells: list[tuple[int, str, str]]) -> list[Row]:
    """Run the missing cells, and return the rows of all."""
    rows: list[Row] = []
    problems, couplings = (
        dict(zip(names, file_names(names), strict=True)) for names in (cfg.problems, cfg.couplings)
    )
    folders, options = {}, {}
    for seed, problem, coupling in cells:
        cell = seed, problem, coupling
        folders[cell] = out / problems[problem] / couplings[coupling] / f"seed-{seed}"
        overrides = [*cfg.overrides, *cfg.problems[problem], *cfg.couplings[coupling]]
        options[cell] = {"train": [*overrides, f"seed={seed}"], "evaluate": list(cfg.evaluate)}
    _keep_earlier(out, {folders[cell]: options[cell] for cell in cells})
    bar = tqdm(cells, desc="cells", disable=None)
    for cell in bar:
        seed, problem, coupling = cell
        bar.set_postfix_str(f"{problem}, {coupling}, seed {seed}")
        with trusting(cfg.trust):
            numbers = run_cell(folders[cell], *options[cell].values())
        rows.append({"problem": problem, "coupling": coupling, "seed": seed, **numbers})
        # Written after every cell, so that a long table can be read while it grows.
        write_table(rows, out, cfg.metrics)
    return rows


def _keep_earlier(out: Path, cells: dict[Path, dict[str, list[str]]]) -> None:
    """Rename the table, and all trained cells whose options of training were others.

    The table is also renamed if a cell was evaluated with other options; its evaluation keeps its
    own record.
    """
    other: dict[str, list[Path]] = {"train": [], "evaluate": []}
    for folder, options in cells.items():
        done = kept_record(folder / "cell.json")
        for kind, found in other.items():
            if done.get(kind, options[kind]) != options[kind]:
                found.append(folder)
    if any(other.values()):
        set_aside([*other["train"], *(out / f"table.{kind}" for kind in ("md", "csv", "png"))])


def run_cell(folder: Path, train_with: list[str], evaluate_with: list[str]) -> Row:
    """Train and evaluate in a folder, unless the folder already has these results.

    The folder is emptied first if its training did not finish.

    Returns:
        The numbers of the evaluation, the ``seconds`` of training, and the names of the numbers
        that are ``unreliable``, if there are such.
    """
    record = folder / "cell.json"
    done = kept_record(record)
    with redirect_stdout(io.StringIO()):
        if done.get("train") != train_with:
            shutil.rmtree(folder, ignore_errors=True)
            start = time.perf_counter()
            train(_composed("train", train_with, run_dir=folder))
            done = {"train": train_with, "seconds": round(time.perf_counter() - start, 1)}
            write_json(record, done)
        if done.get("evaluate") != evaluate_with:
            metrics = evaluate(_composed("evaluate", evaluate_with, run=folder))["metrics"]
            numbers = {k: v for k, v in metrics.items() if type(v) in (int, float)}
            done |= {"evaluate": evaluate_with, "metrics": numbers}
            done["unreliable"] = metrics.get("unreliable", [])
            write_json(record, done)
    few = {"unreliable": done["unreliable"]} if done.get("unreliable") else {}
    return {**done["metrics"], "seconds": done["seconds"], **few}


def _check_cells(cfg: DictConfig) -> None:
    """Require that the options of all cells fit."""
    for problem, coupling in product(cfg.problems.values(), cfg.couplings.values()):
        composed = _composed("train", [*cfg.overrides, *problem, *coupling])
        check("train", OmegaConf.to_container(composed))
    composed = _composed("evaluate", list(cfg.evaluate), run=Path("${run}"))
    check("evaluate", OmegaConf.to_container(composed))


def _composed(recipe: str, overrides: list[str], **values: Path) -> DictConfig:
    """Compose the configuration of a recipe with overrides and paths."""
    cfg = compose(recipe, overrides=overrides)
    with open_dict(cfg):  # a path may break Hydra's grammar of overrides, so it is set as a value
        cfg.update({key: str(value) for key, value in values.items()})
    return cfg


def write_table(rows: list[Row], out: Path, metrics: Iterable[str] | None = None) -> None:
    """Write mean and standard deviation over seeds, as CSV, Markdown and a picture.

    Args:
        rows: Rows of `compare`.
        out: Folder of the files.
        metrics: Names of the columns; None takes every number.

    Raises:
        ValueError: If the rows have no such metric.
    """
    # Points and images have different numbers. A cell without a number stays empty.
    keys = dict.fromkeys(key for row in rows for key in row)
    known = [key for key in keys if key not in ("problem", "coupling", "seed", "unreliable")]
    columns = known if metrics is None else list(metrics)
    if unknown := [name for name in columns if name not in known]:
        raise ValueError(f"metrics must be among {', '.join(known)}, got {', '.join(unknown)}")
    lines, records = [], []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["problem"], row["coupling"]), []).append(row)
    for (problem, coupling), group in groups.items():
        record, cells = {"problem": problem, "coupling": coupling, "seeds": len(group)}, []
        for name in columns:
            values = [row[name] for row in group if name in row]
            if not values:
                record[f"{name}_mean"] = record[f"{name}_std"] = None
                cells.append("")
                continue
            record[f"{name}_mean"] = mean = fmean(values)
            # Sample estimate of the standard deviation, which needs two seeds.
            record[f"{name}_std"] = std = stdev(values) if len(values) > 1 else None
            cells.append(f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}")
        records.append(record)
        lines.append([problem, coupling, str(len(group)), *cells])
    header = ["problem", "coupling", "seeds", *(titled(name, name, rows) for name in columns)]
    write_text(out / "table.md", markdown(header, lines, names=(0, 1)))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, records[0])
    writer.writeheader()
    writer.writerows(records)
    write_text(out / "table.csv", text.getvalue())
    _plot(rows, columns, out / "table.png")


def _plot(rows: list[Row], columns: list[str], file: Path) -> None:
    """Plot a panel per problem and metric, a line per coupling, a dot per seed, a bar as mean."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    problems, couplings = (list(dict.fromkeys(r[k] for r in rows)) for k in ("problem", "coupling"))
    height = 0.8 + 0.24 * len(couplings)
    figure = Figure(figsize=(2 + 2.4 * len(columns), height * len(problems)), layout="constrained")
    grid = figure.subplots(len(problems), len(columns), squeeze=False, sharey=True)
    for problem, panels in zip(problems, grid, strict=True):
        panels[0].set_ylabel(problem)
        for axes, name in zip(panels, columns, strict=True):
            shown = []
            for k, coupling in enumerate(couplings):
                mine = [r for r in rows if (r["problem"], r["coupling"]) == (problem, coupling)]
                values = [r[name] for r in mine if name in r]
                axes.plot(values, [k] * len(values), "o", color="C0", alpha=0.5, ms=4)
                if values:
                    axes.plot(fmean(values), k, "|", color="C1", ms=13, mew=2.5)
                shown += values
            if shown and min(shown) > 0 and max(shown) > 8 * min(shown):
                axes.set_xscale("log")
                subs = (1, 2, 5) if max(shown) < 100 * min(shown) else (1,)
                axes.xaxis.set_major_locator(LogLocator(subs=subs))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axes.minorticks_off()
            axes.set_yticks(range(len(couplings)), couplings, fontsize=8)
            axes.tick_params(axis="x", labelsize=8)
            axes.set_title(titled(name.replace("_", " "), name, rows), fontsize=10)
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylim(len(couplings) - 0.5, -0.5)  # in the order of the table
    save_figure(figure, file)


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit compare``."""
    compare(cfg)


if __name__ == "__main__":
    main()
