"""Training that goes on exactly where it stopped, whatever is trained."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]

ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)


class ExactResume(LightningModule):
    """An optimizer, a schedule, and randomness that a resumed run repeats.

    Every training step's randomness (noise, times, dropped conditions, dropout) is a function of
    the seed at the start of the fit, the number of batches seen and the rank, so that a resumed
    run goes on exactly as an uninterrupted one. It may go on for longer, or with another learning
    rate: schedule and optimizer follow what is configured now.

    Args:
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, stepped every training step.
    """

    def __init__(self, optimizer: MakeOptimizer = ADAMW, lr_scheduler: MakeScheduler | None = None):
        super().__init__()
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.noise_seed: int | None = None

    def configure_optimizers(self) -> Any:
        """Lightning's hook: the optimizer over all trainable parameters."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        """Take the seed of the fit, unless a checkpoint brought its own.

        Hyperparameters and learning-rate schedule are those configured now, not a checkpoint's.
        """
        if self.noise_seed is None:
            self.noise_seed = torch.initial_seed()
        trainer = cast(Any, self.trainer)
        if trainer.global_step:
            self._follow_configuration(trainer.optimizers, trainer.lr_scheduler_configs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step by (seed, batches seen, rank)."""
        seen = cast(Any, self.trainer).fit_loop.epoch_loop.batch_progress.total.processed
        key = f"{self.noise_seed} {seen} {self.global_rank}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        # Not torch.manual_seed, which looks for every kind of device at every call.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the seed."""
        checkpoint["flowkit"] = {"noise_seed": self.noise_seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        self.noise_seed = checkpoint["flowkit"]["noise_seed"]

    def _follow_configuration(self, optimizers: Sequence[Optimizer], schedules: Sequence) -> None:
        """Bring a fresh schedule to the step reached, and the resumed optimizer to its values."""
        configured = self.configure_optimizers()
        if isinstance(configured, dict):
            fresh, resumed = configured["lr_scheduler"]["scheduler"], schedules[0].scheduler
            configured = configured["optimizer"]
            with warnings.catch_warnings():  # of a schedule that is ahead of its optimizer
                warnings.simplefilter("ignore", UserWarning)
                for _ in range(resumed.last_epoch):
                    fresh.step()
            resumed.load_state_dict(fresh.state_dict())
        for group, new in zip(optimizers[0].param_groups, configured.param_groups, strict=True):
            group.update({key: value for key, value in new.items() if key != "params"})
