"""Draw images from test maps of labels, and measure their agreement with the maps.

flowkit semantic run=runs/semantic
flowkit semantic run=runs/semantic guidance=2 num_images=1000
"""

from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.data.masks import ForegroundRule, Masks
from flowkit.metrics import agreement
from flowkit.metrics.pictures import save_picture
from flowkit.modules import LatentFlowMatching
from flowkit.modules.condition_grid import condition_grid
from flowkit.places import check_writable
from flowkit.runs import Run
from flowkit.runs.drawing import draw, say_plan, start
from flowkit.runs.features import judge_of
from flowkit.runs.known_data import place_of
from flowkit.runs.records import recording


def semantic(cfg: DictConfig) -> dict[str, Any]:
    """Draw as configured; write ``semantic.json`` and a picture: map, image, samples."""
    check_at_least(cfg.num_images, 1, "num_images")
    run = Run.load(cfg.run, cfg.weights, cfg.device, cfg.guidance, cfg.trust, **place_of(cfg))
    folder = Path(cfg.out) if cfg.out else run.results / "semantic"
    check_writable(folder, "out")
    module, data = run.module, run.data
    if not isinstance(data, Masks) or not isinstance(module, LatentFlowMatching):
        raise TypeError(
            "run must be trained with module=latent on masks made by a rule, "
            f"got {type(module).__name__} on {type(data).__name__}"
        )
    sampler, test = run.sampler(cfg.sampler), data.test[: cfg.num_images]
    images, maps = test["x1"], test["cond"]
    x0, source = start(run, cfg, len(maps))
    say_plan(run, sampler, len(maps))
    samples, cost = draw(run, x0, maps, sampler)
    generator = torch.Generator(module.device).manual_seed(cfg.seed)
    with torch.no_grad():
        parts = images.to(module.device).split(cfg.batch_size)
        parts = [module.encode({"x1": part}, generator)["x1"] for part in parts]
        decoded = torch.cat([module.autoencoder.decode(part).cpu() for part in parts])
    metrics = {
        "iou": mask_iou(samples, maps, data.rule),
        "iou_of_reconstructions": mask_iou(decoded, maps, data.rule),
    }
    if data.rule.classes:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(cfg.seed))
        train = data.train[order[:10_000]]
        if judge := judge_of(train["x1"], _classes(train["cond"])):
            metrics["class_agreement"] = _mean(agreement(judge, samples, _classes(maps)))
            metrics["class_agreement_of_real"] = _mean(agreement(judge, images, _classes(maps)))
    sampling = {**run.describe(sampler), **cost, **source, "conditions": "test split"}
    rule = {"threshold": data.rule.threshold, "classes": data.rule.classes}
    seen = {"name": type(data.images).__name__, "test": data.fingerprint("test")}
    record = run.record(sampling, metrics=metrics, rule=rule, data=seen)
    files = [folder / "semantic.json", folder / "semantic.png"]
    rows = min(cfg.rows, len(maps))
    shown = condition_grid(
        module, test, rows, cfg.columns, sampler, run.guidance, cfg.seed, cfg.seeding
    )
    with recording(record, files):
        save_picture(shown, files[1], cfg.columns + 2)
    for name, value in metrics.items():
        print(f"{name:<24} {value:.4f}")
    print(f"picture   {files[1]}\nnumbers   {files[0]}")
    return record


def mask_iou(images: Tensor, maps: Tensor, rule: ForegroundRule) -> float:
    """Return the mean intersection over union of the rule's and the map's foreground.

    >>> rule, maps = ForegroundRule(0.0, classes=False), torch.tensor([[[1, 1, 0, 0]]])
    >>> mask_iou(torch.tensor([[[[1.0, -1.0, 1.0, -1.0]]]]), maps, rule)
    0.3333...
    """
    found = ForegroundRule(rule.threshold, classes=False)(images) > 0
    wanted = maps.to(found.device) > 0
    both, either = ((m.flatten(1).sum(1)) for m in (found & wanted, found | wanted))
    return (both / either.clamp(min=1)).mean().item()


def _classes(maps: Tensor) -> Tensor:
    """Return the class of each map's foreground."""
    return maps.flatten(1).amax(1) - 1


def _mean(hits: Tensor) -> float:
    """Return the share of True."""
    return hits.double().mean().item()


@hydra.main(version_base="1.3", config_path="../conf", config_name="semantic")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit semantic``."""
    semantic(cfg)


if __name__ == "__main__":
    main()
