"""Evaluate a run or anybody's samples, and record the settings of the measurement.

flowkit evaluate run=runs/quickstart
flowkit evaluate run=runs/quickstart sampler=euler sampler.grid=8 guidance=1.5
flowkit evaluate run=runs/mine metric=inception metric.weights=weights-inception.pth
flowkit evaluate run=runs/mine num_samples=50000 device=cuda devices=8

flowkit evaluate samples=images reference=runs/mine             a folder, and the data of a run
flowkit evaluate samples=samples.npz reference=fashion_mnist    data by their name
flowkit evaluate samples=runs/mine reference=statistics.npz     what flowkit sample drew

Samples and reference are each a folder of images, an .npz file of ADM, a .tar file, what flowkit
sample wrote, a run, or data by their name. A reference may also be an .npz file of statistics.

Several processes share the images. The same command continues a stopped call.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.data.pixels import as_seen
from flowkit.hub import results_of
from flowkit.metrics import (
    Features,
    Pixels,
    StoredFeatures,
    image_metrics,
    outputs_of,
    point_metrics,
)
from flowkit.metrics.comparison import FEW
from flowkit.metrics.pictures import as_saved, save_picture
from flowkit.modules.flow import labels_of
from flowkit.places import check_writable
from flowkit.provenance import cache_folder
from flowkit.rules import CONF
from flowkit.runs import Run
from flowkit.runs.drawing import block_cost, draw_parts, like_test, say_plan, start
from flowkit.runs.features import judge_of
from flowkit.runs.given import Measured, of_samples, picture_rows
from flowkit.runs.judging import digests, hash_of_set, set_record, shares_of, through
from flowkit.runs.known_data import place_of
from flowkit.runs.parts import Columns, Parts, hash_of
from flowkit.runs.processes import launch
from flowkit.runs.records import recording
from flowkit.runs.starts import given_source
from flowkit.sampling import ADAPTIVE, Sampler, SDESampler
from flowkit.types import Batch

OF_RUNS = {"weights": "averaged", "guidance": None, "feature_mode": None, "tolerance": None}
OF_RUNS |= {"seeding": 2}  # options that only a run has, and their defaults
OF_SAMPLES = {"reference": None, "split": "test", "class_folders": False, "resize": None}
OF_SAMPLES |= {"filter": "lanczos", "antialias": True}

SHOWN = {"KID": "kernel_distance", "kernel distance": "kernel_distance"}  # FID's network has KID
SHOWN |= {"CMMD": "cmmd", "CMMD without bias": "cmmd_unbiased"}
SHOWN |= {name: name for name in ("precision", "recall", "density", "coverage")}


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate as configured; write ``metrics.json`` and ``samples.png``.

    Returns:
        The record; it is empty on all processes but the first.
    """
    check_options(cfg)
    out = Path(cfg.out or (results_of(cfg.run) if cfg.run else "runs/evaluate"))
    fabric = launch(cfg)
    check_writable(out, "out")
    found = of_samples(cfg, fabric, out) if cfg.run is None else _of_run(cfg, fabric)
    if found is None or not fabric.is_global_zero:
        return {}
    record = {"metrics": found.metrics, **found.record}
    files = [out / "metrics.json", out / "samples.png"]
    with recording(record, files):
        options = {"beside": found.beside, "captions": found.captions}
        save_picture(found.shown, files[1], found.columns, **options)
    if found.parts is not None:
        found.parts.remove()
    _report(found.metrics, None if cfg.samples is None else found.record["reference"])
    print(f"picture   {files[1]}\nnumbers   {files[0]}")
    return record


