"""What recipes want to happen while training: pictures, checkpoints, progress."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar

from flowkit.checks import check_at_least
from flowkit.metrics.pictures import save_picture
from flowkit.modules.flow import FlowModule, Guidance
from flowkit.sampling import ODESampler


class SampleGrid(Callback):
    """Save a picture of samples at every validation, always from the same seeds.

    With averaged weights in use the pictures are theirs, since they are drawn while validation
    runs, which is when Lightning has them swapped in.

    Args:
        folder: Pictures go to ``<folder>/step-<step>.png``.
        sampler: The solver and grid.
        guidance: Scale of classifier-free guidance.
        rows: Samples of each class (without classes: rows of 10).
    """

    def __init__(
        self,
        folder: str | Path,
        sampler: ODESampler | None = None,
        guidance: Guidance = None,
        rows: int = 4,
    ):
        check_at_least(rows, 1, "rows")
        self.folder, self.sampler, self.guidance, self.rows = Path(folder), sampler, guidance, rows

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
        if not isinstance(pl_module, FlowModule) or pl_module.sample_shape is None:
            return
        classes = getattr(trainer.datamodule, "num_classes", None)  # type: ignore[attr-defined]
        columns = min(classes or 10, 10)
        count = self.rows * columns
        cond = torch.arange(count) % columns if classes else None
        samples = pl_module.sample(count, self.sampler, cond, range(count), self.guidance)
        save_picture(samples, self.folder / f"step-{trainer.global_step:06d}.png", columns)


class LastCheckpoint(Checkpoint):
    """Keep ``<folder>/last.ckpt``, written every few steps and at the last one.

    The file is replaced in one move, so that it is whole at any moment.

    Args:
        folder: Where the checkpoint lies.
        every_n_steps: Optimiser steps between checkpoints.
    """

    def __init__(self, folder: str | Path, every_n_steps: int):
        check_at_least(every_n_steps, 1, "every_n_steps")
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.saved_step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a step has come that asks for it."""
        step = trainer.global_step
        if step == self.saved_step or (step % self.every_n_steps and step != trainer.max_steps):
            return
        self.saved_step = step
        partial, last = self.folder / "last.ckpt.partial", self.folder / "last.ckpt"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, last)


class StepProgress(TQDMProgressBar):
    """Lightning's progress bar, counting training steps to ``max_steps``.

    The training stream is endless, so the bar of an epoch would have no end.
    """

    def __init__(self, refresh_rate: int = 20):
        super().__init__(refresh_rate)

    @property
    def total_train_batches(self) -> int | float:
        """Batches until the last step."""
        steps = self.trainer.max_steps
        return float("inf") if steps < 0 else steps * self.trainer.accumulate_grad_batches

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start the bar, by its right name: there are no epochs."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description("training")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The logged values, without the logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics  # type: ignore[return-value]
