"""Parts of label codes: a table of points, noise around the points, and decoding."""

import math
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.checks import as_labels, check_at_least, check_finite, check_labels


class Codebook:
    """The common part of all codecs: the code of label ``k`` is row ``k`` of a table.

    A subclass defines ``table (num_classes, channels)``.

    Raises:
        TypeError: If ``num_classes`` is not a number.
        ValueError: If ``num_classes`` is below 2 or ``q`` lies outside [0, 1).
    """

    num_classes: int
    q: float
    """Strength of the dequantization noise, in [0, 1)."""
    ignore_index: ClassVar[int | None] = None
    """The label of elements without a label; None if every element has one."""
    mean_is_posterior: ClassVar[bool] = False
    """True if the mean of random codes determines the probabilities of their classes."""

    def __post_init__(self) -> None:
        if self.num_classes is None:
            raise TypeError(
                "num_classes must be a number, got None; data without classes, such as masks, need "
                "module.codec.num_classes and a codec of masks (codec@module.codec=one_hot_mask)"
            )
        check_at_least(self.num_classes, 2, "num_classes")
        check_q(self.q)

    @cached_property
    def table(self) -> Tensor:
        """The codes of all classes, ``(num_classes, channels)``."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Number of channels of a code."""
        return self.table.shape[1]

    @cached_property
    def min_distance(self) -> float:
        """The smallest distance between two codes."""
        return float(torch.pdist(self.table.double()).min())

    @property
    def half_width(self) -> float:
        """Half width of the noise in each channel: ``q · min_distance / (2 √channels)``."""
        return self.q * self.min_distance / (2 * math.sqrt(self.channels))

    def encode(self, labels: Tensor) -> Tensor:
        """Return codes ``(B, channels, *)`` of labels ``(B, *)``. Ignored labels become zeros.

        Raises:
            TypeError: If the labels are not integers.
            ValueError: If a label lies outside ``[0, num_classes)`` and is not ignored.
        """
        labels = as_labels(labels, "labels")
        counted = self.counted(labels)
        if counted is not None:
            labels = labels.where(counted, 0)
        fix = "give the codec more classes, or an ignore_index where these labels mean nothing"
        check_labels(labels, self.num_classes, "labels", fix)
        code = F.embedding(labels, self.table.to(labels.device)).movedim(-1, 1)
        return code if counted is None else code * counted[:, None]

    def counted(self, labels: Tensor) -> Tensor | None:
        """Return booleans ``(B, *)``: False for ignored labels. None stands for all True."""
        ignored = self.ignore_index
        return None if ignored is None else as_labels(labels, "labels") != ignored

    def dequantize(self, code: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Add uniform noise in ``[−half_width, half_width]`` to every channel.

        Args:
            code: Codes ``(B, channels, *)``.
            generator: Draws the noise.

        Returns:
            Codes of the same shape.
        """
        noise = torch.rand(code.shape, dtype=code.dtype, device=code.device, generator=generator)
        return code + self.half_width * (2 * noise - 1)

    def decode(self, code: Tensor) -> Tensor:
        """Return the labels ``(B, *)`` of the codes nearest to ``code (B, channels, *)``.

        Raises:
            ValueError: If ``code`` has another shape or is not finite.
        """
        return self._distances(code).argmin(1)

    def posterior(self, code: Tensor) -> Tensor:
        """Return scores ``(B, num_classes, *)`` that sum to 1: ``softmax(−8 (d / d_min)²)``.

        ``d`` is the distance to the code of each class, and ``d_min`` is `min_distance`. If there
        are fewer channels than classes, the mean of codes does not determine the probabilities of
        the classes. The scores are therefore not calibrated.

        Args:
            code: Expected codes ``(B, channels, *)``.

        Raises:
            ValueError: If ``code`` has another shape or is not finite.
        """
        return (-8 * (self._distances(code) / self.min_distance) ** 2).softmax(1)

    def _distances(self, code: Tensor) -> Tensor:
        """Compute the distances ``(B, num_classes, *)`` to the codes of all classes."""
        rows = code_rows(code, self.channels)
        # The quick mode loses the digits that separate 1000 classes on a line.
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(rows.flatten(0, -2), self.table.to(rows), compute_mode=mode)
        return distances.unflatten(0, rows.shape[:-1]).movedim(-1, 1)


def check_q(q: float) -> None:
    """Require noise that cannot reach another class: ``0 ≤ q < 1``.

    Raises:
        ValueError: If ``q`` lies outside [0, 1).
    """
    if not 0 <= q < 1:
        raise ValueError(
            f"q must lie in [0, 1), got {q}; from 1 on, the codes of two classes overlap"
        )


def code_rows(code: Tensor, channels: int) -> Tensor:
    """Move the channels of codes ``(B, channels, *)`` to the end, in float32 or wider.

    Raises:
        ValueError: If ``code`` has another shape or is not finite, as codes of NaN images are.
    """
    if code.ndim < 2 or code.shape[1] != channels:
        raise ValueError(f"code must have shape (B, {channels}, *), got {tuple(code.shape)}")
    check_finite(code, "code")
    return code.movedim(1, -1).to(torch.promote_types(code.dtype, torch.float32))


def nearest_probabilities(p: Tensor) -> Tensor:
    """Project ``p (*, K)`` to the nearest vector of probabilities, in Euclidean distance.

    Source: Duchi et al., *Efficient Projections onto the l1-Ball for Learning in High
    Dimensions*, 2008, figure 1.

    >>> nearest_probabilities(torch.tensor([0.5, 1.5, 0.0]))
    tensor([0., 1., 0.])
    """
    ordered = p.sort(-1, descending=True).values
    rank = torch.arange(1, p.shape[-1] + 1, device=p.device)
    excess = (ordered.cumsum(-1) - 1) / rank
    support = (ordered > excess).sum(-1, keepdim=True)
    return (p - excess.gather(-1, support - 1)).clamp_min(0)
