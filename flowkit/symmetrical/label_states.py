"""Conversion of labels to the states of a joint flow, by a codec and, for masks, an autoencoder."""

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

# The seed of a sample, combined with this number, is the seed of its label. The number lies in the
# low bits, since torch's generator on the CPU reads only the first 32 bits.
LABEL_STREAM = 0x9E3779B9


class Classification(NamedTuple):
    """The result of a classification: probabilities and uncertainties of images."""

    probabilities: Tensor
    """Class probabilities ``(B, K)``."""
    uncertainty: Tensor
    """One minus the largest probability, ``(B,)``."""


class Segmentation(NamedTuple):
    """The result of a segmentation: the most probable labels of pixels, and their probability."""

    mask: Tensor
    """Labels ``(B, H, W)``."""
    confidence: Tensor
    """Probabilities ``(B, H, W)`` of these labels."""


class LabeledImages(NamedTuple):
    """Generated pairs of images and labels."""

    images: Tensor
    """Images ``(B, C, *)``."""
    labels: Tensor
    """Labels: classes ``(B,)`` or masks ``(B, H, W)``."""


@dataclass(frozen=True, eq=False)
class LabelStates:
    """Conversion between labels and the states that a joint flow moves.

    The states of classes ``(B,)`` are codes ``(B, K)``. The states of masks ``(B, H, W)`` are the
    latents of their codes, which the autoencoder takes as images.

    Args:
        codec: Translates labels to codes and back.
        autoencoder: Translates the codes of masks to latents and back.

    Raises:
        TypeError: If ``codec`` is not a `Codec`.

    >>> from flowkit.autoencoders import Identity
    >>> from flowkit.symmetrical import OneHot
    >>> states = LabelStates(OneHot(3), Identity())
    >>> states.labels(states.encode(torch.tensor([2, 0])))
    tensor([2, 0])
    """

    codec: Codec
    autoencoder: Autoencoder

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec):
            raise TypeError(
                "codec must be a Codec such as flowkit.symmetrical.OneHot, got "
                f"{self.codec!r}; in a configuration choose it by codec@module.codec=one_hot"
            )

    def latents(self, images: Tensor) -> Tensor:
        """Encode images without drawing noise, see `flowkit.autoencoders.mean_latents`."""
        return mean_latents(self.autoencoder, images)

    def known(self, images: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
        """Encode given images, and check the shape of their latents.

        Args:
            images: Images ``(B, C, *)`` in [-1, 1].
            shape: Shape of one latent in training.
            like: A tensor whose device and type the images take.

        Returns:
            The latents ``(B, *shape)``.

        Raises:
            TypeError: If ``images`` is not a floating-point tensor.
            ValueError: If there is no image, or the latents have another shape.
        """
        if not (isinstance(images, Tensor) and images.is_floating_point()):
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating-point tensor in [-1, 1], got {got}")
        if images.numel() == 0:
            raise ValueError(
                f"images must hold at least one image, got shape {tuple(images.shape)}"
            )
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
        """Encode classes ``(B,)`` or masks ``(B, H, W)`` to states.

        Args:
            labels: Integer labels.
            dequantize: True to add noise to the codes.
            generator: Draws the noise.

        Raises:
            TypeError: If the labels are not integers.
            ValueError: If a label is not one of the codec's.
        """
        code = self.codec.encode(labels)
        if dequantize:
            code = self.codec.dequantize(code, generator)
        return code if code.ndim == 2 else self.latents(code)

    def code(self, states: Tensor) -> Tensor:
        """Decode states to codes ``(B, channels, *)``."""
        return states if states.ndim == 2 else self.autoencoder.decode(states)

    def labels(self, states: Tensor) -> Tensor:
        """Return the labels ``(B,)`` or ``(B, H, W)`` whose codes are nearest to states."""
        return self.codec.decode(self.code(states))

    def posterior(self, draws: Iterable[Tensor]) -> Tensor:
        """Return the probabilities ``(B, num_classes, *)`` of labels, averaged over draws.

        If the codec has ``mean_is_posterior``, the codes are averaged first. Otherwise their
        probabilities are averaged. Averaging the codes first matters: the probabilities of a noisy
        code are clipped to [0, 1], and the mean of clipped values stays below 1 for any number of
        draws.

        Args:
            draws: States of the same labels, one batch per draw; at least one.
        """
        codes = (self.code(states) for states in draws)
        if self.codec.mean_is_posterior:
            return self.codec.posterior(_mean(codes))
        return _mean(self.codec.posterior(code) for code in codes)

    def condition(
        self, labels: Cond, shape: Sequence[int], may_hide: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Encode the labels of a condition, some of which may be missing.

        The label ``num_classes``, in every pixel of a mask, stands for a missing label. Its state
        is zeros.

        Args:
            labels: Classes ``(B,)`` or masks ``(B, H, W)``. None stands for one missing label,
                ``B = 1``.
            shape: Shape of the state of one label.
            may_hide: False to refuse missing labels.

        Returns:
            States ``(B, *shape)``, and booleans ``(B,)``: True for a missing label.

        Raises:
            TypeError: If ``labels`` is not a tensor of integers.
            ValueError: If a label is not one of the codec's, the states have another shape, or a
                label is missing and must not be.
        """
        missing = "cond must hold labels for a module trained without label_dropout, got "
        if labels is None and not may_hide:
            raise ValueError(f"{missing}no labels")
        if labels is None:
            return torch.zeros(1, *shape), torch.ones(1, dtype=torch.bool)
        if not isinstance(labels, Tensor):
            raise TypeError(f"cond must be a tensor of labels, got {type(labels).__name__}")
        labels = as_labels(labels, "labels")
        hidden = (labels == self.codec.num_classes).reshape(len(labels), -1).all(1)
        if not may_hide and bool(hidden.any()):
            raise ValueError(f"{missing}{int(hidden.sum())} samples without a label")
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
        """Return the weights of states in a loss; None if all weights are 1.

        A state has the weight of its class, and 0 if its label is ignored. The weight of a latent
        cell is the mean over its pixels.

        Args:
            labels: Classes ``(B,)`` or masks ``(B, H, W)``.
            states: States of the labels, ``(B, K)`` or ``(B, K, h, w)``.
            class_weights: One weight per class; None for 1 each.

        Returns:
            Weights ``(B, 1)`` or ``(B, 1, h, w)``, which broadcast to the states.
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
    """Draw noise of labels, independent of the noise of images with the same seeds.

    Args:
        shape: Shape of the state of one label.
        seeds: One seed per sample, ``B`` in total.
        draws: Number of noises per sample.
        device: Device of the result.

    Returns:
        Noise ``(B, draws, *shape)``.

    >>> label_noise((3,), seeds=[0, 1], draws=4).shape
    torch.Size([2, 4, 3])
    """
    return seeded_noise((draws, *shape), [seed ^ LABEL_STREAM for seed in seeds], device)


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    """Compute the mean of tensors. One of them is in memory at a time."""
    tensors = iter(tensors)
    total, count = next(tensors).clone(), 1
    for x in tensors:
        total, count = total.add_(x), count + 1
    return total / count
