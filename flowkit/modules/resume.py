"""Training that resumes exactly: a stopped and resumed run equals an uninterrupted run."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flowkit.distributed import batches_seen
from flowkit.nn.frozen import Frozen
from flowkit.types import Batch

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]

ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make float32 torch's default type.

    Lightning makes the type of ``trainer.precision`` the default in training and validation. In
    half precision, random numbers of that type take 256 or 2048 values only: too few for times,
    for dropped conditions and for masks. Tensors in the type of the network do not depend on the
    default.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class ExactResume(Frozen, LightningModule):
    """Training of a loss with randomness that a resumed run repeats. A subclass adds `loss`.

    All randomness of a training step (noise, times, dropped conditions, dropout) is a function of
    the seed at the start of the fit, the number of batches seen and the rank. So a resumed run
    continues exactly as an uninterrupted run does. A resumed run may have more steps or another
    learning rate: its schedule and optimizer follow the current configuration. Validation draws
    the same noise every time.

    Args:
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.
    """

    weights: Mapping[str, Any] | None = None
    """Record of the loaded weights: their ``kind`` (averaged or raw) and their ``step``."""

    start: str | Path | None = None
    """Run whose weights the first fit begins with; not read once a checkpoint brought weights."""

    _begun = False

    def __init__(
        self, optimizer: MakeOptimizer = ADAMW, lr_scheduler: MakeScheduler | None = None
    ) -> None:
        super().__init__()
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.noise_seed: int | None = None

    def take_start(self, place: str | Path) -> None:
        """Take the weights of the run that training starts from. A subclass with ``start`` adds it.

        Args:
            place: The run folder.
        """
        raise NotImplementedError

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the scalar ``"loss"`` of a batch, and other scalars to log."""
        raise NotImplementedError

    @property
    def terms_are_seen(self) -> bool:
        """True if the terms of the next loss are used. False in training steps that log nothing.

        Lightning's log costs more than a training step of a small network.
        """
        trainer = cast(Any, self._trainer)
        if trainer is None or not trainer.training:
            return True
        every, step = trainer.log_every_n_steps, self.global_step + 1
        # Lightning logs the last step, too: without its own terms, those of an earlier step.
        return bool(every) and (step % every == 0 or step == trainer.max_steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch, and log its terms.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        with float32_by_default():
            terms = self.loss(batch)
        if not torch.isfinite(terms["loss"]):
            raise RuntimeError(self._not_finite(batch, batch_idx, terms["loss"]))
        if self.terms_are_seen:
            for name, value in terms.items():
                self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", sync_dist=True)
            self.log("train/learning_rate", self._learning_rate())
        return terms["loss"]

    def _learning_rate(self) -> float:
        """Return the learning rate of this step."""
        return cast(Any, self.trainer).optimizers[0].param_groups[0]["lr"]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the loss under fixed noise as ``val/…``."""
        # Each rank has its own data and therefore its own noise.
        seed = batch_idx * cast(Any, self.trainer).world_size + self.global_rank
        generator = torch.Generator(self.device).manual_seed(seed)
        with float32_by_default():
            terms = self.loss(batch, generator)
        size = len(batch["x1"])
        self.log_dict(
            {f"val/{name}": value for name, value in terms.items()}, batch_size=size, sync_dist=True
        )

    def configure_optimizers(self) -> Any:
        """Return the optimizer of all trainable parameters, and its schedule if there is one."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        """Take the weights of ``start``, once, unless a checkpoint has brought weights.

        Lightning calls `setup` before it restores a checkpoint, and this method after it. An
        average of weights begins with those after the first step.
        """
        if self.start is not None and not self._begun:
            self.take_start(self.start)
            self._begun = True

    def on_train_start(self) -> None:
        """Take the seed of the fit, unless a checkpoint brought its own seed.

        The optimizer's settings and the learning-rate schedule come from the current
        configuration, not from the checkpoint.
        """
        if self.noise_seed is None:
            self.noise_seed = torch.initial_seed()
        trainer = cast(Any, self.trainer)
        if trainer.global_step:
            self._follow_configuration(trainer.optimizers, trainer.lr_scheduler_configs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step with a hash of (seed, batches seen, rank)."""
        seen = batches_seen(self.trainer)
        key = f"{self.noise_seed} {seen} {self.global_rank}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        # torch.manual_seed looks for every kind of device at every call, which is slow.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the seed."""
        checkpoint["flowkit"] = {"noise_seed": self.noise_seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seed, and note that a fit no more takes the weights of ``start``."""
        self.noise_seed = checkpoint["flowkit"]["noise_seed"]
        self._begun = True

    def _not_finite(self, batch: Batch, batch_idx: int, loss: Tensor) -> str:
        """Return an error message that names the step, and the data if they are not finite."""
        where = f"got {loss.item()} at step {self.global_step}, batch {batch_idx}"
        for name, value in batch.items():
            if isinstance(value, Tensor) and not torch.isfinite(value).all():
                rows = (~torch.isfinite(value)).flatten(1).any(1).nonzero().flatten().tolist()
                return f"loss must be finite, {where}; {name} is not finite in its rows {rows[:10]}"
        weights = next((p for p in self.parameters() if p.is_floating_point()), loss)
        if weights.dtype == torch.float16:
            return (
                f"loss must be finite, {where}; the data are finite: weights in float16 overflow, "
                "and Adam's eps of 1e-8 is 0 in float16; set trainer.precision=bf16-mixed"
            )
        return (
            f"loss must be finite, {where}; the data are finite: lower the learning rate or clip "
            "gradients, and resume from the last checkpoint"
        )

    def _follow_configuration(
        self, optimizers: Sequence[Optimizer], schedules: Sequence[Any]
    ) -> None:
        """Give the resumed optimizer and schedule the values of the current configuration.

        A new schedule is stepped to the current step; the resumed schedule takes its state.
        """
        configured = self.configure_optimizers()
        if isinstance(configured, dict):
            fresh, resumed = configured["lr_scheduler"]["scheduler"], schedules[0].scheduler
            configured = configured["optimizer"]
            with warnings.catch_warnings():  # torch warns if a schedule is ahead of its optimizer
                warnings.simplefilter("ignore", UserWarning)
                for _ in range(resumed.last_epoch):
                    fresh.step()
            resumed.load_state_dict(fresh.state_dict())
        for group, new in zip(optimizers[0].param_groups, configured.param_groups, strict=True):
            group.update({key: value for key, value in new.items() if key != "params"})
