"""Straightening: a student whose few large steps end where the teacher's many end."""

from pathlib import Path
from typing import cast

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
    """Regress chords of a teacher's trajectories: BOSS fine-tuning, or reflow.

    In a batch of segments, with ``t0`` and ``t1``, the velocity at their start is the chord,

        v(x0, t0) ≈ (x1 − x0) / (t1 − t0),

    so that Euler's steps on the segments' grid follow the teacher. In a batch of pairs of source
    and sample, without times, it is the chord at random times between: reflow. Batches come from
    ``flowkit pairs`` (``data=pairs``). In other batches the teacher replaces the data as training
    goes by what it makes of their source samples, or of noise, and of their conditions, which
    takes its ``fine_steps`` evaluations each step.

    Student and teacher start from the averaged weights of a run. The teacher may be guided; the
    student is then trained to need no guidance.

    Sources: Nguyen et al., *Bellman Optimal Step-size Straightening of Flow-Matching Models*, 2024
    (arXiv 2312.16414); Liu et al., *Flow Straight and Fast*, 2022 (arXiv 2209.03003),
    for reflow.

    Args:
        velocity: The student, of the same architecture as the run's.
        start: The run folder that student and teacher start from; None leaves the student as it
            is, and needs batches from elsewhere.
        grid: Times of the segments that the teacher makes; None makes pairs.
        fine_steps: Euler steps of the teacher.
        guidance: The teacher's, see `FlowModule.guided`.
        lora_rank: Train adapters of this rank instead of the weights; 0 trains the weights.
        times: Training times of reflow.
        autoencoder: Decodes samples.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a scheduler, stepped every training step.

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
    ):
        super().__init__(velocity, autoencoder, None, optimizer, lr_scheduler)
        check_at_least(lora_rank, 0, "lora_rank")
        check_at_least(fine_steps, 1, "fine_steps")
        if lora_rank:
            add_lora(cast(nn.Module, velocity), lora_rank)
        self.start, self.grid, self.fine_steps = start, grid, fine_steps
        self.guidance, self.times, self.teacher = guidance, times, None

    teacher: FlowModule | None

    def setup(self, stage: str) -> None:
        """Take the run's averaged weights, before a checkpoint to resume from brings others."""
        if stage == "fit" and self.start is not None:
            self.begin(load_run(self.start))

    def begin(self, teacher: FlowModule) -> None:
        """Take the teacher and its weights.

        Raises:
            ValueError: If its flow is not that of its network alone, or the network another.
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
                f"velocity must be the network of the run {self.start}, got another in "
                f"{', '.join(sorted(wrong)[:3])}"
            )
        student.load_state_dict(cast(dict[str, Tensor], taken))
        self.sample_shape = teacher.sample_shape
        self.teacher = teacher.to(self.device)

    def merged(self) -> nn.Module:
        """Return a copy of the student with its adapters merged into the weights."""
        return merge_lora(cast(nn.Module, self.velocity))

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the regression loss of a batch and the share of energy explained.

        Raises:
            RuntimeError: If the batch has no ``x0`` and there is no teacher.
            ValueError: If latents are of another autoencoder.
        """
        made = "taught_by" in batch or "t0" in batch
        if self.teacher is not None and not made:
            batch = self._teach(self.teacher, batch, generator)
        elif "x0" in batch:
            ours = getattr(self.autoencoder, "hash", None)
            batch = self.encode(cast(Batch, {"encoded_by": ours, **batch}))  # states as they are
        else:
            raise RuntimeError(
                "start must be a run, whose velocity teaches, for batches without x0, got None; "
                "or train on data=pairs"
            )
        times = _at_start if "t0" in batch else self.times
        return flow_matching_loss(self.velocity, batch, times=times, generator=generator)

    def _teach(self, teacher: FlowModule, batch: Batch, generator: torch.Generator | None) -> Batch:
        """Segments, or pairs, from the batch's source samples or fresh noise."""
        x0 = batch.get("x0")
        if x0 is None:
            size = (len(batch["x1"]), *cast(tuple, teacher.sample_shape))
            x0 = torch.randn(size, device=self.device, generator=generator)
        velocity, grid = teacher.guided(self.guidance), 1 if self.grid is None else self.grid
        made = segments(velocity, x0, self.fine_steps, grid, batch.get("cond"))
        if self.grid is None:
            made = cast(Batch, {k: v for k, v in made.items() if k not in ("t0", "t1")})
        return made


def _at_start(
    batch: int, device: Device = None, generator: torch.Generator | None = None
) -> Tensor:
    return torch.zeros(batch, device=device)


def _plain(name: str) -> str:
    """A parameter's name in a network without adapters."""
    return name.replace("base_layer.", "")
