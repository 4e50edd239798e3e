"""Measure quality against cost: counted FLOPs and wall time, by run, feature mode and steps.

flowkit pareto 'runs={FRA: runs/stage2}'                  full, cached and FRA features of one model
flowkit pareto 'runs={M1: "runs/one/*", M6: "runs/six/*"}' modes=[full]

A plain run has one mode. Every point is Euler sampling with the same noise; a run of several blocks
has the same number of steps in each. Runs under one name are seeds, of which the table gives mean
and standard deviation. Wall time is the median over repetitions in which all points take turns.
"""

import json
import time
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from flowkit import grids
from flowkit.blockwise import loss_by_time
from flowkit.data import SplitData
from flowkit.metrics import Features, PixelSVC, frechet_distance, to_uint8, versions
from flowkit.modules import FlowModule, load_run
from flowkit.modules.runs import read_config
from flowkit.nn.blockwise import Blockwise
from flowkit.nn.drift import Drift, feature_drift
from flowkit.nn.flops import network_flops, part_flops, predicted_gain
from flowkit.recipes.sample import choose_labels, describe, draw, start, test_data, weights
from flowkit.sampling import ODESampler, seeded_noise

Row = dict[str, Any]


class Point(NamedTuple):
    """A way to sample a run."""

    run: Path
    module: FlowModule
    mode: str
    sampler: ODESampler
    guidance: float | None
    tolerance: float | None = None  # of the predicted drift of features
    drift: Drift | None = None

    def ready(self) -> FlowModule:
        """The module, set to this way of sampling."""
        flow = self.module.velocity
        if isinstance(flow, Blockwise):
            flow.feature_mode, flow.reach = self.mode, {}
            if self.drift is not None and self.tolerance is not None:
                flow.refresh_beyond(self.drift.rates(), self.tolerance)
        return self.module


def pareto(cfg: DictConfig) -> list[Row]:
    """Measure as configured; writes ``pareto.md``, ``pareto.json``, ``pareto.png`` and drifts.

    Returns:
        One row per run, mode and number of steps.
    """
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    groups = {name: folders(chosen) for name, chosen in cfg.runs.items()}
    first = read_config(next(iter(groups.values()))[0])
    measure = Measure(cfg, first)
    rows, timed = [], []
    for name, runs in groups.items():
        for run in runs:
            module = load_run(run).to(cfg.device)
            held_out = measure.held_out_loss(module)
            for point in points(cfg, run, module):
                samples, cost = sample(cfg, point, measure.labels)
                row = {"name": name, "run": str(run), "mode": point.mode}
                row |= {"refresh": point.tolerance, "held_out_loss": held_out, **cost}
                rows.append({**row, **measure(samples)})
                timed.append(point)
                print("  ".join(f"{key} {_short(rows[-1][key])}" for key in SHOWN), flush=True)
    for row, seconds in zip(rows, wall_times(cfg, timed, measure.labels), strict=True):
        row["seconds"] = seconds
    gains = measured_gains(rows)
    record = {"rows": rows, "gains": gains, "features": measure.name, "versions": versions()}
    (out / "pareto.json").write_text(json.dumps(record, indent=2) + "\n")
    write_table(rows, gains, out / "pareto.md")
    _plot(rows, out / "pareto.png")
    print(f"\n{(out / 'pareto.md').read_text()}\npicture   {out / 'pareto.png'}")
    return rows


def folders(chosen: str | Sequence[str]) -> list[Path]:
    """Run folders, one or several, with ``*`` for any name.

    Raises:
        FileNotFoundError: If there are none.
    """
    patterns = [chosen] if isinstance(chosen, str) else list(chosen)
    found = [Path(file) for pattern in patterns for file in sorted(glob(pattern))]
    if not found:
        raise FileNotFoundError(f"runs must name run folders, got {chosen}; there are none")
    return found


SHOWN = ("name", "mode", "refresh", "nfe", "gflops", "frechet_distance", "class_agreement")


