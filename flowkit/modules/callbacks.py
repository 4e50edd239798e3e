"""Callbacks of training: averaged weights, pictures, checkpoints, signals and the progress bar."""

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from flowkit.checks import check_at_least, check_between
from flowkit.distributed import batches_seen
from flowkit.metrics.pictures import save_picture
from flowkit.modules.flow import FlowModule, Guidance, brings_start, labels_of
from flowkit.modules.logs import show_picture
from flowkit.provenance import write_atomically
from flowkit.sampling import Sampler, SDESampler, seeded_noise
from flowkit.stopping import Stopped
from flowkit.types import take


class _WarmAverage(AveragedModel):
    """Average of `AveragedWeights`, in float32 at least beside weights in half precision."""

    def __init__(self, model: nn.Module, device: Any, decay: float) -> None:
        super().__init__(model, device, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average in place."""
        n = int(self.n_averaged)
        pairs = [
            (average, value.detach().to(average))
            for mine, its in (
                (self.module.parameters(), model.parameters()),
                (self.module.buffers(), model.buffers()),
            )
            for average, value in zip(mine, its, strict=True)
        ]
        floats = [pair for pair in pairs if pair[0].is_floating_point() or pair[0].is_complex()]
        for average, value in pairs:
            if not n or not (average.is_floating_point() or average.is_complex()):
                average.copy_(value)  # at first also over a NaN, which lerp would keep
        if n:
            averages, values = (list(side) for side in zip(*floats, strict=True))
            torch._foreach_lerp_(averages, values, 1 - min(self.decay, (1 + n) / (10 + n)))
        self.n_averaged += 1


class AveragedWeights(WeightAveraging):
    """Exponential moving average ``a`` of the weights ``w``, with a warm-up of its decay.

        a ← d_n a + (1 − d_n) w,    d_n = min(decay, (1 + n) / (10 + n))

    ``n`` is the number of averaged steps so far, and ``a`` starts as the weights after the first
    step. During the warm-up, the averaged weights are a tenth of the training old on average. So
    the average of a short training holds no initial weights. With a constant decay of 0.999, the
    average of 300 steps consists of them by 74 %. The warm-up ends when ``d_n`` is the decay: after
    about ``9 / (1 − decay)`` steps.

    Checkpoints hold ``n``, so a resumed training continues the schedule. Buffers are averaged like
    weights; buffers of integers are copied.

    Source: the rule of TensorFlow's ``tf.train.ExponentialMovingAverage`` with ``num_updates``.

    Args:
        decay: Largest decay of the average per step, in [0, 1].
        update_every_n_steps: Optimizer steps between updates of the average, at least 1.
        device: Device of the average; None means the device of the module.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        check_between(decay, 0, 1, "decay")
        check_at_least(update_every_n_steps, 1, "update_every_n_steps")
        super().__init__(device)
        self.decay, self.update_every_n_steps = decay, update_every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take an average that starts as the module, with the warm-up."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._average_model = _WarmAverage(pl_module, self._device, self.decay)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether to update the average after an optimizer step, numbered from 0."""
        return step_idx is not None and step_idx % self.update_every_n_steps == 0


class SampleGrid(Callback):
    """Picture of samples, saved at every validation from the same initial states.

    The samples start from noise with fixed seeds, and their classes are 0, 1, 2, … in turn. If the
    data hold source samples, or conditions other than classes, the samples start from those of the
    first validation batch.

    During validation Lightning uses the averaged weights, if weights are averaged. So the pictures
    show samples of the averaged weights.

    Args:
        folder: The folder of the pictures, which are ``<folder>/step-<step>.png``.
        sampler: The solver and its grid; None means the default of `FlowModule.sample`.
        guidance: Scale of classifier-free guidance, or a function that wraps the velocity; None
            means no guidance.
        rows: Samples of each class; for data without classes, rows of 10 samples.

    Raises:
        ValueError: If ``rows`` is below 1.
    """

    widest = 10
    """Largest number of samples in a row."""

    def __init__(
        self,
        folder: str | Path,
        sampler: Sampler | None = None,
        guidance: Guidance = None,
        rows: int = 4,
    ) -> None:
        check_at_least(rows, 1, "rows")
        self.folder, self.sampler, self.guidance, self.rows = Path(folder), sampler, guidance, rows

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
        """Draw the samples before the first batch of a validation, and save the picture.

        All processes draw, since a sharded network needs all of them. The first process saves.
        """
        if batch_idx or trainer.sanity_checking:
            return
        if not isinstance(pl_module, FlowModule) or pl_module.sample_shape is None:
            return
        data = cast(Any, trainer).datamodule
        classes = getattr(data, "num_classes", None)
        columns = min(classes or self.widest, self.widest)
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
            file = self.folder / f"step-{trainer.global_step:06d}.png"
            self.save(samples, file, columns, {**batch, "cond": cond}, data)
            show_picture(trainer, "samples", file)

    def save(self, samples: Tensor, file: Path, columns: int, batch: Any, data: Any) -> None:
        """Save the picture of decoded samples; a subclass shows samples of another kind."""
        labels = labels_of(batch, getattr(data, "num_classes", None))
        names = getattr(data, "class_names", None)
        captions = [names[int(k)] for k in labels] if names and labels is not None else None
        save_picture(samples, file, columns, captions=captions)


class LastCheckpoint(Checkpoint):
    """Checkpoint ``<folder>/last.ckpt``, written every ``every_n_steps`` and at the last step.

    A training may end before ``trainer.max_steps``, for example by ``trainer.max_time``. The
    checkpoint is then written at the end, too.

    The new checkpoint is written to another file, flushed to the disk and then renamed. So after a
    crash of the process or the machine, ``last.ckpt`` holds the last complete checkpoint. A new
    checkpoint also replaces the ``hpc_ckpt_*.ckpt`` files that Lightning writes at the signal of a
    SLURM cluster.

    Args:
        folder: The folder of the checkpoint.
        every_n_steps: Optimizer steps between checkpoints, at least 1.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
        RuntimeError: In training, if the checkpoint cannot be written. The last checkpoint is then
            unchanged.
    """

    def __init__(self, folder: str | Path, every_n_steps: int) -> None:
        check_at_least(every_n_steps, 1, "every_n_steps")
        self.folder, self.every_n_steps = Path(folder), every_n_steps
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the first step as saved: a resumed run starts with a saved step.

        With accumulated gradients, a second checkpoint of this step would hold a part of the
        gradients of the next step.
        """
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:  # what a process left that died while writing
            for left in self.folder.glob("last.ckpt.*.partial"):
                left.unlink()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint after every ``every_n_steps`` steps and after the last step."""
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
            kept = "last.ckpt is unchanged" if last.is_file() else "there is no last.ckpt yet"
            raise RuntimeError(
                f"folder must have room for a checkpoint, got {self.folder} at step "
                f"{step}: {error}; {kept}"
            ) from error


class LastValidation(Callback):
    """Validation, and with it a picture, after the last step, whatever the interval is."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask Lightning to stop: it validates before a stop, but not after ``max_steps``."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


class StopOnInterrupt(Callback):
    """Stop at Ctrl-C or SIGTERM after the current step, so that `LastCheckpoint` saves this step.

    The command then ends with a message that names the ``resume`` option, and with the exit status
    130 or 143. A second Ctrl-C ends the command at once; a second SIGTERM changes nothing, since
    some supervisors send several. Of several processes any one may get the signal.

    Args:
        folder: The run folder, for the ``resume`` option in the message.

    Raises:
        Stopped: At the end of a training that a signal stopped early.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.asked = Path(folder), 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handlers of both signals, in the main thread.

        Lightning has stored the handlers of before the training, and restores them at its end.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            # A background job of a script ignores Ctrl-C; it must continue to do so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._ask)
        early = cast(Any, trainer)._signal_connector
        if early.received_sigterm:  # by Lightning's handler, which would end with status 0
            self.asked, early.received_sigterm = signal.SIGTERM, False

    def _ask(self, number: int, frame: Any) -> None:
        """Request a stop at the first signal; end at once at a second Ctrl-C."""
        if not self.asked:
            self.asked = number
            also = "; Ctrl-C again stops at once without saving" if number == signal.SIGINT else ""
            sys.stderr.write(f"\nstopping after this step{also}\n")
        elif number == signal.SIGINT:
            raise Stopped(
                number, f"stopped at once; continue from the last checkpoint: resume={self.folder}"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop all processes after a signal, as soon as no accumulated gradients are left."""
        if batches_seen(trainer) % trainer.accumulate_grad_batches:
            return
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(
            bool(self.asked), all=False
        ):
            self.asked = self.asked or signal.SIGTERM  # another process got the signal
        if self.asked:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the command if a signal stopped the training before its last step."""
        if self.asked and trainer.global_step != trainer.max_steps:
            stopped = Stopped(
                self.asked,
                f"stopped at step {trainer.global_step}; continue with resume={self.folder}",
            )
            if not trainer.is_global_zero:
                stopped.code = 0  # Lightning would kill the first process
            raise stopped


class StepProgress(TQDMProgressBar):
    """Progress bar over the whole training, counted in batches instead of epochs.

    In a resumed run the bar starts at the step of the checkpoint. After 20 batches a line says how
    long the training will take, by the time of batches 6 to 20. In a file or a pipe there is no
    bar, but a line after each tenth of the training.

    Args:
        refresh_rate: Batches between two updates of the bar.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate)
        self.first, self.began = 0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn the bar off on all processes but the first, and without a terminal."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """Set the bar to the current batch, and its end to the last batch."""
        super().on_train_start(trainer, *args)
        bar = self.train_progress_bar
        bar.set_description("training")
        bar.total = None
        if trainer.max_steps >= 0:
            bar.total = trainer.max_steps * trainer.accumulate_grad_batches
        bar.initial = bar.n = self.first = batches_seen(trainer)

    def on_train_epoch_start(self, *args: Any) -> None:
        """Leave the bar as it is, since the training stream has no epochs."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar to the number of batches since the start of the training."""
        seen = batches_seen(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, seen - 1)
        made = seen - self.first
        if made == 5:  # the first ones are slower
            self.began = time.perf_counter()
        total = self.train_progress_bar.total
        if made == 20 and total is not None and total > seen:
            seconds = (time.perf_counter() - self.began) / 15 * (total - seen)
            self._say(f"time      about {duration(seconds)} more on this machine, by 15 batches")
        if self.is_disabled and total is not None and 10 * seen // total > 10 * (seen - 1) // total:
            values = self.get_metrics(trainer, pl_module)
            shown = "".join(f", {name} {float(value):.4g}" for name, value in values.items())
            self._say(f"training  {seen:,} of {total:,} batches{shown}")

    def _say(self, text: str) -> None:
        """Print a line above the bar, or once for all processes where there is no bar."""
        if self.is_enabled:
            self.print(text)
        elif self.trainer.is_global_zero:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the logged values without the version number of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics  # type: ignore[return-value]


def duration(seconds: float) -> str:
    """Return a duration in words, in the unit that gives one to three digits.

    >>> [duration(s) for s in (0.2, 89, 90, 3 * 3600, 111_600, 10 * 86400)]
    ['1 s', '89 s', '2 min', '3 h', '31 h', '10 days']
    """
    for unit, size, most in (("s", 1, 90), ("min", 60, 120), ("h", 3600, 72)):
        if seconds < most * size:
            return f"{max(1, round(seconds / size))} {unit}"
    return f"{round(seconds / 86400)} days"
