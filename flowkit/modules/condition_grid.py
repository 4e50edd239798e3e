"""Pictures made in training of what a flow makes of its conditions."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics.pictures import save_picture
from flowkit.modules.flow import Guidance
from flowkit.modules.latent import LatentFlowMatching
from flowkit.sampling import ODESampler
from flowkit.types import Batch


class ConditionGrid(Callback):
    """Save a picture at every validation: what was given, the real image, and several samples.

    One row for each of the first validation images. Given are, for inpainting, the images with
    holes, for a map of labels, its gray levels. Holes and seeds are always the same.

    Args:
        folder: Pictures go to ``<folder>/step-<step>.png``.
        sampler: The solver and grid.
        guidance: Scale of classifier-free guidance.
        rows: Images.
        samples: Samples of each.
    """

    def __init__(
        self,
        folder: str | Path,
        sampler: ODESampler | None = None,
        guidance: Guidance = None,
        rows: int = 8,
        samples: int = 4,
    ):
        check_at_least(rows, 1, "rows")
        check_at_least(samples, 1, "samples")
        self.folder, self.sampler, self.guidance = Path(folder), sampler, guidance
        self.rows, self.samples = rows, samples

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw once a validation, on the first process."""
        if batch_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if isinstance(pl_module, LatentFlowMatching) and pl_module.sample_shape is not None:
            picture = condition_grid(
                pl_module, batch, self.rows, self.samples, self.sampler, self.guidance
            )
            file = self.folder / f"step-{trainer.global_step:06d}.png"
            save_picture(picture, file, self.samples + 2)


@torch.no_grad()
def condition_grid(
    module: LatentFlowMatching,
    batch: Batch,
    rows: int,
    samples: int,
    sampler: ODESampler | None = None,
    guidance: Guidance = None,
    seed: int = 0,
) -> Tensor:
    """Return images ``(rows · (2 + samples), C, H, W)``: given, real and samples, row by row.

    Args:
        module: A flow with masks, or on maps of labels ``(B, H, W)``.
        batch: Images or latents, with their conditions.
        rows: How many of the batch.
        samples: Samples of each.
        sampler: The solver and grid.
        guidance: Scale of classifier-free guidance.
        seed: Of the holes, and of the first sample.

    Raises:
        ValueError: If the module has no masks and the batch no maps.
    """
    real, cond = batch["x1"][:rows], batch.get("cond")
    if "encoded_by" in batch:
        real = module.autoencoder.decode(real)
    seeds = range(seed, seed + len(real) * samples)
    if module.masks is not None:
        generator = torch.Generator(real.device).manual_seed(seed)
        mask = module.masks(len(real), (real.shape[-2], real.shape[-1]), generator, real.device)
        labels = cond[:rows] if isinstance(cond, Tensor) else None
        given = torch.where(mask > 0, 0.0, real)
        drawn = module.inpaint(real, mask, samples, sampler, labels, seeds, guidance)
    elif isinstance(cond, Tensor) and cond.ndim == 3:
        maps = cond[:rows]
        given = 2 * maps[:, None] / max(int(cond.max()), 1) - 1
        given = given.to(real).expand_as(real)
        each = maps.repeat_interleave(samples, 0)
        drawn = module.sample(len(each), sampler, each, seeds, guidance)
        drawn = drawn.unflatten(0, (-1, samples))
    else:
        raise ValueError("module must have masks, or batches maps (B, H, W) as cond, got neither")
    return torch.cat([given[:, None], real[:, None], drawn.to(real)], 1).flatten(0, 1).cpu()