class Measure:
    """Fréchet distance to the test split, and whether samples are recognised as their class."""

    def __init__(self, cfg: DictConfig, trained: dict[str, Any]):
        self.data: SplitData = test_data(trained)
        self.cfg, test = cfg, self.data.test[:]
        self.features: Features = instantiate(cfg.metric)(self.data)
        self.name = {"name": self.features.name, "hash": self.features.hash}
        self.reference = self._embed(test["x1"])
        self.labels = choose_labels(None, cfg.num_samples, self.data.num_classes)
        self.judge = None
        if self.labels is not None:
            train = self.data.train[:10_000]
            self.judge = PixelSVC(train["x1"], train["cond"])

    def _embed(self, images: Tensor) -> Tensor:
        return self.features(to_uint8(images).float() / 127.5 - 1)

    def __call__(self, samples: Tensor) -> dict[str, float | None]:
        agreement = None
        if self.judge is not None and self.labels is not None:
            agreement = (self.judge.predict(samples) == self.labels).float().mean().item()
        distance = frechet_distance(self._embed(samples), self.reference)
        return {"frechet_distance": distance, "class_agreement": agreement}

    @torch.no_grad()
    def held_out_loss(self, module: FlowModule) -> float:
        """Flow-matching loss of the test split, over 20 intervals of time with the same noise."""
        batch = self.data.test[: self.cfg.num_samples]
        batch = {k: v.to(self.cfg.device) for k, v in batch.items() if k in ("x1", "cond")}
        generator = torch.Generator(self.cfg.device).manual_seed(self.cfg.seed)
        batch = module.encode(batch, generator)
        _, loss = loss_by_time(module.velocity, batch, path=module.path, generator=generator)
        return loss.mean().item()


