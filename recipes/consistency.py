"""Measure the agreement of generated images with their labels (symmetrical runs).

flowkit consistency run=runs/symmetrical_digits
flowkit consistency run=runs/symmetrical_masks sampler.grid=10 guidance=1.5

The recipe generates images for labels, and two judges label the images again. The first judge is
the run itself, in one step. The second judge is independent of the run: a support vector machine on
pixels for classes, or for masks the rule that made the foreground of the data's masks. In two-time
mode the recipe also generates pairs of image and label, and measures their agreement.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from flowkit.checks import check_at_least
from flowkit.data import SplitData
from flowkit.data.masks import Masks
from flowkit.metrics import agreement
from flowkit.metrics.labels import segmentation_metrics
from flowkit.metrics.pictures import colored, save_picture
from flowkit.modules import SymmetricalFlowMatching
from flowkit.places import check_writable
from flowkit.runs import Run
from flowkit.runs.drawing import draw, say_plan, symmetrical
from flowkit.runs.features import judge_of
from flowkit.runs.known_data import place_of
from flowkit.runs.records import recording
from flowkit.runs.starts import choose_labels, noise_batches
from flowkit.sampling import ODESampler, sample_seeds

Reader = Callable[[Tensor, Tensor], dict[str, Any]]


def consistency(cfg: DictConfig) -> dict[str, Any]:
    """Measure as configured; write ``consistency.json`` and pictures."""
    check_at_least(cfg.num_samples, 1, "num_samples")
    check_at_least(cfg.batch_size, 1, "batch_size")
    run = Run.load(cfg.run, cfg.weights, cfg.device, cfg.guidance, cfg.trust, **place_of(cfg))
    out = Path(cfg.out) if cfg.out else run.results / "consistency"
    check_writable(out, "out")
    module, data, sampler = symmetrical(run), run.data, run.ode_sampler(cfg.sampler)
    test = data.test[: cfg.num_samples]
    labels = test.get("cond")
    if data.num_classes is not None:
        labels = choose_labels(None, cfg.num_samples, data.num_classes)
    if not isinstance(labels, Tensor):
        raise RuntimeError("run must be trained on data with labels or masks, got data without")
    seeds = sample_seeds(cfg.seed, 0, len(labels), cfg.seeding)
    noise = noise_batches(run.sample_shape, seeds, cfg.batch_size)
    say_plan(run, sampler, len(labels))
    images, cost = draw(run, noise, labels, sampler)
    read = _reader(module, data, cfg.batch_size)
    metrics: dict[str, Any] = {"images_of_labels": read(images, labels)}
    pictures = {"images_of_labels": (images, labels)}
    if module.times == "two-time":
        pairs = _pairs(module, sampler, seeds, cfg.batch_size)
        metrics["pairs"] = read(*pairs)
        pictures["pairs"] = pairs
    sampling = {
        **run.describe(sampler),
        **cost,
        "times": module.times,
        "num_samples": len(labels),
        "seeds": [seeds.start, seeds.stop],
        "seeding": cfg.seeding,
    }
    record = run.record(sampling, metrics=metrics)
    files = [out / "consistency.json", *(out / f"{name}.png" for name in pictures)]
    with recording(record, files):
        for name, (shown, known) in pictures.items():
            _show(shown, known, module.codec.num_classes, out / f"{name}.png")
    print(f"images and pairs: {len(labels)}")
    for name in pictures:
        for key, value in metrics[name].items():
            if isinstance(value, float):
                print(f"{name.replace('_', ' ')}: {key.replace('_', ' ')}  {value:.4f}")
    print(f"pictures  {', '.join(str(f) for f in files[1:])}\nnumbers   {files[0]}")
    return record


def _pairs(
    module: SymmetricalFlowMatching, sampler: ODESampler, seeds: range, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Generate images and their labels together."""
    images, labels = [], []
    for first in tqdm(range(0, len(seeds), batch_size), "pairs", leave=False, disable=None):
        some = seeds[first : first + batch_size]
        pairs = module.sample_pairs(len(some), sampler, some)
        images.append(pairs.images.cpu())
        labels.append(pairs.labels.cpu())
    return torch.cat(images), torch.cat(labels)


def _reader(module: SymmetricalFlowMatching, data: SplitData, batch_size: int) -> Reader:
    """Return the function ``read(images, labels) -> metrics`` that measures the agreement."""
    if data.num_classes is None:
        return lambda images, masks: _read_masks(module, data, images, masks, batch_size)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    train, test = data.train[order[:10_000]], data.test[:]
    judge = judge_of(train["x1"], cast(Tensor, train.get("cond")))

    def judged(images: Tensor, labels: Tensor) -> float | None:
        return None if judge is None else agreement(judge, images, labels).double().mean().item()

    accuracy = judged(test["x1"], cast(Tensor, test.get("cond")))

    def read(images: Tensor, labels: Tensor) -> dict[str, Any]:
        read_again = _labels(module, images, batch_size)
        return {
            "own_agreement": (read_again == labels).double().mean().item(),
            "judge_agreement": judged(images, labels),
            "judge": judge and {"name": judge.name, "test_accuracy": accuracy},
            "shares": (labels.bincount(minlength=module.codec.num_classes) / len(labels)).tolist(),
        }

    return read


def _read_masks(
    module: SymmetricalFlowMatching,
    data: SplitData,
    images: Tensor,
    masks: Tensor,
    batch_size: int,
) -> dict[str, Any]:
    """Return the agreement of images with masks, by the run and by the rule of the data."""
    codec = module.codec
    own = segmentation_metrics(
        _labels(module, images, batch_size), masks, codec.num_classes, codec.ignore_index
    )
    record = {"own_mean_iou": own["mean_iou"], "own_foreground_iou": own["foreground_iou"]}
    if isinstance(data, Masks):
        rule = data.rule.foreground(images).long()
        record["rule_foreground_iou"] = segmentation_metrics(rule, (masks > 0).long(), 2)["iou"][1]
    return record


def _labels(module: SymmetricalFlowMatching, images: Tensor, batch_size: int) -> Tensor:
    """Return the most probable labels of images, by the run in one step."""
    return torch.cat([module.posterior(part).argmax(1).cpu() for part in images.split(batch_size)])


def _show(images: Tensor, labels: Tensor, num_classes: int, file: Path) -> None:
    """Save a picture of images, ten in a row; a row of images of masks is below its masks."""
    if labels.ndim == 1:
        save_picture(images[:100], file)
        return
    masks = colored(labels[:50], num_classes).split(10)
    rows = images[:50].expand(-1, 3, -1, -1).split(10)
    save_picture(torch.cat([x for pair in zip(masks, rows, strict=True) for x in pair]), file)


@hydra.main(version_base="1.3", config_path="../conf", config_name="consistency")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit consistency``."""
    consistency(cfg)


if __name__ == "__main__":
    main()