def check_options(cfg: DictConfig) -> None:
    """Require either a run or samples, and no option that would have no effect.

    Raises:
        ValueError: If both or neither are given, or an option is not of that kind.
    """
    if (cfg.run is None) == (cfg.samples is None):
        got = "neither" if cfg.run is None else "both"
        raise ValueError(
            "one of run and samples must be given, as run=<run folder> or samples=<images>, got "
            f"{got}"
        )
    given, kind = (OF_SAMPLES, "run") if cfg.samples is None else (OF_RUNS, "samples")
    for name, default in given.items():
        if cfg[name] != default:
            value = _as_given(name, cfg[name])
            raise ValueError(f"{name} must be absent with {kind}=, where it is unused, got {value}")
    if cfg.samples is not None:
        auto = OmegaConf.load(CONF / "sampler" / "auto.yaml")
        if own := [
            f"{key}={value}" for key, value in cfg.sampler.items() if value != auto.get(key)
        ]:
            raise ValueError(
                f"sampler must be absent with samples=, where it is unused, got {', '.join(own)}"
            )


def _as_given(name: str, value: Any) -> Any:
    """Return the value of an option as the command has it: data by the name of their choice."""
    if not OmegaConf.is_dict(value):
        return value
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return choices.get(f"data@{name}") or value.get("_target_", "data")


# --- a run ------------------------------------------------------------------------------------


def _of_run(cfg: DictConfig, fabric: Fabric) -> Measured | None:
    """Draw and measure samples of a run; None on all processes but the first."""
    if cfg.num_samples is None:
        cfg = OmegaConf.merge(cfg, {"num_samples": 1000})
    run = Run.load(cfg.run, cfg.weights, fabric.device, cfg.guidance, cfg.trust, **place_of(cfg))
    run.reuse_features(cfg.feature_mode, cfg.tolerance, cfg.seed, cfg.seeding)
    images = len(run.data.shape) == 3
    sampler = run.sampler(cfg.sampler, needs_path=not images)
    if not images:
        return _measure_points(cfg, run, sampler)
    return _measure_images(cfg, run, sampler, fabric)


def _measure_images(cfg: DictConfig, run: Run, sampler: Sampler, fabric: Fabric) -> Measured | None:
    """Draw and measure images; None on all processes but the first."""
    data = run.data
    with fabric.rank_zero_first():  # one process trains the classifier
        features: Features = instantiate(cfg.metric)(data)
    test = data.test[:]
    x0, cond, source, chosen = like_test(run, cfg)
    enough = {"num_samples": source["num_samples"]}
    enough |= {f"{name} images": len(data.split(name)) for name in ("train", "test")}
    for name, number in enough.items():
        check_at_least(number, 4, name)  # of the metrics, before the work

    def finish(samples: Tensor) -> Columns:
        images = as_seen(samples, cfg.quantization, cfg.jpeg)
        return {"images": images, **outputs_of(features, as_saved(images))}

    used = {"weights": run.weights, **run.describe(sampler), **source}
    used |= {"mode": [cfg.feature_mode, cfg.tolerance], "features": features.hash}
    used |= {"cond": hash_of(cond), "seen": [cfg.quantization, cfg.jpeg]}
    used["test"] = data.fingerprint("test")  # given source samples come from this split
    parts = Parts(Path(cfg.out or run.results), used, fabric)
    say_plan(run, sampler, source["num_samples"])
    drawn, cost = draw_parts(run, x0, cond, sampler, finish, parts)
    if not fabric.is_global_zero:
        return None
    samples = drawn.pop("images")
    labels = labels_of(Batch(x1=samples, cond=cond), data.num_classes)
    # The floor takes as many training images as generated images; the judge takes up to 10 000.
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(cfg.seed))
    train = data.train[order[: max(source["num_samples"], 10_000)]]
    seen = labels_of(train, data.num_classes)
    metrics = image_metrics(
        train["x1"],
        test["x1"],
        samples,
        features if isinstance(features, Pixels) else StoredFeatures(features, cache_folder()),
        labels=labels,
        test_labels=labels_of(test, data.num_classes),
        judge=None if labels is None else judge_of(train["x1"], seen),
        generator=torch.Generator().manual_seed(cfg.seed),
        generated_features=drawn,
        extrapolate=cfg.extrapolate,
    )
    sampling = {**run.describe(sampler), **cost, **source}
    sampling["conditions"] = None if cond is None else chosen
    stored = {"kind": "run", "file_format": None, "quantization": cfg.quantization}
    sets = {
        "samples": _set_record(str(run.place), stored, samples, labels) | through(cfg.jpeg),
        "reference": _set_record(
            f"{type(data).__name__}, test split",
            {"kind": "data", "file_format": None, "quantization": None},
            as_seen(test["x1"]),
            labels_of(test, data.num_classes),
        ),
    }
    record = {**sets, **run.record(sampling, metrics=metrics)}
    if labels is None:
        return Measured(metrics, record, as_saved(samples[:100]), parts=parts)
    shown, columns = picture_rows(labels)
    names = run.names_of(labels[shown], len(shown))
    picture = (as_saved(samples[shown]), columns)
    return Measured(metrics, record, *picture, parts=parts, captions=names)


