"""Pictures of samples beside their conditions, saved during training."""

from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics.pictures import save_picture
from flowkit.modules.flow import FlowModule, Guidance
from flowkit.modules.latent import LatentFlowMatching
from flowkit.modules.logs import show_picture
from flowkit.sampling import Sampler, SDESampler, sample_seeds
from flowkit.types import Batch


class ConditionGrid(Callback):
    """Picture of conditions, real images and samples, saved at every validation.

    Each row shows the condition of one of the first validation images, the real image, and several
    samples. For inpainting the condition is the image with holes; for a map of labels, the gray
    levels of the map. Holes and seeds are the same in all pictures.

    Args:
        folder: The folder of the pictures, which are ``<folder>/step-<step>.png``.
        sampler: The solver and its grid; None means the default of `FlowModule.sample`.
        guidance: Scale of classifier-free guidance, or a function that wraps the velocity; None
            means no guidance.
        rows: Number of images, at least 1.
        samples: Samples of each image, at least 1.

    Raises:
        ValueError: If ``rows`` or ``samples`` is below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        sampler: Sampler | None = None,
        guidance: Guidance = None,
        rows: int = 8,
        samples: int = 4,
    ) -> None:
        check_at_least(rows, 1, "rows")
        check_at_least(samples, 1, "samples")
        self.folder, self.sampler, self.guidance = Path(folder), sampler, guidance
        self.rows, self.samples = rows, samples

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a stochastic sampler that the module cannot use, before the work."""
        if isinstance(self.sampler, SDESampler) and isinstance(pl_module, FlowModule):
            pl_module.with_score(self.sampler)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw before the first batch of a validation, and save the picture on the first process.

        All processes draw for the conditions of the first process: a sharded network needs all of
        them, and an adaptive solver must call it equally often.
        """
        if batch_idx or trainer.sanity_checking:
            return
        if not isinstance(pl_module, LatentFlowMatching) or pl_module.sample_shape is None:
            return
        shown = self._of_first_process(trainer, batch, pl_module.device)
        picture = condition_grid(
            pl_module, shown, self.rows, self.samples, self.sampler, self.guidance
        )
        if trainer.is_global_zero:
            file = self.folder / f"step-{trainer.global_step:06d}.png"
            show_picture(trainer, "samples", save_picture(picture, file, self.samples + 2))

    def _of_first_process(self, trainer: Trainer, batch: Batch, device: torch.device) -> Batch:
        """Return the first rows of the batch of the first process, on all processes."""
        cond = batch.get("cond")
        shown: dict[str, Any] = {"x1": batch["x1"][: self.rows].cpu()}
        if isinstance(cond, Tensor):
            shown["cond"] = cond[: self.rows].cpu()
        if "encoded_by" in batch:
            shown["encoded_by"] = batch["encoded_by"]
        shown = trainer.strategy.broadcast(shown)
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in shown.items()}
        return cast(Batch, moved)


@torch.no_grad()
def condition_grid(
    module: LatentFlowMatching,
    batch: Batch,
    rows: int,
    samples: int,
    sampler: Sampler | None = None,
    guidance: Guidance = None,
    seed: int = 0,
    seeding: int = 2,
) -> Tensor:
    """Draw samples for the conditions of a batch, and return the images of the picture.

    Args:
        module: A flow for inpainting (with ``masks``), or with maps of labels as conditions.
        batch: Images or latents ``x1``, and conditions: classes ``(B,)`` for inpainting, else maps
            of labels ``(B, H, W)``.
        rows: Number of samples of the batch to use.
        samples: Samples of each image.
        sampler: The solver and its grid; None means the default of `FlowModule.sample`.
        guidance: Scale of classifier-free guidance, or a function that wraps the velocity.
        seed: Seed of the holes and the samples.
        seeding: Version of the samples' seeds, see `flowkit.sampling.sample_seeds`.

    Returns:
        Images ``(rows · (2 + samples), C, H, W)`` on the CPU, row by row: the condition, the real
        image, the samples.

    Raises:
        ValueError: If the module has no masks and the batch has no maps.
    """
    real, cond = batch["x1"][:rows], batch.get("cond")
    if "encoded_by" in batch:
        real = module.autoencoder.decode(real)
    seeds = sample_seeds(seed, 0, len(real) * samples, seeding)
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
        raise ValueError("module must have masks, or the batch maps (B, H, W) as cond, got neither")
    return torch.cat([given[:, None], real[:, None], drawn.to(real)], 1).flatten(0, 1).cpu()
