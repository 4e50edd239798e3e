"""The superclass of all Lightning modules of flows: optimizer, sampling and checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from flowkit.autoencoders import (
    Autoencoder,
    FrozenAutoencoder,
    Identity,
    check_identity,
    identity,
)
from flowkit.checks import as_seeds, check_at_least
from flowkit.couplings import Independent
from flowkit.guidance import ClassifierFree, DropCond
from flowkit.modules.resume import ADAMW, ExactResume, MakeOptimizer, MakeScheduler
from flowkit.modules.sharing import Shared
from flowkit.paths import Interpolant
from flowkit.rules import did_you_mean
from flowkit.sampling import (
    ODESampler,
    Sampler,
    SDESampler,
    Solution,
    sample_seeds,
    seeded_noise,
)
from flowkit.sampling.ode import Callback
from flowkit.types import Batch, Cond, to_device
from flowkit.velocity import Velocity

Guidance = float | Callable[[Velocity], Velocity] | None


class FlowModule(Shared, ExactResume, frozen=("autoencoder",)):
    """A velocity, its optimizer and sampling from it. A method adds `loss`.

    A resumed run continues exactly as an uninterrupted run does, see
    `flowkit.modules.resume.ExactResume`. The callback `AveragedWeights` averages the weights.
    Checkpoints then hold the averaged weights, and validation and the samples of validation use
    the averaged weights.

    Args:
        velocity: The network.
        autoencoder: Maps data to states of the flow. `sample` ends with its ``decode``. An
            autoencoder that is a module is frozen, and moves to every device of this module.
        drop_cond: Drops conditions in training. Classifier-free guidance needs this.
        optimizer: Makes the optimizer from parameters, e.g.
            ``partial(torch.optim.AdamW, lr=1e-3)``.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.
    """

    autoencoder: Autoencoder

    sample_shape: tuple[int, ...] | None = None
    """Shape of one state, taken from the first batch passed to `loss`."""

    default_sampler: ODESampler = ODESampler(25, "heun")
    """Sampler of `sample` and `solve` if none is given."""

    class_names: list[str] | None = None
    """Names of the classes of a loaded module; None without classes, or if they have no names."""

    of_training: ClassVar[tuple[str, ...]] = ()
    """Parts that only the training uses, and that a shared model leaves out."""

    def __init__(
        self,
        velocity: Velocity,
        autoencoder: Autoencoder = Identity(),
        drop_cond: DropCond | None = None,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        if not callable(velocity):
            raise TypeError(
                f"velocity must be callable as velocity(x, t, cond), got {type(velocity).__name__}"
            )
        self.velocity, self.drop_cond, self.autoencoder = velocity, drop_cond, autoencoder

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)``, ``t (B,)``: the module is a velocity."""
        return self.velocity(x, t, cond)

    def encode(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """Return the batch with states of the flow as ``x1``.

        A KL autoencoder draws latents from its posterior. Cached latents stay as they are.

        Raises:
            ValueError: If cached latents come from another autoencoder, or if the shape of a state
                differs from the shape in earlier batches.
        """
        cached, ours = batch.get("encoded_by"), getattr(self.autoencoder, "hash", None)
        if cached is not None and cached != ours:
            raise ValueError(
                f"autoencoder must be the autoencoder of the cached latents, hash {cached}, "
                f"got {ours}"
            )
        x1 = batch["x1"]
        if cached is None and isinstance(self.autoencoder, FrozenAutoencoder):
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
        sampler: Sampler | None = None,
        cond: Cond | Sequence[str | int] = None,
        seeds: Sequence[int] | Tensor | None = None,
        guidance: Guidance = None,
    ) -> Tensor:
        """Draw data ``(num_samples, *)``: draw noise, solve, decode.

        Args:
            num_samples: Number of samples, at least 1.
            sampler: The solver; by default 25 Heun steps, or 4 Euler steps of a mean flow.
            cond: Conditions of the samples, ``(num_samples, *)``, or a list of the names
                or the labels of their classes.
            seeds: One seed per sample. The seed fixes the noise of its sample in any batch. With
                None, seeds are drawn, all different.
            guidance: The scale of classifier-free guidance, or any function that wraps the
                velocity.

        Returns:
            Data in the type of the network's weights.

        Raises:
            RuntimeError: If the module has seen no batch, so that the shape of a sample is unknown.
            ValueError: If the number of seeds or conditions is not ``num_samples``, or if a
                guidance scale is given for a module trained without dropped conditions.
        """
        check_at_least(num_samples, 1, "num_samples")
        if self.sample_shape is None:
            raise RuntimeError(
                "sample_shape must be known to sample, got None; train the module, load a "
                "trained one or set module.sample_shape"
            )
        seeds = drawn_seeds(num_samples) if seeds is None else as_seeds(seeds)
        cond = self.as_cond(cond)
        sizes = {"seeds": len(seeds), **_sizes(cond)}
        for name, size in sizes.items():
            if size != num_samples:
                raise ValueError(f"{name} must hold num_samples = {num_samples}, got {size}")
        noise = seeded_noise(self.sample_shape, seeds)
        return self.autoencoder.decode(self.solve(noise, sampler, cond, guidance).x)

    def solve(
        self,
        x0: Tensor,
        sampler: Sampler | None = None,
        cond: Cond | Sequence[str | int] = None,
        guidance: Guidance = None,
        *,
        return_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Carry given source samples ``x0 (B, *)`` along the flow, on the module's device.

        The states have the type of the network's weights, for example bfloat16. The solve runs in
        ``eval`` mode and without gradients. The result is a state of the flow, not decoded.
        Pictures, samples and evaluations all use this method. A method whose states hold more than
        the data, for example labels, overrides ``solve``: its ``x0`` and its result are then the
        data's part of a state. An `ODESampler` may get a ``callback``, see `ODESampler.solve`.
        """
        sampler = sampler or self.default_sampler
        if isinstance(sampler, SDESampler):
            sampler = self.with_score(sampler)
        field, cond = self.guided(guidance), self.as_cond(cond)
        told: dict[str, Any] = {} if callback is None else {"callback": callback}
        with evaluating(self):
            return sampler.solve(field, self.as_state(x0), cond, return_path=return_path, **told)

    def with_score(self, sampler: SDESampler) -> SDESampler:
        """Return a stochastic sampler with the path of this module.

        Raises:
            TypeError: If the score does not follow from the velocity of this module: it needs a
                path ``x_t = a x1 + b x0`` from noise ``x0`` that is independent of ``x1``.
        """
        path, coupling = getattr(self, "path", None), getattr(self, "coupling", None)
        if not (isinstance(path, Interpolant) and isinstance(coupling, Independent)):
            raise TypeError(
                "sampler must be an ODESampler (such as sampler=heun) for a flow that was not "
                "trained on independent noise, got SDESampler; its score does not follow from its "
                f"velocity ({type(self).__name__}, {type(coupling).__name__} coupling)"
            )
        return replace(sampler, path=path)

    def as_state(self, x: Tensor) -> Tensor:
        """Return states ``(B, *)`` on the device and in the type of the network's weights.

        A velocity without weights, such as a closed form, takes states of any type.
        """
        weights = self.velocity.parameters() if isinstance(self.velocity, nn.Module) else ()
        like = next((p for p in weights if p.is_floating_point()), x)
        return x.to(self.device, like.dtype)

    def as_cond(self, cond: Cond | Sequence[str | int]) -> Cond:
        """Return a condition on the device of the module, of a list of classes their labels.

        Raises:
            TypeError: If ``cond`` is neither tensors, nor a list of names or of labels.
            ValueError: If the module has no class of a name.
        """
        if not isinstance(cond, Tensor | Mapping | None):
            cond = torch.tensor(_labels(cond, self.class_names or []))
        return to_device(cond, self.device)

    def guided(self, guidance: Guidance) -> Velocity:
        """Return the module's velocity under guidance; see `sample`.

        Raises:
            TypeError: If guidance is neither a number nor a function.
            ValueError: If a scale other than 1 is given for a module trained without dropped
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
        """Store the shape of a state and the identity of the autoencoder."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["flowkit"] |= {
            "sample_shape": None if self.sample_shape is None else list(self.sample_shape),
            "autoencoder": identity(self.autoencoder),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the shape of a state, and refuse another autoencoder."""
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint["flowkit"]
        check_identity(stored["autoencoder"], self.autoencoder, "the flow")
        shape = stored["sample_shape"]
        self.sample_shape = None if shape is None else tuple(shape)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to ``eval`` mode without gradients, and restore its mode at the end."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def labels_of(batch: Batch, num_classes: int | None) -> Tensor | None:
    """Return the class labels ``(B,)`` of a batch, or None for a batch without class labels.

    >>> labels_of({"x1": torch.zeros(2, 1), "cond": torch.tensor([0, 1])}, num_classes=2)
    tensor([0, 1])
    """
    cond = batch.get("cond")
    is_label = num_classes is not None and isinstance(cond, Tensor) and cond.ndim == 1
    return cast(Tensor, cond) if is_label else None


def brings_start(batch: Batch, data: Any) -> bool:
    """Return True if a sample starts from given source samples, or from conditions but not labels.

    All other flows start from noise and labels, which need no data.

    Args:
        batch: A batch of the data.
        data: The data module. Its ``num_classes`` and ``x0_is_noise`` are read if they exist.

    >>> brings_start({"x1": torch.zeros(2, 1), "cond": torch.tensor([[0.5], [0.7]])}, None)
    True
    """
    if "x0" in batch and not getattr(data, "x0_is_noise", False):
        return True
    labels = labels_of(batch, getattr(data, "num_classes", None))
    return batch.get("cond") is not None and labels is None


def _labels(classes: Sequence[str | int], known: list[str]) -> list[int]:
    """Return the labels of a list of classes: their places among ``known``, or labels as given."""
    listed = isinstance(classes, list | tuple) and len(classes) > 0
    if listed and all(isinstance(one, Integral) and type(one) is not bool for one in classes):
        return [int(one) for one in classes]
    if not (listed and all(isinstance(one, str) for one in classes)):
        kinds = sorted({type(one).__name__ for one in classes}) if listed else ["nothing"]
        got = (
            f"a list of {' and '.join(kinds)}"
            if isinstance(classes, list | tuple)
            else repr(classes)
        )
        fix = f"; write [{classes!r}]" if isinstance(classes, str | int) else ""
        raise TypeError(
            "cond must be a tensor, tensors by name, a list of names of classes or a list of "
            f"labels, got {got}{fix}"
        )
    for name in cast(Any, classes):
        if name not in known:
            fix = f"; classes are {', '.join(known[:20])}" if known else ""
            raise ValueError(
                f"cond must name classes of the module, got {name}{did_you_mean(name, known, fix)}"
            )
    return [known.index(name) for name in cast(Any, classes)]


def _sizes(cond: Cond) -> dict[str, int]:
    """Return the number of rows of each condition, by its name in error messages."""
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"cond": len(cond)}
    return {f"cond[{name!r}]": len(value) for name, value in cast(Any, cond).items()}


Seeds = Sequence[int] | Tensor | None


def seeds_of(seeds: Seeds, count: int) -> list[int]:
    """Return one seed per sample; by default 0, 1, ..., ``count - 1``.

    Raises:
        TypeError: If ``seeds`` is no sequence of integers.
        ValueError: If the number of seeds is not ``count``.
    """
    return list(range(count)) if seeds is None else as_seeds(seeds, count)


def seeds_or_drawn(seeds: Seeds, count: int) -> list[int]:
    """Return one seed per sample; by default drawn from torch's global generator."""
    return seeds_of(drawn_seeds(count) if seeds is None else seeds, count)


def drawn_seeds(count: int) -> range:
    """Return seeds of samples whose run's seed is drawn from torch's global generator."""
    return sample_seeds(int(torch.randint(2**31, ())), 0, count)


def known_shape(shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return a shape that a module takes from its first batch.

    Raises:
        RuntimeError: If the module has seen no batch.
    """
    if shape is None:
        raise RuntimeError(
            "label_shape and sample_shape must be known, got None; train the module, load a "
            "trained one or set both"
        )
    return shape
