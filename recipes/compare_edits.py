"""Compare methods of inversion and editing on a run's test images.

flowkit compare_edits run=runs/quickstart source=3 target=8
flowkit compare_edits experiment=fashion_edits run=runs/fashion

Inversions: the error of the regenerated image at equal numbers of network calls. The methods are
reversed Euler steps, corrected Euler steps, fixed-point iterations and FlowOpt.
Edits: the share of results that a judge recognizes as the target, against the distance to the
source. The methods are FlowOpt, with every iterate, and partial noising: the image is mixed with
noise, and the rest of the flow is solved under the target.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from flowkit.checks import check_between
from flowkit.data import SplitData
from flowkit.flowopt import FlowOpt
from flowkit.hub import results_of
from flowkit.metrics import PixelSVC
from flowkit.metrics.pictures import save_figure, save_picture
from flowkit.modules.flow import labels_of
from flowkit.paths import Linear
from flowkit.places import check_writable
from flowkit.provenance import versions, write_text
from flowkit.runs.editing import RunFlow
from flowkit.runs.features import judge_of
from flowkit.runs.records import recorded, recording
from flowkit.runs.tables import markdown
from flowkit.sampling import ODESampler, sample_seeds, seeded_noise

Row = dict[str, Any]


def compare_edits(cfg: DictConfig) -> dict[str, Any]:
    """Compare as configured; write ``inversions`` and ``edits`` as tables and pictures."""
    _check_settings(cfg)
    model = RunFlow.load(cfg)
    data = model.run.data
    for name in ("source", "target"):
        cfg[name] = model.run.class_number(cfg[name], name)
    folder = Path(cfg.out or results_of(cfg.run) / "edits" / "comparison")
    check_writable(folder, "out")
    names = ("report.json", "inversions.png", "edits.png", "strip.png", "inversions.md", "edits.md")
    files = [folder / name for name in names]
    judge = _judge(cfg, model, data) if cfg.num_edited else None
    inversions = compare_inversions(cfg, model, data) if cfg.num_inverted else []
    edits, strip = ([], None) if judge is None else compare_targets(cfg, model, data, judge)
    record = {
        "inversions": inversions,
        "edits": edits,
        "settings": recorded(cfg),
        "weights": model.record(),
        "versions": versions(),
    }
    with recording(record, files):
        if inversions:
            write_text(files[4], table := inversion_table(inversions))
            plot(inversions, "nfe", "rmse", files[1], log=True)
            print(f"{table}\npicture   {files[1]}\n")
        if strip is not None:
            write_text(files[5], table := edit_table(edits, cfg.scores))
            plot(edits, "distance", "score", files[2])
            save_picture(strip.flatten(0, 1), files[3], columns=strip.shape[1])
            print(f"{table}\npicture   {files[2]}\nstrip     {files[3]}")
    return record


def _check_settings(cfg: DictConfig) -> None:
    """Require settings that FlowOpt takes."""
    for name, options in {**cfg.inversions, **cfg.edits}.items():
        given = {key: value for key, value in options.items() if key != "skip"}
        check_between(options.get("skip", 0), 0, cfg.num_steps - 1, f"skip of {name!r}")
        try:
            FlowOpt(ODESampler(cfg.num_steps), **given)
        except TypeError as error:
            raise TypeError(
                f"{name!r} must hold settings of FlowOpt, got {given}: {error}"
            ) from error


# --- inversions -------------------------------------------------------------------------------


def compare_inversions(cfg: DictConfig, model: RunFlow, data: SplitData) -> list[Row]:
    """Measure the RMSE of regenerated images at equal numbers of evaluations.

    Reversed Euler steps use one evaluation less than the other methods.
    """
    test, velocity, n = data.test[: cfg.num_inverted], model.module.velocity, cfg.num_steps
    x1 = model.encode(test["x1"].to(cfg.device))
    cond = labels_of(test, data.num_classes)
    cond = None if cond is None else cond.to(cfg.device)

    def regenerate(num_steps: int, correct: int) -> Tensor:
        sampler = ODESampler(num_steps)
        return sampler(velocity, sampler.invert(velocity, x1, cond, correct=correct).x, cond)

    def optimize(solves: int, **options: Any) -> Tensor | None:
        iters = (
            solves - 2 - (4 if options.get("step_size", "auto") == "auto" else 0)
        )  # it is measured with 4
        if iters < 0:
            return None
        return FlowOpt(ODESampler(n), num_iters=iters, keep=(), **options)(velocity, x1, cond).x

    methods: dict[str, Callable[[int], Tensor | None]] = {
        "reversed Euler": lambda solves: regenerate(n * solves // 2, 0),
        "corrected (Uni-Inv)": lambda solves: regenerate(n * solves // 2, 1),
        "fixed point": lambda solves: regenerate(n, solves - 1),
    }
    for name, options in cfg.inversions.items():
        methods[f"FlowOpt, {name}"] = partial(optimize, **options)
    rows = []
    for name, run in tqdm(methods.items(), desc="inversions", leave=False, disable=None):
        for solves in cfg.solves:
            with torch.no_grad():
                found = run(solves)
            if found is not None:
                rmse = (found - x1).square().mean().sqrt().item()
                rows.append({"series": name, "nfe": n * solves + 1, "rmse": rmse})
    return rows


def inversion_table(rows: list[Row]) -> str:
    """Return a Markdown table: one line per method, one column per number of evaluations."""
    budgets = sorted({row["nfe"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["series"] for row in rows):
        values = {row["nfe"]: row["rmse"] for row in rows if row["series"] == name}
        lines.append([name, *(f"{values[n]:.5f}" if n in values else "" for n in budgets)])
    return markdown(["RMSE at evaluations", *map(str, budgets)], lines)


# --- edits ------------------------------------------------------------------------------------


def _judge(cfg: DictConfig, model: RunFlow, data: SplitData) -> PixelSVC:
    """Return the judge of edits, before any work.

    Raises:
        ValueError: If the run has no such classes, or if its data have no image of the source.
    """
    for name in ("source", "target"):
        model.condition(cfg[name], 1.0, name)
    train = data.train[:10_000]
    judge = judge_of(train["x1"], labels_of(train, data.num_classes))
    if judge is None:
        raise ValueError(f"num_edited must be 0 without several classes, got {cfg.num_edited}")
    if cfg.source not in labels_of(data.test[:], data.num_classes):
        raise ValueError(f"source must be a class of the test images, got {cfg.source}")
    return judge


def compare_targets(
    cfg: DictConfig, model: RunFlow, data: SplitData, judge: PixelSVC
) -> tuple[list[Row], Tensor | None]:
    """Return score and distance of all edits, and the iterates of the first series as images.

    The images are ``(rows, 1 + iterates, C, H, W)``, or None without edits.
    """
    test = data.test[:]
    images = test["x1"][labels_of(test, data.num_classes) == cfg.source][: cfg.num_edited]
    x1 = model.encode(images.to(cfg.device))
    scale = model.guidance if cfg.target_guidance is None else cfg.target_guidance
    source = model.condition(cfg.source, 1.0, "source", len(x1))
    target = model.condition(cfg.target, scale, "target", len(x1))
    grid, rows, strip = ODESampler(cfg.num_steps).times, [], None

    def measure(series: str, x: Tensor, nfe: int, **place: Any) -> None:
        found = judge.predict(model.decode(x).cpu())
        distance = (x - x1).square().flatten(1).mean(1).sqrt().mean().item()
        score = (found == cfg.target).float().mean().item()
        rows.append({"series": series, **place, "nfe": nfe, "distance": distance, "score": score})

    for name, options in tqdm(cfg.edits.items(), desc="edits", leave=False, disable=None):
        skip, options = options.get("skip", 0), {k: v for k, v in options.items() if k != "skip"}
        flowopt = FlowOpt(ODESampler(grid[skip:]), **options)
        found = flowopt(model, x1, source, target)
        measuring = found.nfe - (len(found.trace) + 1) * (cfg.num_steps - skip) - 1
        for k, x in enumerate(found.trace):
            nfe = (k + 2) * (cfg.num_steps - skip) + 1 + measuring
            measure(f"FlowOpt, {name}", x, nfe, iteration=k)
        if strip is None:
            columns = [model.decode(x[: cfg.rows]).cpu() for x in (x1, *found.trace)]
            strip = torch.stack(columns, 1)
    path = getattr(model.module, "path", Linear())
    seeds = sample_seeds(cfg.seed, 0, len(x1), cfg.seeding)
    noise = seeded_noise(x1.shape[1:], seeds, x1.device)
    for skip in range(cfg.num_steps):
        t = torch.full((len(x1),), grid[skip].item(), device=x1.device)
        with torch.no_grad():
            solution = ODESampler(grid[skip:]).solve(model, path.sample(noise, x1, t).x_t, target)
        strength = 1 - grid[skip].item()
        measure("partial noising", solution.x, solution.nfe, strength=strength)
    return rows, strip


def edit_table(rows: list[Row], scores: Iterable[float]) -> str:
    """Return a Markdown table of the least distance to the source at which a score is reached."""
    lines = []
    for name in dict.fromkeys(row["series"] for row in rows):
        line = [name]
        for score in scores:
            near = [r["distance"] for r in rows if r["series"] == name and r["score"] >= score]
            line.append(f"{min(near):.3f}" if near else "")
        lines.append(line)
    return markdown(["series", *(f"distance at a score of {s:g}" for s in scores)], lines)


def plot(rows: list[Row], x: str, y: str, file: Path, log: bool = False) -> None:
    """Plot one column over another: one line per series, one dot per row."""
    from matplotlib.figure import Figure

    names = {
        "nfe": "network evaluations",
        "rmse": "RMSE of the regenerated image",
        "distance": "RMSE to the source",
        "score": "share recognized as the target",
    }
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=names[x], ylabel=names[y])
    for name in dict.fromkeys(row["series"] for row in rows):
        mine = [row for row in rows if row["series"] == name]
        style = "s--" if name == "partial noising" else "o-"
        axes.plot([r[x] for r in mine], [r[y] for r in mine], style, ms=3, lw=1.2, label=name)
    if log:
        axes.set(xscale="log", yscale="log")
        places = sorted({row[x] for row in rows})
        axes.set_xticks(places, places)
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    save_figure(figure, file, 140)


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare_edits")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit compare_edits``."""
    compare_edits(cfg)


if __name__ == "__main__":
    main()
