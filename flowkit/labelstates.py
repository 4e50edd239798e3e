"""Between labels and the states that a joint flow moves: a codec, and for masks an autoencoder."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.autoencoders import Autoencoder
from flowkit.checks import as_labels, expand_like
from flowkit.codecs import Codec
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.types import Batch, Cond

Seeds = Sequence[int] | Tensor | None
# Makes a sample's seed another one for its label. It is in the low bits, since torch's generator on
# the CPU reads the first 32 alone.
LABEL_STREAM = 0x9E3779B9


class Classification(NamedTuple):
    """``probabilities (B, K)``, and ``uncertainty (B,)``: one minus the largest of them."""

    probabilities: Tensor
    uncertainty: Tensor


class Segmentation(NamedTuple):
    """``mask (B, H, W)`` of labels, and ``confidence (B, H, W)``: their probability."""

    mask: Tensor
    confidence: Tensor


class LabelledImages(NamedTuple):
    """Generated ``images (B, C, *)`` and their ``labels``, ``(B,)`` or ``(B, H, W)``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class LabelStates:
    """States of class labels ``(B,)`` are codes ``(B, K)``; those of masks are latents of codes.

    Args:
        codec: Between labels and codes.
        autoencoder: Between masks' codes, being images, and latents.

    >>> from flowkit.autoencoders import Identity
    >>> from flowkit.codecs import OneHot
    >>> states = LabelStates(OneHot(3), Identity())
    >>> states.labels(states.encode(torch.tensor([2, 0])))
    tensor([2, 0])
    """

    codec: Codec
    autoencoder: Autoencoder

    def __post_init__(self):
        if not isinstance(self.codec, Codec):
            raise TypeError(
                "codec must be one such as flowkit.codecs.OneHot, got "
                f"{self.codec!r}; in a configuration choose it by codec@module.codec=one_hot"
            )

    def latents(self, images: Tensor) -> Tensor:
        """Latents of images that are to be known: the posterior's mean, if there is a posterior."""
        posterior = getattr(self.autoencoder, "posterior", None)
        return self.autoencoder.encode(images) if posterior is None else posterior(images).mean

    def known(self, images: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
        """`latents` ``(B, *shape)``, of the device and type of another tensor.

        Raises:
            TypeError: If images are no floating-point tensor.
            ValueError: If there are none, or their latents have another shape.
        """
        if not (isinstance(images, Tensor) and images.is_floating_point()):
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor in [-1, 1], got {got}")
        if images.numel() == 0:
            raise ValueError(f"images must hold at least one, got shape {tuple(images.shape)}")
        x = self.latents(images.to(like))
        if x.shape[1:] != tuple(shape):
            raise ValueError(
                f"images must have states of shape {tuple(shape)} as in training, got "
                f"{tuple(x.shape[1:])} of images {tuple(images.shape[1:])}"
            )
        return x

    def encode(
        self,
        labels: Tensor,
        *,
        dequantise: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """States of labels ``(B,)`` or masks ``(B, H, W)``."""
        code = self.codec.encode(labels)
        if dequantise:
            code = self.codec.dequantise(code, generator)
        return code if code.ndim == 2 else self.latents(code)

    def code(self, states: Tensor) -> Tensor:
        """Codes ``(B, channels, *)`` of states."""
        return states if states.ndim == 2 else self.autoencoder.decode(states)

    def labels(self, states: Tensor) -> Tensor:
        """The labels nearest to states."""
        return self.codec.decode(self.code(states))

    def posterior(self, draws: Iterable[Tensor]) -> Tensor:
        """Probabilities ``(B, num_classes, *)`` of the mean of several states each.

        Codes are averaged where their mean determines the probabilities: a code with noise on it
        is clipped to probabilities, and a mean of clipped ones stays below 1 however many they are.
        """
        codes = (self.code(states) for states in draws)
        if self.codec.mean_is_posterior:
            return self.codec.posterior(_mean(codes))
        return _mean(self.codec.posterior(code) for code in codes)

    def condition(
        self, labels: Cond, shape: Sequence[int], may_hide: bool = True
    ) -> tuple[Tensor, Tensor]:
        """States ``(B, *shape)`` of labels, and whether a sample has none, ``(B,)``.

        Samples without a label, all of whose labels are ``num_classes``, have zeros. Without any
        labels ``B`` is 1.

        Raises:
            TypeError: If labels are no tensor.
            ValueError: If they are not the codec's, their states have another shape, or samples
                have none and may not.
        """
        missing = "cond must hold labels for a module trained without label_dropout, got "
        if labels is None and not may_hide:
            raise ValueError(f"{missing}none")
        if labels is None:
            return torch.zeros(1, *shape), torch.ones(1, dtype=torch.bool)
        if not isinstance(labels, Tensor):
            raise TypeError(f"cond must be a tensor of labels, got {type(labels).__name__}")
        labels = as_labels(labels, "labels")
        hidden = (labels == self.codec.num_classes).reshape(len(labels), -1).all(1)
        if not may_hide and bool(hidden.any()):
            raise ValueError(f"{missing}{int(hidden.sum())} samples without")
        y = self.encode(labels.where(~expand_like(hidden, labels), 0))
        if y.shape[1:] != tuple(shape):
            raise ValueError(
                f"cond must be labels whose codes have shape {tuple(shape)} as in training, got "
                f"{tuple(y.shape[1:])} of labels {tuple(labels.shape)}; masks need the images' size"
            )
        return y * ~expand_like(hidden, y), hidden

    def weight(
        self, labels: Tensor, states: Tensor, class_weights: Sequence[float] | None = None
    ) -> Tensor | None:
        """Weights of states in a loss, broadcastable to them; None if all are 1.

        Those of their classes, and 0 where labels are ignored. A latent cell's is the mean of its
        pixels'.
        """
        counted = self.codec.counted(labels)
        if class_weights is None and counted is None:
            return None
        weight = torch.ones_like(labels, dtype=states.dtype) if counted is None else counted
        if class_weights is not None:
            known = labels.long() if counted is None else labels.where(counted, 0)
            weight = weight * torch.tensor(class_weights).to(states)[known]
        if labels.ndim == 1:
            return weight.to(states)[:, None]
        size = (states.shape[2], states.shape[3])
        return F.adaptive_avg_pool2d(weight.to(states)[:, None], size)


def check_labelled(batch: Batch) -> Tensor:
    """Return the labels of a batch: one per image, or masks of the images' size.

    Masks of cached latents may be of any size; what they are encoded to must be the latents'.

    Raises:
        TypeError: If there are none.
        ValueError: If they do not fit the images, or the batch holds segments of a flow.
    """
    labels, images = batch.get("cond"), batch["x1"]
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"cond must be a tensor of labels, got {type(labels).__name__}; give images with "
            "classes or masks"
        )
    cached = "encoded_by" in batch  # latents, smaller than the masks of their images
    masks = (len(images), *(labels.shape[1:] if cached and labels.ndim == 3 else images.shape[2:]))
    if labels.shape not in ((len(images),), masks):
        raise ValueError(
            "cond must hold a label per image or masks of the images' size "
            f"{tuple(images.shape[2:])}, got shape {tuple(labels.shape)}"
        )
    if "t0" in batch or "t1" in batch:
        raise ValueError("batch must hold whole pairs for a joint flow, got segments (t0, t1)")
    return labels


def checked_class_weights(weights: Sequence[float] | None, num_classes: int) -> list[float] | None:
    """Return weights of classes, one each, not negative and not all 0; None for None."""
    if weights is None:
        return None
    if len(weights) != num_classes:
        raise ValueError(
            f"class_weights must hold {num_classes} weights, one per class, got {len(weights)}"
        )
    numbers = [float(w) for w in weights]
    if not (all(0 <= w < math.inf for w in numbers) and any(numbers)):
        raise ValueError(f"class_weights must be finite, at least 0 and not all 0, got {numbers}")
    return numbers


def checked_scale(guidance: object, label_dropout: float) -> float:
    """Return a scale of guidance that is to be a number; None is 1, which is none.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite, or asks a model that never trained without its labels.
    """
    if guidance is None:
        return 1.0
    if not isinstance(guidance, int | float):
        got = "a function" if callable(guidance) else repr(guidance)
        raise TypeError(f"guidance must be a number here, got {got}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if guidance != 1 and label_dropout == 0:
        raise ValueError(
            "guidance must be null or 1 for a model that never trained without its labels, "
            f"got {guidance}; train it with module.label_dropout=0.1"
        )
    return float(guidance)


def check_no_zero_code(codec: Codec) -> None:
    """Require codes that zeros, which stand for no label where one time cannot, are none of."""
    table = getattr(codec, "table", None)
    if table is not None and bool((zeros := (table == 0).all(1)).any()):
        raise ValueError(
            "label_dropout must be 0 in symmetric mode for a codec with zeros as a code, which "
            f"stand for no label, got class {int(zeros.nonzero()[0])} of {codec}"
        )


def count_of(labels: Tensor) -> int:
    """The number of samples that labels are of."""
    if not (isinstance(labels, Tensor) and labels.ndim):
        raise TypeError(f"labels must be a tensor (B,) or (B, H, W), got {labels!r}")
    return len(labels)


def check_sizes(
    y0: Tensor, x1: Tensor, labels: Tensor, known: tuple[int, ...] | None = None
) -> None:
    """Require states of labels of one shape, and of masks of the images', or latents', size."""
    if known not in (None, tuple(y0.shape[1:])):
        raise ValueError(
            f"cond must be labels whose states have shape {known} as before, got "
            f"{tuple(y0.shape[1:])} of labels {tuple(labels.shape)}"
        )
    if y0.ndim > 2 and y0.shape[2:] != x1.shape[2:]:
        raise ValueError(
            f"cond must be masks whose states have the latents' size {tuple(x1.shape[2:])}, "
            f"got {tuple(y0.shape[2:])} of masks {tuple(labels.shape)}"
        )


def check_region(region: Tensor, images: Tensor) -> None:
    """Require a place for every pixel of images ``(B, C, H, W)``."""
    expected = (len(images), *images.shape[2:])
    if not isinstance(region, Tensor) or region.shape != expected:
        got = tuple(region.shape) if isinstance(region, Tensor) else repr(region)
        raise ValueError(f"region must have shape {expected}, a place for every pixel, got {got}")


def label_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    draws: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise ``(B, draws, *shape)`` of labels, independent of that of images with the same seeds."""
    return seeded_noise((draws, *shape), [seed ^ LABEL_STREAM for seed in seeds], device)


def warn_of_more_steps(sampler: ODESampler) -> None:
    """Warn of labels of one joint time in anything but one Euler step, their exact expectation."""
    if len(sampler.times) > 2 or sampler.method != "euler":
        warnings.warn(
            "labels in several steps of symmetric mode may be worse than in one Euler step, which "
            "is their exact expectation; use ODESampler(1), or times='two-time'",
            stacklevel=4,
        )


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


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    """The mean of tensors, of which one is held at a time."""
    tensors = iter(tensors)
    total, count = next(tensors).clone(), 1
    for x in tensors:
        total, count = total.add_(x), count + 1
    return total / count