def _set_record(
    name: str, stored: dict[str, Any], pixels: Tensor, labels: Tensor | None
) -> dict[str, Any]:
    """Return the record of a set of images in memory."""
    digest, shares = hash_of_set(digests(pixels)), shares_of(labels)
    return set_record(name, stored, pixels.shape[1:], len(pixels), digest, shares)


def _measure_points(cfg: DictConfig, run: Run, sampler: Sampler) -> Measured:
    """Draw and measure points; one process does all work."""
    test = run.data.test[: cfg.num_samples]
    size = len(test["x1"])
    x0, source = start(run, cfg, size, given_source(test, run.data))
    stochastic = isinstance(sampler, SDESampler)  # then the path has no energy
    steps = len(sampler.times) - 1
    if not stochastic and sampler.method in ADAPTIVE and steps < 100:
        # The path energy is a sum over the grid, so it needs a fine grid. Adaptive solvers choose
        # their own steps.
        if steps > 1:
            raise ValueError(
                f"sampler.grid must be 1, or have 100 steps at least for the path energy by "
                f"{sampler.method}, got {steps} steps"
            )
        sampler = replace(sampler, grid=100)
    cond = test.get("cond")
    solution = run.module.solve(
        torch.cat(list(x0)), sampler, cond, run.guidance, return_path=not stochastic
    )
    path = solution.path if solution.path is None else solution.path.cpu()
    train = run.data.train[:size]["x1"]  # for the floor
    metrics = point_metrics(test["x1"], solution.x.cpu(), path, sampler.times, train=train)
    sampling = {
        **run.describe(sampler),
        "nfe": solution.nfe,
        "network_rows_per_sample": solution.rows / size,
        **block_cost(run.module, x0[0], cond, size),
        **source,
        "batch_size": size,  # all paths are measured together
        "world_size": 1,
        "conditions": None if cond is None else "of the test split",
    }
    record = run.record(sampling, metrics=metrics)
    return Measured(metrics, record, solution.x.cpu(), beside=test["x1"])


def _report(metrics: dict[str, Any], reference: dict[str, Any] | None) -> None:
    """Print the metrics and their intervals.

    Args:
        metrics: The metrics.
        reference: Record of the reference of given samples: each value then has the numbers of its
            images beside it. None for a run.
    """
    rows = _image_rows(metrics) if "frechet_distance" in metrics else _point_rows(metrics)
    if reference is not None:
        rows = {name: row + _counts(metrics, name, reference) for name, row in rows.items()}
    if "class_agreement" in metrics:
        real = metrics["judge"].get("test_accuracy")  # None if the reference has no classes
        rows["recognized as their class"] = _with_interval(metrics, "class_agreement") + (
            "" if real is None else f"  (real images {real:.3f})"
        )
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    if metrics.get("unreliable"):
        made, real = metrics["num_samples"], metrics["reference"]["num_samples"]
        kinds = f"{made:,} samples" + ("" if real is None else f" and {real:,} reference images")
        print(f"unreliable: of {kinds}, below {FEW} of a kind or of the features")
    for warning in metrics.get("warnings", ()):
        print(f"warning: {warning}")
    reasons: dict[str, list[str]] = {}
    for name, reason in metrics.get("left_out", {}).items():
        reasons.setdefault(reason, []).append(name.replace("_", " "))
    for reason, names in reasons.items():
        print(f"left out: {', '.join(names)}: {reason}")


