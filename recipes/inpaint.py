"""Inpaint holes in test images, several times each, and measure the fillings.

flowkit inpaint run=runs/inpainting
flowkit inpaint run=runs/inpainting kind=strokes num_samples=8 sampler.grid=50
"""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from flowkit.checks import check_at_least
from flowkit.inpainting import RandomMasks
from flowkit.metrics.pictures import save_picture
from flowkit.modules import LatentFlowMatching
from flowkit.modules.flow import Guidance, labels_of
from flowkit.places import check_writable
from flowkit.runs import Run
from flowkit.runs.known_data import place_of
from flowkit.runs.records import recording
from flowkit.sampling import Sampler, sample_seeds

SHOWN = 25  # images in the picture, one a row


def inpaint(cfg: DictConfig) -> Tensor:
    """Inpaint as configured; write ``inpainted.json`` and a picture: hole, image, fillings."""
    check_at_least(cfg.num_images, 1, "num_images")
    labeled = cfg.labels or cfg.guidance is not None
    # Without labels guidance has no effect, so the scale of the run is not used.
    run = Run.load(
        cfg.run, cfg.weights, cfg.device, cfg.guidance if labeled else 1, cfg.trust, **place_of(cfg)
    )
    folder = Path(cfg.out) if cfg.out else run.results / "inpainted"
    check_writable(folder, "out")
    module = run.module
    if not isinstance(module, LatentFlowMatching) or module.masks is None:
        raise TypeError(
            f"run must be trained with module=inpainting, got {type(module).__name__} without masks"
        )
    data, sampler = run.data, run.sampler(cfg.sampler)
    test = data.test[: cfg.num_images]
    images, labels = test["x1"], labels_of(test, data.num_classes) if cfg.labels else None
    masks = module.masks if cfg.kind is None else RandomMasks(cfg.kind)
    size = (images.shape[-2], images.shape[-1])
    mask = masks(len(images), size, torch.Generator().manual_seed(cfg.seed))
    seeds = sample_seeds(cfg.seed, 0, len(images) * cfg.num_samples, cfg.seeding)
    filled = fill(cfg, module, images, mask, labels, sampler, run.guidance, seeds)
    pasted = torch.where(mask[:, None] > 0, filled, images[:, None])

    metrics = {
        "paste_back": cfg.paste_back,
        **compare(pasted if cfg.paste_back else filled, images, mask),
        "own_known_error": compare(filled, images, mask)["known_error"],
    }
    sampling = {
        **run.describe(sampler),
        "num_images": len(images),
        "num_samples": cfg.num_samples,
        "seeds": [seeds.start, seeds.stop],
        "seeding": cfg.seeding,
        "labels": labels is not None,
        "masks": {"kind": masks.kind, "most": masks.most, "seed": cfg.seed},
    }
    files = [folder / "inpainted.json", folder / "inpainted.png"]
    shown = pasted if cfg.paste_back else filled
    given = torch.where(mask > 0, 0.0, images)
    picture = torch.cat([given[:, None], images[:, None], shown], 1)[:SHOWN]
    with recording(run.record(sampling, metrics=metrics), files):
        save_picture(picture.flatten(0, 1), files[1], cfg.num_samples + 2)
    for name, value in metrics.items():
        print(f"{name:<16} {value if isinstance(value, bool) else round(value, 4)}")
    print(f"picture   {files[1]}\nnumbers   {files[0]}")
    return shown


def fill(
    cfg: DictConfig,
    module: LatentFlowMatching,
    images: Tensor,
    mask: Tensor,
    labels: Tensor | None,
    sampler: Sampler,
    guidance: Guidance,
    seeds: range,
) -> Tensor:
    """Return fillings ``(B, num_samples, C, H, W)``, without pasting known pixels back."""
    parts = []
    for start in tqdm(range(0, len(images), cfg.batch_size), desc="inpainting", disable=None):
        rows = slice(start, start + cfg.batch_size)
        parts.append(
            module.inpaint(
                images[rows],
                mask[rows],
                cfg.num_samples,
                sampler,
                None if labels is None else labels[rows],
                seeds[start * cfg.num_samples : (start + cfg.batch_size) * cfg.num_samples],
                guidance,
                paste_back=False,
            ).cpu()
        )
    return torch.cat(parts)


def compare(filled: Tensor, images: Tensor, mask: Tensor) -> dict[str, float]:
    """Measure the errors of fillings, and the spread over the fillings of one hole.

    Returns:
        ``known_error`` and ``hole_error``, the mean absolute errors in known pixels and in holes;
        ``spread``, the standard deviation over the fillings of a hole, averaged over its pixels.
        All are in units of [-1, 1].
    """
    error = (filled - images[:, None]).abs()
    hole = (mask > 0)[:, None].expand_as(error)
    spread = filled.std(1, correction=0)[hole[:, 0]]
    return {
        "known_error": error[~hole].mean().item(),
        "hole_error": error[hole].mean().item(),
        "spread": spread.mean().item(),
    }


@hydra.main(version_base="1.3", config_path="../conf", config_name="inpaint")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit inpaint``."""
    inpaint(cfg)


if __name__ == "__main__":
    main()
