"""Measure quality against FLOPs and wall time, by run, feature mode and steps.

flowkit pareto 'runs={FRA: runs/stage2}'                  full, cached and FRA features of one model
flowkit pareto 'runs={M1: "runs/one/*", M6: "runs/six/*"}' modes=[full]

A run without blocks has one mode. Every point is Euler sampling from the same noise. A run of
several blocks has the same number of steps in each block. With allocate=true there is also a point
of equal cost, with the steps allocated to the blocks for the least error. Runs under one name are
seeds, and the table gives their mean and standard deviation. Wall time is the median over
repetitions in which all points take turns.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from flowkit import grids
from flowkit.blockwise import (
    Blockwise,
    DriftLimit,
    ReuseErrors,
    allocate_steps,
    loss_by_time,
    network_flops,
    part_flops,
    predicted_gain,
    step_prices,
)
from flowkit.boss import step_costs
from flowkit.data import SplitData
from flowkit.metrics import Features, as_saved, frechet_distance
from flowkit.metrics.comparison import unreliable
from flowkit.modules import FlowModule
from flowkit.modules.flow import labels_of
from flowkit.places import check_writable
from flowkit.provenance import versions, write_text
from flowkit.rules import NAMED
from flowkit.runs import Run
from flowkit.runs.drawing import draw, start
from flowkit.runs.features import judge_of
from flowkit.runs.known_data import place_of
from flowkit.runs.pareto_plots import Row, plot, short, write_table
from flowkit.runs.records import file_names, recording
from flowkit.runs.starts import choose_labels
from flowkit.sampling import ODESampler, seeded_noise

Writes = dict[Path, Callable[[], None]]  # what is written beside the table, by file


class Point(NamedTuple):
    """Settings to sample a run: feature mode, sampler and variant."""

    run: Run
    mode: str
    sampler: ODESampler
    variant: str | None = None  # allocated or refreshed, at the same mode and NFE
    drift_limit: DriftLimit | None = None  # of the reuse of features

    def ready(self) -> FlowModule:
        """Return the module, set to this feature mode."""
        flow = self.run.module.velocity
        if isinstance(flow, Blockwise):
            flow.feature_mode, flow.drift_limit = self.mode, self.drift_limit
        return self.run.module


def pareto(cfg: DictConfig) -> list[Row]:
    """Measure as configured; write ``pareto.md``, ``pareto.json``, ``pareto.png`` and drifts.

    Files of an earlier call keep their content under new names, see `recording`.

    Returns:
        One row per run, mode and number of steps.
    """
    out, beside = Path(cfg.out), Writes()
    check_writable(out, "out")
    groups = {name: folders(chosen) for name, chosen in cfg.runs.items()}
    labels = iter(file_names(f"{n}-{folder.name}" for n, runs in groups.items() for folder in runs))
    measure, rows, timed = None, [], []
    for name, runs in groups.items():
        for folder in runs:
            run = Run.load(
                folder, cfg.weights, cfg.device, cfg.guidance, cfg.trust, **place_of(cfg)
            )
            measure = measure or Measure(cfg, run.data)  # the data of the first run
            held_out = measure.held_out_loss(run.module)
            for point in points(cfg, next(labels), run, beside):
                samples, cost = sample(cfg, point, measure.labels)
                row = {"name": name, "run": str(folder), "mode": point.mode}
                row |= {"variant": point.variant, "held_out_loss": held_out, **cost}
                rows.append({**row, **measure(samples)})
                timed.append(point)
                print("  ".join(f"{key} {short(rows[-1][key])}" for key in SHOWN), flush=True)
    for row, seconds in zip(rows, wall_times(cfg, timed, measure.labels), strict=True):
        row["seconds"] = seconds
    gains = measured_gains(rows)
    record = {"rows": rows, "gains": gains, "features": measure.name, "versions": versions()}
    files = [out / f"pareto.{kind}" for kind in ("json", "md", "png")]
    with recording(record, [*files, *beside]):
        for write in beside.values():
            write()
        write_table(rows, gains, files[1])
        plot(rows, files[2])
    print(f"\n{files[1].read_text()}\npicture   {files[2]}")
    return rows


def folders(chosen: str | Sequence[str]) -> list[Path]:
    """Return runs, given one pattern or several, with ``*`` for any name of a folder.

    Raises:
        FileNotFoundError: If no folder matches.
    """
    patterns = [chosen] if isinstance(chosen, str) else list(chosen)
    names = [[one] if NAMED.fullmatch(one) else sorted(glob(one)) for one in patterns]
    found = [Path(name) for several in names for name in several]
    if not found:
        raise FileNotFoundError(f"runs must name run folders, got {chosen}; no folder matches")
    return found


SHOWN = ("name", "mode", "variant", "nfe", "gflops", "frechet_distance", "class_agreement")


class Measure:
    """Fréchet distance to the test split, and share of samples recognized as their class."""

    def __init__(self, cfg: DictConfig, data: SplitData) -> None:
        self.data, self.cfg, test = data, cfg, data.test[:]
        self.features: Features = instantiate(cfg.metric)(self.data)
        self.name = {"name": self.features.name, "hash": self.features.hash}
        self.reference = self._embed(test["x1"])
        self.labels = choose_labels(None, cfg.num_samples, self.data.num_classes)
        self.judge = None
        if self.labels is not None:
            train = self.data.train[:10_000]
            self.judge = judge_of(train["x1"], labels_of(train, self.data.num_classes))

    def _embed(self, images: Tensor) -> Tensor:
        """Return the features of images."""
        return self.features(as_saved(images))

    def __call__(self, samples: Tensor) -> dict[str, Any]:
        """Return ``frechet_distance``, and ``class_agreement`` or None without classes.

        Also return the names of the values that are ``unreliable``, since there are few images.
        """
        agreement = None
        if self.judge is not None and self.labels is not None:
            agreement = (self.judge.predict(samples) == self.labels).float().mean().item()
        distance = frechet_distance(self._embed(samples), self.reference)
        few = unreliable(len(samples), len(self.reference))
        return {"frechet_distance": distance, "class_agreement": agreement, "unreliable": few}

    @torch.no_grad()
    def held_out_loss(self, module: FlowModule) -> float:
        """Return the flow-matching loss of the test split, over 20 intervals of time."""
        batch = self.data.test[: self.cfg.num_samples]
        batch = {k: v.to(self.cfg.device) for k, v in batch.items() if k in ("x1", "cond")}
        generator = torch.Generator(self.cfg.device).manual_seed(self.cfg.seed)
        batch = module.encode(batch, generator)
        _, loss = loss_by_time(module.velocity, batch, path=module.path, generator=generator)
        return loss.mean().item()


def points(cfg: DictConfig, label: str, run: Run, beside: Writes) -> Iterator[Point]:
    """Yield the points of a run; measure the drift of features if they are reused.

    Drift and allocated grids are added to the files to write, with the label in their names.
    """
    flow = run.module.velocity
    if not isinstance(flow, Blockwise):
        for nfe in cfg.nfe:
            yield Point(run, "full", ODESampler(nfe))
        return
    known = {"full": True, "cached": flow.trunk, "fra": flow.feature_residual}
    modes = [mode for mode in cfg.modes if known[mode] is not None]
    errors = {} if modes == ["full"] else drift_errors(cfg, label, run, beside)
    allocate = Allocator(cfg, label, run, beside) if cfg.allocate else None
    for nfe in cfg.nfe:
        steps, rest = divmod(nfe, flow.num_segments)
        if rest:
            continue
        even = ODESampler(grids.blockwise(flow.edges, steps))
        for mode in modes:
            point = Point(run, mode, even)
            yield point
            if steps == 1:
                continue
            if allocate is not None:
                yield point._replace(sampler=allocate(mode, steps), variant="allocated steps")
            if mode != "full":
                for tolerance in cfg.tolerances:
                    limit = DriftLimit(errors, tolerance)
                    variant = f"refreshed at {tolerance:g}"
                    yield point._replace(variant=variant, drift_limit=limit)


def drift_errors(
    cfg: DictConfig, name: str, run: Run, beside: Writes
) -> dict[str, list[ReuseErrors]]:
    """Return the errors of reused features; print the drift and add its file."""
    drift = run.feature_drift(cfg.seed, cfg.seeding)
    file = Path(cfg.out) / f"drift-{name}.txt"
    beside[file] = partial(write_text, file, drift.table() + "\n")
    print(f"drift     {file}\n{drift.table()}")
    return drift.pairs


class Allocator:
    """Sampler with more steps in the segments that need them, called as ``allocate(mode, steps)``.

    The sampler costs at most as much as ``steps`` steps in every segment. Its grid is added to the
    files beside the table.
    """

    def __init__(self, cfg: DictConfig, name: str, run: Run, beside: Writes) -> None:
        self.flow: Any = run.module.velocity
        self.beside = beside
        self.stem = f"{Path(cfg.out) / 'grid'}-{name}"
        self.fine_steps = 2 * max(cfg.nfe) // self.flow.num_segments
        # These noises differ from the noises of the samples.
        self.x0, cond = run.starts(cfg.seed, cfg.seeding)(cfg.num_samples, 64)
        self.parts = part_flops(self.flow, self.x0, cond)
        fine = grids.blockwise(self.flow.edges, self.fine_steps)
        self.costs = step_costs(run.velocity, self.x0, fine, cond)
        self.made = run.made_with("euler")

    def __call__(self, mode: str, steps: int) -> ODESampler:
        """Return the sampler of a feature mode, for the cost of ``steps`` steps per segment."""
        prices = [step_prices(self.parts, m, mode) for m in range(self.flow.num_segments)]
        budget = sum(first + (steps - 1) * later for first, later in prices)
        options = {"fine_steps": self.fine_steps, "costs": self.costs}
        found = allocate_steps(self.flow, self.x0, prices, budget, **options)
        print(f"steps     {found.steps} instead of {steps} per segment, with {mode} features")
        file, made = Path(f"{self.stem}-{mode}-{steps}.json"), {**self.made, "steps": found.steps}
        self.beside[file] = partial(grids.save, found.grid, file, **made)
        return ODESampler(found.grid)


def sample(cfg: DictConfig, point: Point, labels: Tensor | None) -> tuple[Tensor, Row]:
    """Draw samples, and count their cost per sample."""
    run, flow = point.run, point.ready().velocity
    x0, source = start(run, cfg, cfg.num_samples)
    samples, cost = draw(run, x0, labels, point.sampler)
    if not isinstance(flow, Blockwise):
        one = network_flops(flow, x0[0], labels)
        scale = cost["network_rows_per_sample"] / 1e9
        cost["gflops"], cost["gflops_without_attention"] = one.total * scale, one.linear * scale
    elif point.mode == "fra":
        steps = round(cost["nfe"]) // flow.num_segments
        parts = part_flops(flow, x0[0], labels)
        cost |= {"steps_per_segment": steps, "predicted_gain": predicted_gain(parts, steps)}
    del cost["seconds"]  # wall_times measures the time
    sampling = {**run.describe(point.sampler), **source}
    return samples, {**cost, "weights": run.weights, "sampling": sampling}


def wall_times(cfg: DictConfig, timed: list[Point], labels: Tensor | None) -> list[float]:
    """Return the median seconds per sample of each point. In each repetition all points run."""
    spent: list[list[float]] = [[] for _ in timed]
    size = min(cfg.batch_size, cfg.num_samples)
    cond = None if labels is None else labels[:size]
    bar = tqdm(total=cfg.repetitions * len(timed), desc="timing", leave=False, disable=None)
    for _ in range(cfg.repetitions):
        for point, seconds in zip(timed, spent, strict=True):
            module = point.ready()
            x0 = seeded_noise(module.sample_shape, range(size))
            began = time.perf_counter()
            module.solve(x0, point.sampler, cond, point.run.guidance).x.cpu()
            seconds.append(time.perf_counter() - began)
            bar.update()
    return [median(seconds) / size for seconds in spent]


def measured_gains(rows: list[Row]) -> list[Row]:
    """Return the cost of full features divided by the cost of FRA: predicted, FLOPs and time."""
    full, gains = {(r["run"], r["nfe"]): r for r in rows if r["mode"] == "full"}, []
    for row in rows:
        other = full.get((row["run"], row["nfe"]))
        if row["mode"] != "fra" or row["variant"] is not None or other is None:
            continue
        gains.append(
            {
                "run": row["run"],
                "steps_per_segment": row["steps_per_segment"],
                "predicted": row["predicted_gain"],
                "flops": other["gflops"] / row["gflops"],
                "time": other["seconds"] / row["seconds"],
            }
        )
    return gains


@hydra.main(version_base="1.3", config_path="../conf", config_name="pareto")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit pareto``."""
    pareto(cfg)


if __name__ == "__main__":
    main()
