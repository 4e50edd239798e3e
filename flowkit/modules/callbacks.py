"""What recipes want to happen while training: pictures, checkpoints, progress."""

import signal
import sys
import threading
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar

from flowkit.checks import check_at_least
from flowkit.distributed import batches_seen
from flowkit.metrics.pictures import save_picture
from flowkit.modules.flow import FlowModule, Guidance, brings_start
from flowkit.provenance import write_atomically
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.types import take


class SampleGrid(Callback):
    """Save a picture of samples at every validation, always from the same start.

    They start from noise of the same seeds, with all classes in turn; if the data bring source
    samples or conditions of another kind, from those of the first validation batch.

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
        """Draw once a validation; the first process saves.

        All draw, since a network that is sharded needs them all.
        """
        if batch_idx or trainer.sanity_checking:
            return
        if not isinstance(pl_module, FlowModule) or pl_module.sample_shape is None:
            return
        data = cast(Any, trainer).datamodule
        classes = getattr(data, "num_classes", None)
        columns = min(classes or 10, 10)
        count = self.rows * columns
        if brings_start(batch, data):
            count = min(count, len(batch["x1"]))
            x0, cond = batch.get("x0"), take(batch.get("cond"), slice(count))
        else:
            x0, cond = None, torch.arange(count) % columns if classes else None
        x0 = seeded_noise(pl_module.sample_shape, range(count)) if x0 is None else x0[:count]
        states = pl_module.solve(x0, self.sampler, cond, self.guidance).x
        samples = pl_module.autoencoder.decode(states)
        if trainer.is_global_zero:
            save_picture(samples, self.folder / f"step-{trainer.global_step:06d}.png", columns)


class LastCheckpoint(Checkpoint):
    """Keep ``<folder>/last.ckpt``, written every few steps and at the last one.

    The last one may come early, by ``trainer.max_time`` say.

    The file is replaced in one move, and only by one that has reached the disk: whenever a process
    or machine dies, it holds the last checkpoint that was finished. It then also replaces what
    Lightning saved on a SLURM cluster's signal.

    Args:
        folder: Where the checkpoint lies.
        every_n_steps: Optimizer steps between checkpoints.

    Raises:
        RuntimeError: If it cannot be written; the one before is left as it was.
    """

    def __init__(self, folder: str | Path, every_n_steps: int):
        check_at_least(every_n_steps, 1, "every_n_steps")
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step of a resumed run is saved; it must not be again amid gradients of the next."""
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:  # what a process left that died while writing
            for left in self.folder.glob("last.ckpt.*.partial"):
                left.unlink()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a step has come that asks for it."""
        step = trainer.global_step
        last_one = step == trainer.max_steps or trainer.should_stop
        if step == self.saved_step or (step % self.every_n_steps and not last_one):
            return
        self.saved_step = step
        last = self.folder / "last.ckpt"
        try:
            if not trainer.is_global_zero:
                trainer.save_checkpoint(last)  # takes part, and writes nothing
            else:
                write_atomically(last, trainer.save_checkpoint)
                for superseded in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):
                    superseded.unlink(missing_ok=True)
        except OSError as error:
            kept = "the last one is as it was" if last.is_file() else "there is none yet"
            raise RuntimeError(
                f"checkpoint must be written to a folder with room, got {self.folder} at step "
                f"{step}: {error}; {kept}"
            ) from error


class StopOnInterrupt(Callback):
    """Let Ctrl-C end training after the step it is in, so that `LastCheckpoint` saves that step.

    The command then ends with the way to go on. A second Ctrl-C ends it at once. Where several
    processes train, which would not stop at the same step, Ctrl-C is left to Lightning.

    Args:
        folder: What ``resume`` is to be given.

    Raises:
        SystemExit: At the end of a training that was stopped.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.asked = Path(folder), False
        self.before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, where Python allows it; Lightning has by now noted whom to give signals back."""
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # by a script's background jobs
        main = threading.current_thread() is threading.main_thread()
        if trainer.world_size == 1 and main and not ignored:
            self.before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        self._restore()
        sys.stderr.write("\nstopping after this step; Ctrl-C again stops at once, and loses it\n")

    def _restore(self) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
        self.before = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop, if asked to, where no gradients wait for those of further batches."""
        if self.asked and batches_seen(trainer) % trainer.accumulate_grad_batches == 0:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the command if it was stopped early."""
        self._restore()
        if self.asked and trainer.global_step != trainer.max_steps:
            raise SystemExit(
                f"stopped at step {trainer.global_step}; go on by resume={self.folder}"
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give Ctrl-C back."""
        self._restore()


class StepProgress(TQDMProgressBar):
    """Lightning's progress bar over the whole training, resumed or not; it knows no epochs."""

    def __init__(self, refresh_rate: int = 20):
        super().__init__(refresh_rate)

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Start the bar where the training stands, to the last step."""
        super().on_train_start(trainer, *args)
        bar = self.train_progress_bar
        bar.set_description("training")
        bar.total = None
        if trainer.max_steps >= 0:
            bar.total = trainer.max_steps * trainer.accumulate_grad_batches
        bar.initial = bar.n = batches_seen(trainer)

    def on_train_epoch_start(self, *args: Any) -> None:
        """Go on: the training stream is endless."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        seen = batches_seen(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, seen - 1)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The logged values, without the logger's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics  # type: ignore[return-value]