def _image_rows(metrics: dict[str, Any]) -> dict[str, str]:
    """Return the metrics of images as text, by their names."""
    floor, few = metrics.get("floor"), metrics["unreliable"]
    rows = {
        f"{metrics['distance_name']} ({metrics['features']['name']})": (
            f"{metrics['frechet_distance']:.3f}{_unreliable('frechet_distance', few)}"
        )
    }
    if floor is not None:
        name = f"  floor: {floor['num_samples']:,} training images"
        rows[name] = f"{floor['frechet_distance']:.3f}"
    if metrics["frechet_distance_unbiased"] is not None:
        rows["  without bias"] = _with_interval(metrics, "frechet_distance_unbiased")
    if "frechet_distance_infinity" in metrics:
        rows["  at infinitely many"] = _with_interval(metrics, "frechet_distance_infinity")
    if "spatial_frechet_distance" in metrics:
        rows["  of spatial features"] = f"{metrics['spatial_frechet_distance']:.3f}"
    if "inception_score" in metrics:
        score = f"{metrics['inception_score']:.3f} ± {metrics['inception_score_std']:.3f}"
        rows["Inception score"] = score + _unreliable("inception_score", few)
    other = "kernel distance" if metrics["distance_name"] == "FID" else "KID"
    for shown, name in SHOWN.items():
        if shown != other and metrics.get(name) is not None:
            real = "" if floor is None else f"  (floor {floor[name]:.3f})"
            rows[shown] = f"{_with_interval(metrics, name)}{real}{_unreliable(name, few)}"
    return rows


def _counts(metrics: dict[str, Any], shown: str, reference: dict[str, Any]) -> str:
    """Return the numbers of images of a value, by its name as it is shown."""
    made, real = metrics["num_samples"], metrics["num_reference"]
    if shown.startswith("  floor"):
        return ""  # it has them in its name
    if shown in SHOWN:  # they compare images, if statistics are there or not
        real = reference["num_samples"]
    if SHOWN.get(shown, "").startswith(("kernel", "cmmd")) and "paired" in metrics:
        made, real = (metrics["paired"][key] for key in ("samples", "reference"))
    if shown == "Inception score":
        return f"  ({made:,} samples)"
    return f"  ({made:,} samples, {'statistics' if real is None else f'{real:,} reference images'})"


def _unreliable(name: str, few: list[str]) -> str:
    """Return the mark of a value that depends too much on the number of images."""
    return "  unreliable" if name in few else ""


def _point_rows(metrics: dict[str, Any]) -> dict[str, str]:
    """Return the metrics of points as text, by their names."""
    names = {"W2": "w2", "W2²": "w2_squared", "energy distance": "energy_distance"}
    names |= {"C2ST": "c2st", "path energy": "path_energy"}
    names["normalized path energy"] = "normalized_path_energy"
    rows = {}
    for shown, name in names.items():
        if metrics.get(name) is not None:
            real = metrics["floor"].get(name)
            floor = "" if real is None else f"  (floor {real:.4f})"
            rows[shown] = _with_interval(metrics, name, 4) + floor
    return rows


def _with_interval(metrics: dict[str, Any], name: str, digits: int = 3) -> str:
    """Return a metric and its interval as text."""
    interval = metrics.get(f"{name}_interval")
    ends = "" if interval is None else "  [" + ", ".join(f"{x:.{digits}f}" for x in interval) + "]"
    return f"{metrics[name]:.{digits}f}{ends}"


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit evaluate``."""
    evaluate(cfg)


if __name__ == "__main__":
    main()