def points(cfg: DictConfig, run: Path, module: FlowModule) -> Iterator[Point]:
    """Ways to sample a run; with a feature residual its drift is measured, and written, first."""
    flow, guidance = module.velocity, read_config(run).get("guidance")
    guidance = guidance if cfg.guidance is None else cfg.guidance
    if not isinstance(flow, Blockwise):
        for nfe in cfg.nfe:
            yield Point(run, module, "full", ODESampler(nfe), guidance)
        return
    known = {"full": True, "cached": flow.trunk, "fra": flow.feature_residual}
    modes = [mode for mode in cfg.modes if known[mode] is not None]
    drift = None if modes == ["full"] else measure_drift(cfg, run, module)
    for nfe in cfg.nfe:
        if nfe % flow.num_segments:
            continue
        sampler = ODESampler(grids.blockwise(flow.edges, nfe // flow.num_segments))
        for mode in modes:
            yield Point(run, module, mode, sampler, guidance)
            if mode != "full" and nfe > flow.num_segments:
                for tolerance in cfg.tolerances:
                    yield Point(run, module, mode, sampler, guidance, tolerance, drift)


def measure_drift(cfg: DictConfig, run: Path, module: FlowModule) -> Drift:
    """Drift of reused features over 8 steps a segment, printed and kept beside the table.

    Along paths without guidance: with it features may drift faster.
    """
    x0 = seeded_noise(module.sample_shape, range(cfg.seed, cfg.seed + 128), cfg.device)
    cond = choose_labels(None, 128, read_config(run)["num_classes"])
    cond = None if cond is None else cond.to(cfg.device)
    flow = module.velocity
    drift = feature_drift(flow, x0, grids.blockwise(flow.edges, 8), cond)
    file = Path(cfg.out) / f"drift-{run.name}.txt"
    file.write_text(drift.table() + "\n")
    print(f"drift     {file}\n{drift.table()}")
    return drift


def sample(cfg: DictConfig, point: Point, labels: Tensor | None) -> tuple[Tensor, Row]:
    """Draw samples, and count what that took per sample."""
    module = point.ready()
    x0, source = start(module, cfg, cfg.num_samples)
    samples, cost = draw(module, x0, labels, point.sampler, point.guidance)
    flow = module.velocity
    if not isinstance(flow, Blockwise):
        one = network_flops(flow, x0[0], labels)
        scale = cost["network_rows_per_sample"] / 1e9
        cost["gflops"], cost["gflops_without_attention"] = one.total * scale, one.linear * scale
    elif point.mode == "fra":
        steps = round(cost["nfe"]) // flow.num_segments
        parts = part_flops(flow, x0[0], labels)
        cost |= {"steps_per_segment": steps, "predicted_gain": predicted_gain(parts, steps)}
    del cost["seconds"]  # timed apart
    sampling = {**describe(point.sampler, point.guidance), **source}
    return samples, {**cost, "weights": weights(module), "sampling": sampling}


def wall_times(cfg: DictConfig, timed: list[Point], labels: Tensor | None) -> list[float]:
    """Median seconds of one batch of each point, in rounds of all."""
    spent: list[list[float]] = [[] for _ in timed]
    size = min(cfg.batch_size, cfg.num_samples)
    cond = None if labels is None else labels[:size]
    bar = tqdm(total=cfg.repetitions * len(timed), desc="timing", leave=False, disable=None)
    for _ in range(cfg.repetitions):
        for point, seconds in zip(timed, spent, strict=True):
            module = point.ready()
            x0 = seeded_noise(module.sample_shape, range(size))
            began = time.perf_counter()
            module.solve(x0, point.sampler, cond, point.guidance).x.cpu()
            seconds.append(time.perf_counter() - began)
            bar.update()
    return [median(seconds) / size for seconds in spent]


def measured_gains(rows: list[Row]) -> list[Row]:
    """How much less FRA takes than full features: predicted, and measured by FLOPs and by time."""
    full, gains = {(r["run"], r["nfe"]): r for r in rows if r["mode"] == "full"}, []
    for row in rows:
        other = full.get((row["run"], row["nfe"]))
        if row["mode"] != "fra" or row["refresh"] is not None or other is None:
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


# --- tables and picture ------------------------------------------------------------------------


def grouped(rows: list[Row]) -> dict[tuple, list[Row]]:
    """Rows that differ in their seeds alone."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (row["name"], row["mode"], row["refresh"], row["nfe"])
        groups.setdefault(key, []).append(row)
    return groups


def write_table(rows: list[Row], gains: list[Row], file: Path) -> None:
    """Write means and deviations over seeds, and the gains."""
    columns = ("held_out_loss", "gflops", "seconds", "frechet_distance", "class_agreement")
    header = ["name", "features", "NFE", "seeds", *(c.replace("_", " ") for c in columns)]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for (name, mode, refresh, nfe), group in grouped(rows).items():
        label = mode if refresh is None else f"{mode}, refreshed at {refresh}"
        cells = [_mean([row[c] for row in group]) for c in columns]
        lines.append([name, label, f"{nfe:g}", str(len(group)), *cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if gains:
        text += "\nFRA against full features, times less:\n\n"
        text += "| run | steps a segment | predicted FLOPs | counted FLOPs | wall time |\n"
        text += "| --- | ---: | ---: | ---: | ---: |\n"
        for g in gains:
            numbers = " | ".join(f"{g[key]:.2f}" for key in ("predicted", "flops", "time"))
            text += f"| {g['run']} | {g['steps_per_segment']} | {numbers} |\n"
    file.write_text(text)


def _mean(values: list[float | None]) -> str:
    if any(value is None for value in values):
        return ""
    mean = _short(fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {_short(stdev(values))}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plot(rows: list[Row], file: Path) -> None:
    """Fréchet distance and class agreement over FLOPs and over time, a line for a run and mode."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    lines: dict[tuple, list[list[float]]] = {}
    qualities = [q for q in ("frechet_distance", "class_agreement") if rows[0][q] is not None]
    for (name, mode, refresh, _), group in grouped(rows).items():
        means = [fmean(row[c] for row in group) for c in ("gflops", "seconds", *qualities)]
        lines.setdefault((name, mode, refresh), []).append(means)
    figure = Figure(figsize=(10, 0.5 + 3.5 * len(qualities)), layout="constrained")
    panels = figure.subplots(len(qualities), 2, sharex="col", sharey="row", squeeze=False)
    for k, ((name, mode, refresh), line) in enumerate(lines.items()):
        label = f"{name}, {mode}" + ("" if refresh is None else f", refreshed at {refresh}")
        gflops, seconds, *values = zip(*sorted(line), strict=True)
        style = {"label": label, "color": f"C{k}", "ls": "-" if refresh is None else ":"}
        for row, value in zip(panels, values, strict=True):
            row[0].plot(gflops, value, marker="o", ms=4, **style)
            row[1].plot([1e3 * s for s in seconds], value, marker="o", ms=4, **style)
    for row, quality in zip(panels, qualities, strict=True):
        row[0].set_ylabel(quality.replace("_", " ").replace("frechet", "Fréchet"))
        for axes in row:
            axes.grid(alpha=0.3)
            axes.set_xscale("log")
    panels[0][0].set_yscale("log")
    panels[0][0].yaxis.set_major_locator(MaxNLocator(6))
    for axes in panels[-1]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (panels[0][0].yaxis, *(axes.xaxis for axes in panels[-1])):
        axis.set_major_formatter("{x:g}")  # a few plain numbers
        axis.set_minor_formatter("")
    panels[-1][0].set_xlabel("GFLOPs a sample")
    panels[-1][1].set_xlabel("ms of wall time a sample")
    panels[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


@hydra.main(version_base="1.3", config_path="../conf", config_name="pareto")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit pareto``."""
    pareto(cfg)


if __name__ == "__main__":
    main()
