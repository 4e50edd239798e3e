"""What label codes are made of: a table of points, noise around them, and the way back."""

import math
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.checks import as_labels, check_at_least, check_finite, check_labels


class Codebook:
    """What all codecs share: labels are rows of ``table (num_classes, channels)``."""

    num_classes: int
    q: float
    ignore_index: ClassVar[int | None] = None
    mean_is_posterior: ClassVar[bool] = False
    """Whether a mean of codes determines the probabilities whose mean it is."""

    def __post_init__(self):
        if self.num_classes is None:
            raise TypeError(
                "num_classes must be a number, got None; data without classes, such as masks, need "
                "module.codec.num_classes and a codec of theirs (codec@module.codec=one_hot_mask)"
            )
        check_at_least(self.num_classes, 2, "num_classes")
        check_q(self.q)

    @cached_property
    def table(self) -> Tensor:
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Numbers per code."""
        return self.table.shape[1]

    @cached_property
    def min_distance(self) -> float:
        """The smallest distance between two codes."""
        return float(torch.pdist(self.table.double()).min())

    @property
    def half_width(self) -> float:
        """Of the noise in each channel: ``q · min_distance / (2 √channels)``."""
        return self.q * self.min_distance / (2 * math.sqrt(self.channels))

    def encode(self, labels: Tensor) -> Tensor:
        """Return codes ``(B, channels, *)`` of labels ``(B, *)``; of ignored labels, zeros.

        Raises:
            TypeError: If the labels are not integers.
            ValueError: If a label is none of the codec's.
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
        """Return where labels ``(B, *)`` are not to be ignored; None if all count."""
        ignored = self.ignore_index
        return None if ignored is None else as_labels(labels, "labels") != ignored

    def dequantize(self, code: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Add noise, uniform within `half_width` in every channel.

        Args:
            code: Codes ``(B, channels, *)``.
            generator: Draws the noise.
        """
        noise = torch.rand(code.shape, dtype=code.dtype, device=code.device, generator=generator)
        return code + self.half_width * (2 * noise - 1)

    def decode(self, code: Tensor) -> Tensor:
        """Return the labels ``(B, *)`` of the nearest codes."""
        return self._distances(code).argmin(1)

    def posterior(self, code: Tensor) -> Tensor:
        """Return scores ``(B, num_classes, *)`` that sum to 1: a softmax of squared distances.

        Codes with fewer channels than classes do not determine the probabilities whose mean
        they are, so these are no more than scores; their width is a quarter of the smallest
        distance.

        Args:
            code: Expected codes ``(B, channels, *)``.
        """
        return (-8 * (self._distances(code) / self.min_distance) ** 2).softmax(1)

    def _distances(self, code: Tensor) -> Tensor:
        """To every class, ``(B, num_classes, *)``."""
        rows = code_rows(code, self.channels)
        # The direct mode: the quick one loses the digits that tell 1000 classes on a line apart.
        mode = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(rows.flatten(0, -2), self.table.to(rows), compute_mode=mode)
        return distances.unflatten(0, rows.shape[:-1]).movedim(-1, 1)


def check_q(q: float) -> None:
    """Require noise narrower than what lies between two codes."""
    if not 0 <= q < 1:
        raise ValueError(f"q must lie in [0, 1), got {q}; from 1 on, codes of classes overlap")


def code_rows(code: Tensor, channels: int) -> Tensor:
    """Codes with their channels last, in float32 at least; those of NaN images are refused."""
    if code.ndim < 2 or code.shape[1] != channels:
        raise ValueError(f"code must have shape (B, {channels}, *), got {tuple(code.shape)}")
    check_finite(code, "code")
    return code.movedim(1, -1).to(torch.promote_types(code.dtype, torch.float32))


def nearest_probabilities(p: Tensor) -> Tensor:
    """The Euclidean projection of ``p (*, K)`` to what is non-negative and sums to 1.

    Source: Duchi et al., *Efficient Projections onto the l1-Ball*, 2008, algorithm 1.
    """
    ordered = p.sort(-1, descending=True).values
    rank = torch.arange(1, p.shape[-1] + 1, device=p.device)
    excess = (ordered.cumsum(-1) - 1) / rank
    support = (ordered > excess).sum(-1, keepdim=True)
    return (p - excess.gather(-1, support - 1)).clamp_min(0)
