"""Measure a run against held-out data; the record says how every number was obtained.

flowkit evaluate run=runs/quickstart
flowkit evaluate run=runs/quickstart sampler=euler sampler.grid=8 guidance=1.5
flowkit evaluate run=runs/mine metric=inception metric.weights=weights-inception.pth
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit.data import SplitData
from flowkit.metrics import (
    ConvClassifier,
    Features,
    Pixels,
    PixelSVC,
    image_metrics,
    inception,
    point_metrics,
    tensor_hash,
    train_classifier,
    versions,
)
from flowkit.metrics.pictures import save_picture
from flowkit.modules import FlowModule, load_run
from flowkit.modules.runs import CHECKPOINT, CONFIG, read_checkpoint
from flowkit.recipes.sample import choose_labels, describe, draw, noise_batches
from flowkit.sampling import ADAPTIVE


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate as configured; writes ``metrics.json`` and ``samples.png``."""
    run = Path(cfg.run)
    out = Path(cfg.out) if cfg.out else run
    module = load_run(run).to(cfg.device)
    trained = OmegaConf.load(run / CONFIG)
    data: SplitData = instantiate(trained.data)
    data.prepare_data()
    data.setup("test")
    sampler = instantiate(cfg.sampler)
    guidance = trained.guidance if cfg.guidance is None else cfg.guidance
    measure = _measure_images if len(data.shape) == 3 else _measure_points
    metrics, samples, cost = measure(cfg, module, data, sampler, guidance)
    record = {
        "metrics": metrics,
        "weights": weights(run),
        "sampling": {
            **describe(sampler, guidance),
            **cost,
            "num_samples": len(samples),
            "seeds": [cfg.seed, cfg.seed + len(samples)],
            "world_size": 1,
        },
        "data": {"name": type(data).__name__, "test": data.fingerprint("test")},
        "versions": versions(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    columns = min(data.num_classes or 10, 10)
    picture = save_picture(samples[: 10 * columns], out / "samples.png", columns)
    _report(metrics)
    print(f"picture   {picture}\nnumbers   {out / 'metrics.json'}")
    return record


def _measure_images(
    cfg: DictConfig, module: FlowModule, data: SplitData, sampler: Any, guidance: float | None
) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
    features: Features = instantiate(cfg.metric)(data)
    labels = choose_labels(None, cfg.num_samples, data.num_classes)
    seeds = range(cfg.seed, cfg.seed + cfg.num_samples)
    noise = noise_batches(_shape(module), seeds, cfg.batch_size)
    samples, cost = draw(module, noise, labels, sampler, guidance)
    test = data.test[:]
    # As many training images as are generated, for the floor; up to 10 000 for the judge.
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(cfg.seed))
    train = data.train[order[: max(cfg.num_samples, 10_000)]]
    judge = None
    if data.num_classes is not None:
        judge = PixelSVC(train["x1"], train["cond"])
    metrics = image_metrics(
        train["x1"],
        test["x1"],
        samples,
        features,
        labels=labels,
        test_labels=test.get("cond"),
        judge=judge,
        generator=torch.Generator().manual_seed(cfg.seed),
    )
    return metrics, samples, cost


def _measure_points(
    cfg: DictConfig, module: FlowModule, data: SplitData, sampler: Any, guidance: float | None
) -> tuple[dict[str, Any], Tensor, dict[str, Any]]:
    test = data.test[: cfg.num_samples]
    count = len(test["x1"])
    x0 = test.get("x0")
    if x0 is None:
        seeds = range(cfg.seed, cfg.seed + count)
        x0 = torch.cat(list(noise_batches(_shape(module), seeds, cfg.batch_size)))
    if sampler.method in ADAPTIVE and len(sampler.times) < 101:
        # The path's energy is a sum over the grid, which these solvers need not follow.
        sampler = replace(sampler, grid=100)
    solution = module.solve(x0, sampler, test.get("cond"), guidance, return_path=True)
    path = solution.path if solution.path is None else solution.path.cpu()
    metrics = point_metrics(test["x1"], solution.x.cpu(), path, sampler.times)
    cost = {"nfe": solution.nfe, "network_rows_per_sample": solution.rows / count}
    return metrics, solution.x.cpu(), cost


def _shape(module: FlowModule) -> tuple[int, ...]:
    if module.sample_shape is None:
        raise RuntimeError("run must have trained at least one step, got no sample shape")
    return module.sample_shape


def weights(run: Path) -> dict[str, Any]:
    """Return which weights a run's last checkpoint holds."""
    state = read_checkpoint(run / CHECKPOINT)
    return {
        "kind": "averaged" if "current_model_state" in state else "raw",
        "step": state["global_step"],
        "hash": tensor_hash(state["state_dict"]),
    }


def _report(metrics: dict[str, Any]) -> None:
    rows: dict[str, str] = {}
    if "frechet_distance" in metrics:
        space = metrics["features"]["name"]
        rows[f"Fréchet distance ({space})"] = f"{metrics['frechet_distance']:.3f}"
        rows["  floor: training images"] = f"{metrics['floor']['frechet_distance']:.3f}"
        for name in ("precision", "recall", "density", "coverage"):
            rows[name] = f"{metrics[name]:.3f}  (floor {metrics['floor'][name]:.3f})"
    else:
        rows["W2"] = f"{metrics['w2']:.4f}"
        rows["W2²"] = f"{metrics['w2_squared']:.4f}"
        rows["path energy"] = f"{metrics['path_energy']:.4f}"
        rows["normalised path energy"] = f"{metrics['normalized_path_energy']:.4f}"
    if "class_agreement" in metrics:
        low, high = metrics["class_agreement_interval"]
        rows["recognised as their class"] = (
            f"{metrics['class_agreement']:.3f}  [{low:.3f}, {high:.3f}]  "
            f"(real test images {metrics['judge']['test_accuracy']:.3f})"
        )
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


# --- feature networks by name, for conf/metric -------------------------------------------------


def classifier_features(data: SplitData, seed: int) -> ConvClassifier:
    """Return a classifier of the data's own classes, trained once and kept in the user's cache."""
    if data.num_classes is None:
        raise ValueError("metric must be pixels or inception for data without labels")
    train = data.train
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flowkit"
    file = cache / f"classifier-{data.fingerprint('train')[:16]}-{seed}.safetensors"
    if file.is_file():
        return ConvClassifier.load(file)
    print(f"training a classifier on {len(train):,} images for its features")
    batch = train[:]
    epochs = min(20, max(3, 30_000 // len(train)))
    name = f"conv-classifier-{type(data).__name__.lower()}"
    net = train_classifier(
        batch["x1"], batch["cond"], data.num_classes, seed=seed, epochs=epochs, name=name
    )
    cache.mkdir(parents=True, exist_ok=True)
    net.save(file)
    return net


def pixel_features(data: SplitData) -> Pixels:
    """Return flattened pixels as features."""
    return Pixels()


def inception_features(data: SplitData, weights: str) -> Features:
    """Return the Inception features that FID is defined with."""
    return inception(weights)


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit evaluate``."""
    evaluate(cfg)


if __name__ == "__main__":
    main()
