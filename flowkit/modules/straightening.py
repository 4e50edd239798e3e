"""Straightening: a student learns to reach the samples of a teacher in fewer steps."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowkit.autoencoders import Autoencoder, Identity
from flowkit.boss import segments
from flowkit.checks import check_at_least
from flowkit.losses import flow_matching_loss
from flowkit.modules.checkpoints import load_run
from flowkit.modules.flow import FlowModule, Guidance
from flowkit.modules.resume import ADAMW, MakeOptimizer, MakeScheduler
from flowkit.nn.lora import add_lora, merge_lora
from flowkit.times import Device, Times, Uniform
from flowkit.types import Batch
from flowkit.velocity import Velocity


class Straightening(FlowModule, frozen=("teacher",)):
    """BOSS fine-tuning or reflow: regression of the chords of a teacher's trajectories.

    A batch of segments holds ``t0`` and ``t1``. The velocity at the start of a segment learns the
    chord

        v(x0, t0) ≈ (x1 − x0) / (t1 − t0).

    Euler steps on the grid of the segments then follow the teacher. A batch of pairs of source and
    sample holds no times. The velocity learns ``x1 − x0`` at random times on the straight line from
    ``x0`` to ``x1``: this is reflow.

    Pairs and segments come from ``flowkit pairs`` (``data=pairs``). For other batches the teacher
    computes them in each training step, from the source samples of the batch, or from noise, and
    from its conditions. This takes ``fine_steps`` evaluations of the teacher per step.

    Student and teacher start from the averaged weights of a run. The teacher may use guidance; the
    student then needs no guidance.

    Sources: Nguyen et al., *Bellman Optimal Step-size Straightening of Flow-Matching Models*, 2024
    (arXiv 2312.16414); Liu et al., *Flow Straight and Fast*, 2022 (arXiv 2209.03003),
    for reflow.

    Args:
        velocity: The student. It has the architecture of the network of the run.
        start: The run folder of the initial weights and the teacher. None keeps the weights of the
            student, and all batches must be pairs or segments.
        grid: Times of the segments, or their number; None means pairs from t = 0 to t = 1.
        fine_steps: Euler steps of the teacher from t = 0 to t = 1, at least 1.
        guidance: Guidance of the teacher, see `FlowModule.guided`.
        lora_rank: Rank of the LoRA adapters that are trained instead of the weights; 0 trains the
            weights.
        times: The distribution of training times for pairs.
        autoencoder: Decodes samples.
        optimizer: Creates the optimizer from parameters.
        lr_scheduler: Creates a learning-rate scheduler, called after every training step.

    Raises:
        ValueError: If ``lora_rank`` or ``fine_steps`` is out of range.

    >>> from flowkit.exact import GaussianFlow
    >>> flow, module = GaussianFlow(2.0, 0.5), Straightening(GaussianFlow(2.0, 0.5))
    >>> batch = segments(flow, torch.randn(8, 2), 100, grid=4)
    >>> module.loss(batch)["explained"] < 1
    tensor(True)
    """

    def __init__(
        self,
        velocity: Velocity,
        start: str | Path | None = None,
        grid: Tensor | int | None = None,
        fine_steps: int = 100,
        guidance: Guidance = None,
        lora_rank: int = 0,
        times: Times = Uniform(),
        autoencoder: Autoencoder = Identity(),
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(velocity, autoencoder, None, optimizer, lr_scheduler)
        check_at_least(lora_rank, 0, "lora_rank")
        check_at_least(fine_steps, 1, "fine_steps")
        if lora_rank:
            add_lora(cast(nn.Module, velocity), lora_rank)
        self.start, self.grid, self.fine_steps = start, grid, fine_steps
        self.guidance, self.times, self.teacher = guidance, times, None

    teacher: FlowModule | None

    def take_start(self, place: str | Path) -> None:
        """Load the averaged weights of the run, which becomes the teacher."""
        self.begin(self._load_teacher(place))

    def _load_teacher(self, place: str | Path) -> FlowModule:
        """Load a run, in the type of numbers of the trainer, which has converted the student."""
        teacher = load_run(place)
        if self._trainer is not None:
            cast(Any, self._trainer).precision_plugin.convert_module(teacher)
        return teacher

    def begin(self, teacher: FlowModule) -> None:
        """Set the teacher, and copy its weights to the student.

        Args:
            teacher: The module of a run.

        Raises:
            ValueError: If the velocity of the teacher is not its network, or the network of the
                student has other parameters.
        """
        if teacher.guided(None) is not teacher.velocity:
            raise ValueError(
                "start must be a run whose network is the velocity of its states, got "
                f"{type(teacher).__name__}"
            )
        taught = isinstance(teacher, Straightening)
        source = teacher.merged() if taught else cast(nn.Module, teacher.velocity)
        student, given = cast(nn.Module, self.velocity), source.state_dict()
        own = student.state_dict()
        taken = {k: own[k] if "lora_" in k else given.get(_plain(k)) for k in own}
        wrong = {_plain(k) for k, v in taken.items() if v is None or v.shape != own[k].shape}
        wrong |= set(given) - set(map(_plain, own))
        if wrong:
            raise ValueError(
                f"velocity must be the network of the run {self.start}, got other parameters in "
                f"{', '.join(sorted(wrong)[:3])}"
            )
        student.load_state_dict(cast(dict[str, Tensor], taken))
        self.sample_shape = teacher.sample_shape
        self.teacher = teacher.to(self.device)

    def merged(self) -> nn.Module:
        """Return a copy of the student whose LoRA adapters are added to its weights."""
        return merge_lora(cast(nn.Module, self.velocity))

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Compute the regression loss of a batch.

        Args:
            batch: Pairs or segments; with a teacher, any batch.
            generator: Draws noise and times; None means the global generator.

        Returns:
            ``loss`` and ``explained``, the share of the energy of the chords that the velocity
            explains.

        Raises:
            RuntimeError: If the batch has no ``x0`` and there is no teacher. Only a trainer has
                the teacher of a resumed student loaded: ``start`` may be a name that others chose.
            ValueError: If latents have another autoencoder.
        """
        made = "taught_by" in batch or "t0" in batch
        if not made and self.teacher is None and self.start is not None and self._in_a_trainer():
            with torch.random.fork_rng(devices=[]):  # the draws of a step do not depend on this
                self.teacher = self._load_teacher(self.start).to(self.device)
        if self.teacher is not None and not made:
            batch = self._teach(self.teacher, batch, generator)
        elif "x0" in batch:
            ours = getattr(self.autoencoder, "hash", None)
            batch = self.encode(cast(Batch, {"encoded_by": ours, **batch}))  # states stay as is
        else:
            raise RuntimeError(
                "batch must hold x0 where there is no teacher, got none; train from a run as "
                "start, or on data=pairs"
            )
        times = _at_start if "t0" in batch else self.times
        return flow_matching_loss(self.velocity, batch, times=times, generator=generator)

    def _in_a_trainer(self) -> bool:
        """Say whether a trainer is at work on this module: training, or validating."""
        trainer = cast(Any, self._trainer)
        return trainer is not None and (trainer.training or trainer.evaluating)

    def _teach(self, teacher: FlowModule, batch: Batch, generator: torch.Generator | None) -> Batch:
        """Compute segments or pairs with the teacher, from source samples or new noise."""
        x0 = batch.get("x0")
        if x0 is None:
            size = (len(batch["x1"]), *cast(tuple, teacher.sample_shape))
            x0 = torch.randn(size, device=self.device, generator=generator)
        x0 = teacher.as_state(x0)
        velocity, grid = teacher.guided(self.guidance), 1 if self.grid is None else self.grid
        made = segments(velocity, x0, self.fine_steps, grid, batch.get("cond"))
        if self.grid is None:
            made = cast(Batch, {k: v for k, v in made.items() if k not in ("t0", "t1")})
        states = {end: self.as_state(cast(Any, made)[end]) for end in ("x0", "x1")}
        return cast(Batch, made | states)


def _at_start(
    batch: int, device: Device = None, generator: torch.Generator | None = None
) -> Tensor:
    """Return the times 0: the start of each segment."""
    return torch.zeros(batch, device=device)


def _plain(name: str) -> str:
    """Return the name of a parameter in a network without adapters."""
    return name.replace("base_layer.", "")
