"""Predict classes or masks of images (symmetrical runs), and measure the predictions.

flowkit predict run=runs/symmetrical_digits
flowkit predict run=runs/symmetrical_digits sampler.grid=25 draws=8
flowkit predict run=runs/mine data=folder data.root=photos data.image_size=28 data.channels=1

The recipe labels the whole split from fixed seeds, so that the same command gives the same numbers.
If the data have labels or masks of their own, the predictions are measured against them.
"""

import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from flowkit.checks import check_at_least
from flowkit.data import SplitData
from flowkit.metrics.labels import classification_metrics, segmentation_metrics
from flowkit.metrics.pictures import colored, save_figure, save_picture
from flowkit.modules import SymmetricalFlowMatching
from flowkit.places import check_writable
from flowkit.provenance import write_atomically
from flowkit.runs import Run
from flowkit.runs.drawing import symmetrical
from flowkit.runs.known_data import place_of
from flowkit.runs.records import recording
from flowkit.runs.splits import prepared
from flowkit.sampling import ODESampler, sample_seeds


def predict(cfg: DictConfig) -> dict[str, Any]:
    """Predict as configured; write ``predicted.pt``, ``predicted.json`` and a picture.

    The picture shows masks. For classes it shows the reliability of the probabilities and the
    accuracy of the most confident images, if the data have labels of their own.

    ``predicted.pt`` holds ``labels (N,)``, ``uncertainty (N,)`` and ``probabilities (N, K)`` of
    classes, or ``labels (N, H, W)`` and ``confidence (N, H, W)`` of masks.
    """
    check_at_least(cfg.batch_size, 1, "batch_size")
    run = Run.load(cfg.run, cfg.weights, cfg.device, 1, cfg.trust, **place_of(cfg))
    out = Path(cfg.out) if cfg.out else run.results / "predicted"
    check_writable(out, "out")
    module, sampler = symmetrical(run), run.ode_sampler(cfg.sampler)
    data = _data(cfg, run)
    found, cost = label(module, data.split(cfg.split), sampler, cfg)
    metrics = _measure(module, found, _comparable(found.pop("truth", None), data, run))
    seeds = sample_seeds(cfg.seed, 0, len(found["labels"]), cfg.seeding)
    sampling = {
        **run.describe(sampler),
        "guidance": None,  # guidance acts on images, not on labels
        **cost,
        "times": module.times,
        "draws": cfg.draws,
        "seeds": [seeds.start, seeds.stop],
        "seeding": cfg.seeding,
    }
    fingerprint = data.fingerprint(cfg.split)
    read = {"name": type(data).__name__, "split": cfg.split, "fingerprint": fingerprint}
    record = run.record(sampling, metrics=metrics, data=read)
    files = [out / "predicted.json", out / "predicted.pt", out / "predicted.png"]
    if cfg.probabilities is False:
        found.pop("probabilities", None)
    with recording(record, files):
        write_atomically(files[1], lambda file: torch.save(found, file))
        if found["labels"].ndim == 3:
            _show(data, cfg.split, found["labels"], module.codec.num_classes, files[2])
        elif "selective" in metrics:
            _plot(metrics, files[2])
    print(f"{'images':<24}  {len(found['labels'])}")
    numbers = {**metrics.get("selective", {}), **metrics}
    for name, value in numbers.items():
        if isinstance(value, float):
            interval = numbers.get(f"{name}_interval")
            ends = "  [{:.4f}, {:.4f}]".format(*interval) if interval else ""
            print(f"{name.replace('_', ' '):<24}  {value:.4f}{ends}")
    if files[2].is_file():
        print(f"picture   {files[2]}")
    print(f"labels    {files[1]}\nnumbers   {files[0]}")
    return record


def _data(cfg: DictConfig, run: Run) -> SplitData:
    """Return the data to label: those of the configuration, or those of the run."""
    if "_target_" not in cfg.data:
        return run.data
    node = {name: value for name, value in cfg.data.items() if (name, value) != ("root", None)}
    return prepared(instantiate(node), "test")


