"""Evaluate a run against held-out data, and record the settings of the measurement.

flowkit evaluate run=runs/quickstart
flowkit evaluate run=runs/quickstart sampler=euler sampler.grid=8 guidance=1.5
flowkit evaluate run=runs/mine metric=inception metric.weights=weights-inception.pth
flowkit evaluate run=runs/mine num_samples=50000 device=cuda devices=8

Several processes share the images. The same command continues a stopped call.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics import (
    Features,
    Pixels,
    StoredFeatures,
    image_metrics,
    point_metrics,
    to_uint8,
)
from flowkit.metrics.comparison import FEW
from flowkit.metrics.pictures import as_saved, save_picture
from flowkit.modules.flow import labels_of
from flowkit.provenance import cache_folder
from flowkit.runs import Run
from flowkit.runs.drawing import block_cost, draw_parts, like_test, start
from flowkit.runs.features import judge_of
from flowkit.runs.known_data import place_of
from flowkit.runs.parts import Columns, Parts, hash_of
from flowkit.runs.processes import launch
from flowkit.runs.records import recording
from flowkit.runs.starts import given_source
from flowkit.sampling import ADAPTIVE, Sampler, SDESampler
from flowkit.types import Batch


class Measured(NamedTuple):
    """Metrics, record of sampling, and samples for the picture with its number of columns.

    Real points are shown beside generated ones.
    """

    metrics: dict[str, Any]
    sampling: dict[str, Any]
    shown: Tensor
    columns: int = 10
    beside: Tensor | None = None


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate as configured; write ``metrics.json`` and ``samples.png``.

    Returns:
        The record; it is empty on all processes but the first.
    """
    fabric = launch(cfg)
    run = Run.load(cfg.run, cfg.weights, fabric.device, cfg.guidance, cfg.trust, **place_of(cfg))
    run.reuse_features(cfg.feature_mode, cfg.tolerance, cfg.seed, cfg.seeding)
    images, out = len(run.data.shape) == 3, Path(cfg.out or cfg.run)
    sampler = run.sampler(cfg.sampler, needs_path=not images)
    if images:
        found = _measure_images(cfg, run, sampler, fabric)
    else:
        found = _measure_points(cfg, run, sampler)
    if found is None or not fabric.is_global_zero:
        return {}
    record = run.record(found.sampling, metrics=found.metrics)
    files = [out / "metrics.json", out / "samples.png"]
    with recording(record, files):
        save_picture(found.shown, files[1], found.columns, beside=found.beside)
    _report(found.metrics)
    print(f"picture   {files[1]}\nnumbers   {files[0]}")
    return record


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
        images = to_uint8(samples)
        return {"images": images, "features": features(as_saved(images))}

    used = {"weights": run.weights, **run.describe(sampler), **source}
    used |= {"mode": [cfg.feature_mode, cfg.tolerance], "features": features.hash}
    used["cond"] = hash_of(cond)
    used["test"] = data.fingerprint("test")  # given source samples come from this split
    parts = Parts(Path(cfg.out or cfg.run), used, fabric)
    drawn, cost = draw_parts(run, x0, cond, sampler, finish, parts)
    if not fabric.is_global_zero:
        return None
    samples = drawn["images"]
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
        generated_features=drawn["features"],
    )
    parts.remove()
    sampling = {**run.describe(sampler), **cost, **source}
    sampling["conditions"] = None if cond is None else chosen
    if labels is None:
        return Measured(metrics, sampling, as_saved(samples[:100]))
    shown, columns = picture_rows(labels)
    return Measured(metrics, sampling, as_saved(samples[shown]), columns)


def picture_rows(labels: Tensor) -> tuple[Tensor, int]:
    """Return rows for a picture with a column per class, up to ten, and the number of columns."""
    classes, counts = labels.unique(return_counts=True)
    height = min(10, int(counts[:10].min()))
    columns = [(labels == label).nonzero()[:height, 0] for label in classes[:10]]
    return torch.stack(columns, 1).flatten(), len(columns)


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
    return Measured(metrics, sampling, solution.x.cpu(), beside=test["x1"])


def _report(metrics: dict[str, Any]) -> None:
    """Print the metrics and their intervals."""
    rows: dict[str, str] = {}
    if "frechet_distance" in metrics:
        floor, space = metrics["floor"], metrics["features"]["name"]
        few = "  unreliable" if metrics["unreliable"] else ""
        rows[f"Fréchet distance ({space})"] = f"{metrics['frechet_distance']:.3f}{few}"
        rows[f"  floor: {floor['num_samples']:,} training images"] = (
            f"{floor['frechet_distance']:.3f}"
        )
        if metrics["frechet_distance_unbiased"] is not None:
            rows["  without bias"] = _with_interval(metrics, "frechet_distance_unbiased")
        for name in ("precision", "recall", "density", "coverage"):
            rows[name] = f"{_with_interval(metrics, name)}  (floor {floor[name]:.3f}){few}"
    else:
        names = {"W2": "w2", "W2²": "w2_squared", "energy distance": "energy_distance"}
        names |= {"C2ST": "c2st", "path energy": "path_energy"}
        names["normalized path energy"] = "normalized_path_energy"
        for shown, name in names.items():
            if metrics.get(name) is not None:
                real = metrics["floor"].get(name)
                floor = "" if real is None else f"  (floor {real:.4f})"
                rows[shown] = _with_interval(metrics, name, 4) + floor
    if "class_agreement" in metrics:
        rows["recognized as their class"] = (
            f"{_with_interval(metrics, 'class_agreement')}  "
            f"(real test images {metrics['judge']['test_accuracy']:.3f})"
        )
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    if metrics.get("unreliable"):
        made, real = metrics["num_samples"], metrics["reference"]["num_samples"]
        print(f"unreliable: of {made:,} samples and {real:,} test images, below {FEW} of a kind")


def _with_interval(metrics: dict[str, Any], name: str, digits: int = 3) -> str:
    """Return a metric and its interval as text."""
    interval = metrics[f"{name}_interval"]
    ends = "" if interval is None else "  [" + ", ".join(f"{x:.{digits}f}" for x in interval) + "]"
    return f"{metrics[name]:.{digits}f}{ends}"


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit evaluate``."""
    evaluate(cfg)


if __name__ == "__main__":
    main()
