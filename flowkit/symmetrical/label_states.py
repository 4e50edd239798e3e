"""Between labels and the states that a joint flow moves: a codec, and for masks an autoencoder."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.autoencoders import Autoencoder, mean_latents
from flowkit.checks import as_labels, expand_like
from flowkit.sampling import seeded_noise
from flowkit.symmetrical.codecs import Codec
from flowkit.types import Cond

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


class LabeledImages(NamedTuple):
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
    >>> from flowkit.symmetrical.codecs import OneHot
    >>> states = LabelStates(OneHot(3), Identity())
    >>> states.labels(states.encode(torch.tensor([2, 0])))
    tensor([2, 0])
    """

    codec: Codec
    autoencoder: Autoencoder

    def __post_init__(self):
        if not isinstance(self.codec, Codec):
            raise TypeError(
                "codec must be one such as flowkit.symmetrical.codecs.OneHot, got "
                f"{self.codec!r}; in a configuration choose it by codec@module.codec=one_hot"
            )

    def latents(self, images: Tensor) -> Tensor:
        """Latents of images that are to be known, see `flowkit.autoencoders.mean_latents`."""
        return mean_latents(self.autoencoder, images)

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
        dequantize: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """States of labels ``(B,)`` or masks ``(B, H, W)``."""
        code = self.codec.encode(labels)
        if dequantize:
            code = self.codec.dequantize(code, generator)
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


def label_noise(
    shape: Sequence[int],
    seeds: Sequence[int],
    draws: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise ``(B, draws, *shape)`` of labels, independent of that of images with the same seeds."""
    return seeded_noise((draws, *shape), [seed ^ LABEL_STREAM for seed in seeds], device)


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    """The mean of tensors, of which one is held at a time."""
    tensors = iter(tensors)
    total, count = next(tensors).clone(), 1
    for x in tensors:
        total, count = total.add_(x), count + 1
    return total / count