def label(
    module: SymmetricalFlowMatching, split: Any, sampler: ODESampler, cfg: DictConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Label a whole split in batches.

    Returns:
        The predictions and their cost. If the data have labels, the predictions contain them as
        ``truth``. The cost is evaluations and network rows per image, and seconds in total.
    """
    of_pixels = len(module.label_shape or ()) > 1
    keep = cfg.probabilities or not of_pixels  # class probabilities are needed for the metrics
    parts: dict[str, list[Tensor]] = {}
    began = time.perf_counter()
    for first in tqdm(range(0, len(split), cfg.batch_size), "labels", leave=False, disable=None):
        batch = split[first : first + cfg.batch_size]
        images, truth = batch["x1"], batch.get("cond")
        seeds = sample_seeds(cfg.seed, first, len(images), cfg.seeding)
        p = module.posterior(images, sampler, cfg.draws, seeds).cpu()
        confidence, labels = p.max(1)
        some = {"confidence": confidence} if of_pixels else {"uncertainty": 1 - confidence}
        some |= {"labels": labels} | ({"probabilities": p} if keep else {})
        if isinstance(truth, Tensor) and truth.shape == labels.shape:
            some["truth"] = truth
        for name, value in some.items():
            parts.setdefault(name, []).append(value)
    seconds = time.perf_counter() - began
    found = {name: torch.cat(values) for name, values in parts.items()}
    probe = module.solve_labels(images[:1], torch.zeros(1, *(module.label_shape or ())), sampler)
    cost = {
        "nfe": probe.nfe * cfg.draws,
        "network_rows_per_image": probe.rows * cfg.draws,
        "seconds": round(seconds, 3),
    }
    return found, cost


def _comparable(truth: Tensor | None, data: SplitData, run: Run) -> Tensor | None:
    """Return the labels of the data, or None if the run has other classes."""
    module = symmetrical(run)
    if truth is None:
        return None
    known = module.codec.num_classes
    counted = module.codec.counted(truth)
    largest = int((truth if counted is None else truth[counted]).amax()) if truth.numel() else 0
    classes = data.num_classes or max(known, 1 + largest)  # masks have no given number
    if classes != known:
        print(f"labels of the data are not compared: {classes} classes, but {known} in the run")
        return None
    names, own = data.class_names, run.classes
    if names is not None and own is not None and names != own:
        print(
            f"labels of the data are not compared: classes {', '.join(names[:10])}, but "
            f"{', '.join(own[:10])} in the run"
        )
        return None
    return truth


def _measure(
    module: SymmetricalFlowMatching, found: dict[str, Tensor], truth: Tensor | None
) -> dict[str, Any]:
    """Return metrics against the labels of the data; only the number of samples without labels."""
    labels = found["labels"]
    if truth is None:
        return {"num_samples": len(labels)}
    if labels.ndim == 1:
        return classification_metrics(found["probabilities"], truth)
    codec = module.codec
    metrics = segmentation_metrics(labels, truth, codec.num_classes, codec.ignore_index)
    return {"num_samples": len(labels), **metrics}


def _show(data: SplitData, split: str, masks: Tensor, num_classes: int, file: Path) -> None:
    """Save a picture with a row of images, a row of predicted masks and a row of true masks."""
    batch = data.split(split)[:10]
    rows = [batch["x1"].expand(-1, 3, -1, -1), colored(masks[:10], num_classes)]
    truth = batch.get("cond")
    if isinstance(truth, Tensor) and truth.shape == masks[:10].shape:
        rows.append(colored(truth, num_classes))
    save_picture(torch.cat(rows), file)


def _plot(metrics: dict[str, Any], file: Path) -> None:
    """Plot the reliability of probabilities, and the accuracy of the most confident images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    reliability, selective = metrics["reliability"], metrics["selective"]
    left.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="perfectly calibrated")
    left.plot(reliability["confidence"], reliability["accuracy"], marker="o", label="predicted")
    left.set(xlabel="probability of the predicted class", ylabel="accuracy", aspect="equal")
    left.legend()
    right.plot(selective["coverage"], selective["accuracy"], marker=".")
    right.set(xlabel="share of images, most confident first", ylabel="accuracy")
    save_figure(figure, file)


@hydra.main(version_base="1.3", config_path="../conf", config_name="predict")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit predict``."""
    predict(cfg)


if __name__ == "__main__":
    main()
