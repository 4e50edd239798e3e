"""What every flow-matching method shares as a Lightning module; nothing of a method itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowkit.autoencoders import (
    Autoencoder,
    Identity,
    KLAutoencoder,
    check_identity,
    identity,
)
from flowkit.checks import check_at_least
from flowkit.guidance import ClassifierFree, DropCond
from flowkit.modules.resume import ADAMW, ExactResume, MakeOptimizer, MakeScheduler
from flowkit.sampling import ODESampler, Solution, seeded_noise
from flowkit.types import Batch, Cond, to_device
from flowkit.velocity import Velocity

Guidance = float | Callable[[Velocity], Velocity] | None


class FlowModule(ExactResume, frozen=("autoencoder",)):
    """A velocity, its optimizer and sampling from it. A method adds `loss`.

    A resumed run goes on exactly as an uninterrupted one, see
    `flowkit.modules.resume.ExactResume`.
    Weights are averaged by Lightning's ``EMAWeightAveraging`` callback: checkpoints then hold the
    averaged weights, and validation and samples made during it use them.

    Args:
        velocity: The network.
        autoencoder: Maps data to what the flow runs on; its `decode` ends `sample`. It is
            frozen if it is a module, and follows this one from device to device.
        drop_cond: Conditions dropped in training; guidance needs them.
        optimizer: Makes the optimizer from parameters, e.g.
            ``partial(torch.optim.AdamW, lr=1e-3)``.
        lr_scheduler: Makes a learning-rate scheduler, stepped every training step.
    """

    autoencoder: Autoencoder

    sample_shape: tuple[int, ...] | None = None
    """Shape of one state, learnt from the first batch passed to `loss`."""

    weights: Mapping[str, Any] | None = None
    """Which weights a run was loaded with: their ``kind``, averaged or raw, and ``step``."""

    def __init__(
        self,
        velocity: Velocity,
        autoencoder: Autoencoder = Identity(),
        drop_cond: DropCond | None = None,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ):
        super().__init__(optimizer, lr_scheduler)
        if not callable(velocity):
            raise TypeError(
                f"velocity must be callable as velocity(x, t, cond), got {type(velocity).__name__}"
            )
        self.velocity, self.drop_cond, self.autoencoder = velocity, drop_cond, autoencoder

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, *)`` at ``x (B, *)``, ``t (B,)``: a module is itself a velocity."""
        return self.velocity(x, t, cond)

    def encode(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """Return the batch with states of the flow: latents are drawn, cached ones are kept.

        Raises:
            ValueError: If cached latents are of another autoencoder, or states change their shape.
        """
        cached, ours = batch.get("encoded_by"), getattr(self.autoencoder, "hash", None)
        if cached is not None and cached != ours:
            raise ValueError(
                "autoencoder must be the one that the latents were encoded by, hash "
                f"{cached}, got {ours}"
            )
        x1 = batch["x1"]
        if cached is None and isinstance(self.autoencoder, KLAutoencoder):
            x1 = self.autoencoder.encode(x1, generator)
        elif cached is None:
            x1 = self.autoencoder.encode(x1)
        shape = tuple(x1.shape[1:])
        if self.sample_shape is None:
            self.sample_shape = shape
        if shape != self.sample_shape:
            raise ValueError(
                f"x1 must be encoded to shape (B, {', '.join(map(str, self.sample_shape))}) as in "
                f"earlier batches, got {tuple(x1.shape)}"
            )
        return cast(Batch, {**batch, "x1": x1})

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        sampler: ODESampler | None = None,
        cond: Cond = None,
        seeds: Sequence[int] | Tensor | None = None,
        guidance: Guidance = None,
    ) -> Tensor:
        """Draw data ``(num_samples, *)``: noise, solve, decode.

        Args:
            num_samples: How many.
            sampler: Default: 25 Heun steps.
            cond: Conditions of the samples, ``(num_samples, *)``.
            seeds: One per sample, fixing its noise whatever the batch; drawn when None.
            guidance: The scale of classifier-free guidance, or any function that wraps the
                velocity.

        Raises:
            RuntimeError: If no batch has been seen, so that a sample's shape is unknown.
            ValueError: If there are not ``num_samples`` seeds or conditions, or guidance is
                asked of a module trained without dropped conditions.
        """
        check_at_least(num_samples, 1, "num_samples")
        if self.sample_shape is None:
            raise RuntimeError(
                "sample_shape must be known to sample, got None; train the module, load a "
                "trained one or set module.sample_shape"
            )
        if seeds is None:
            seeds = torch.randint(2**62, (num_samples,))
        cond = to_device(cond, self.device)
        sizes = {"seeds": len(seeds), **_sizes(cond)}
        for name, size in sizes.items():
            if size != num_samples:
                raise ValueError(f"{name} must hold num_samples = {num_samples}, got {size}")
        noise = seeded_noise(self.sample_shape, seeds)
        return self.autoencoder.decode(self.solve(noise, sampler, cond, guidance).x)

    def solve(
        self,
        x0: Tensor,
        sampler: ODESampler | None = None,
        cond: Cond = None,
        guidance: Guidance = None,
        *,
        return_path: bool = False,
    ) -> Solution:
        """Carry given source samples ``x0 (B, *)`` along the flow, on the module's device.

        In ``eval`` mode and without gradients; the result is a state of the flow, not decoded.
        Pictures, samples and evaluations all come through here: a method whose flow holds more
        than the data (labels, say) overrides it, from and to the data's part of a state.
        """
        sampler = sampler or ODESampler(25, "heun")
        field, cond = self.guided(guidance), to_device(cond, self.device)
        with evaluating(self):
            return sampler.solve(field, x0.to(self.device), cond, return_path=return_path)

    def guided(self, guidance: Guidance) -> Velocity:
        """Return the module's velocity under guidance; see `sample`.

        Raises:
            TypeError: If guidance is neither a number nor a function.
            ValueError: If a scale other than 1 is asked of a module trained without dropped
                conditions.
        """
        if not (guidance is None or callable(guidance) or isinstance(guidance, int | float)):
            raise TypeError(
                f"guidance must be a number, a function of the velocity or None, got {guidance!r}"
            )
        if guidance is None or guidance == 1:
            return self.velocity
        if callable(guidance):
            return guidance(self.velocity)
        if self.drop_cond is None or self.drop_cond.prob == 0:
            raise ValueError(
                "guidance must be null or 1 for a model that never trained without its condition, "
                f"got {guidance}; train it on data with classes and module.drop_cond.prob=0.1"
            )
        return ClassifierFree(self.velocity, guidance, self.drop_cond.null)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what is not a weight."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["flowkit"] |= {
            "sample_shape": None if self.sample_shape is None else list(self.sample_shape),
            "autoencoder": identity(self.autoencoder),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it, refusing another autoencoder."""
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint["flowkit"]
        check_identity(stored["autoencoder"], self.autoencoder, "the flow")
        shape = stored["sample_shape"]
        self.sample_shape = None if shape is None else tuple(shape)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in ``eval`` mode, without gradients, and back."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def labels_of(batch: Batch, num_classes: int | None) -> Tensor | None:
    """Return the class labels ``(B,)`` of a batch; None if it has none, or other conditions.

    >>> labels_of({"x1": torch.zeros(2, 1), "cond": torch.tensor([0, 1])}, num_classes=2)
    tensor([0, 1])
    """
    cond = batch.get("cond")
    is_label = num_classes is not None and isinstance(cond, Tensor) and cond.ndim == 1
    return cast(Tensor, cond) if is_label else None


def brings_start(batch: Batch, data: Any) -> bool:
    """Whether samples start from what the data bring: source samples, or conditions but labels.

    All other flows start from noise and labels, for which no data are needed.

    Args:
        batch: A batch of the data.
        data: Their data module, of which ``num_classes`` and ``x0_is_noise`` are read, if there.

    >>> brings_start({"x1": torch.zeros(2, 1), "cond": torch.tensor([[0.5], [0.7]])}, None)
    True
    """
    if "x0" in batch and not getattr(data, "x0_is_noise", False):
        return True
    labels = labels_of(batch, getattr(data, "num_classes", None))
    return batch.get("cond") is not None and labels is None


def _sizes(cond: Cond) -> dict[str, int]:
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"cond": len(cond)}
    return {f"cond[{name!r}]": len(value) for name, value in cast(Any, cond).items()}


Seeds = Sequence[int] | Tensor | None


def seeds_of(seeds: Seeds, count: int) -> list[int]:
    """Return one seed per sample; by default 0, 1, ..."""
    if seeds is None:
        return list(range(count))
    if len(seeds) != count:
        raise ValueError(f"seeds must hold one seed per sample, {count}, got {len(seeds)}")
    return [int(seed) for seed in seeds]


def seeds_or_drawn(seeds: Seeds, count: int) -> list[int]:
    """Return one seed per sample; by default of torch's own generator."""
    return seeds_of(torch.randint(2**62, (count,)) if seeds is None else seeds, count)


def known_shape(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Require a shape that is learnt from a batch."""
    if shape is None:
        raise RuntimeError(
            "label_shape and sample_shape must be known, got None; train the module, load a "
            "trained one or set both"
        )
    return shape
