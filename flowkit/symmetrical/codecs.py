"""Label codes of symmetrical flow matching: discrete labels as points that a flow can move.

A codec holds one point per class. Labels ``(B, *)`` become codes ``(B, channels, *)``: those of
images ``(B,)`` and those of pixels ``(B, H, W)`` alike. `dequantize` spreads each code evenly over
a small cube, so that codes have a density; the cube's corners reach ``q`` of the way to where
another class begins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowkit.checks import check_positive
from flowkit.symmetrical.codebook import Codebook, code_rows, nearest_probabilities


@runtime_checkable
class Codec(Protocol):
    """What symmetrical flow matching needs of a label code."""

    num_classes: int
    channels: int
    ignore_index: int | None
    mean_is_posterior: bool

    def encode(self, labels: Tensor) -> Tensor:
        """Return codes ``(B, channels, *)`` of labels ``(B, *)``."""
        ...

    def counted(self, labels: Tensor) -> Tensor | None:
        """Return where labels are not to be ignored; None if all count."""
        ...

    def dequantize(self, code: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return codes with uniform noise."""
        ...

    def decode(self, code: Tensor) -> Tensor:
        """Return the nearest labels ``(B, *)``."""
        ...

    def posterior(self, code: Tensor) -> Tensor:
        """Return class probabilities ``(B, num_classes, *)`` of an expected code."""
        ...


@dataclass(frozen=True)
class OneHot(Codebook):
    """``amplitude`` in the channel of the class, 0 in the others: all classes equally far apart.

    The code's expectation is ``amplitude`` times the class probabilities, so that a regression of
    the code is one of the posterior.

    Args:
        num_classes: ``K ≥ 2``, also the number of channels.
        amplitude: Of the code.
        q: Of the dequantization noise, in [0, 1).

    >>> codec = OneHot(3)
    >>> codec.encode(torch.tensor([1]))
    tensor([[0., 2., 0.]])
    >>> codec.posterior(torch.tensor([[0.5, 1.5, 0.0]]))
    tensor([[0.2500, 0.7500, 0.0000]])
    """

    mean_is_posterior = True
    num_classes: int
    amplitude: float = 2.0
    q: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_positive(self.amplitude, "amplitude")

    @cached_property
    def table(self) -> Tensor:
        """The codes ``(K, K)``."""
        return self.amplitude * torch.eye(self.num_classes)

    @property
    def min_distance(self) -> float:  # type: ignore[override]  # known without looking
        """``√2 amplitude``."""
        return math.sqrt(2) * self.amplitude

    def decode(self, code: Tensor) -> Tensor:
        """Return the labels ``(B, *)`` of the nearest codes."""
        code_rows(code, self.channels)
        return code.argmax(1)

    def posterior(self, code: Tensor) -> Tensor:
        """Return the probabilities ``(B, K, *)`` nearest to ``code / amplitude``.

        Args:
            code: Expected codes ``(B, K, *)``.
        """
        return nearest_probabilities(code_rows(code, self.channels) / self.amplitude).movedim(-1, 1)


@dataclass(frozen=True)
class OneHotMask(OneHot):
    """`OneHot` codes of pixels, some of which may be ignored.

    Args:
        num_classes: ``K ≥ 2``, also the number of channels.
        amplitude: Of the code.
        q: Of the dequantization noise, in [0, 1).
        ignore_index: The label of pixels without a label: they are coded by zeros and do not count
            in the loss. Outside ``[0, K)``.

    >>> codec = OneHotMask(2, ignore_index=255)
    >>> codec.encode(torch.tensor([[[0, 1, 255]]]))[:, 1]
    tensor([[[0., 2., 0.]]])
    """

    ignore_index: int | None = None  # type: ignore[misc]

    def __post_init__(self):
        super().__post_init__()
        _check_ignored(self.ignore_index, self.num_classes)

    def encode(self, labels: Tensor) -> Tensor:
        """Return codes ``(B, K, H, W)`` of masks ``(B, H, W)``; of ignored pixels, zeros."""
        _check_mask(labels)
        return super().encode(labels)


@dataclass(frozen=True)
class Simplex(Codebook):
    """The corners of a regular simplex around 0: `OneHot` codes without their common part.

    Distances are those of `OneHot` of the same amplitude, with one channel less.

    Args:
        num_classes: ``K ≥ 2``; there are ``K − 1`` channels.
        amplitude: As for `OneHot`.
        q: Of the dequantization noise, in [0, 1).

    >>> Simplex(2).table
    tensor([[ 1.4142], [-1.4142]])
    """

    mean_is_posterior = True
    num_classes: int
    amplitude: float = 2.0
    q: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_positive(self.amplitude, "amplitude")

    @cached_property
    def table(self) -> Tensor:
        """The codes ``(K, K − 1)``: unit vectors in Helmert's basis of what is orthogonal to 1."""
        j = torch.arange(1, self.num_classes, dtype=torch.float64)
        basis = torch.ones(self.num_classes, self.num_classes - 1).triu().double()
        basis[1:].diagonal().copy_(-j)
        return (self.amplitude * basis / (j * (j + 1)).sqrt()).float()

    def posterior(self, code: Tensor) -> Tensor:
        """Return the probabilities ``(B, K, *)`` whose mean code is nearest to ``code``.

        Args:
            code: Expected codes ``(B, K − 1, *)``.
        """
        rows = code_rows(code, self.channels)
        p = 1 / self.num_classes + rows @ self.table.to(rows).T / self.amplitude**2
        return nearest_probabilities(p).movedim(-1, 1)


@dataclass(frozen=True)
class Ordinal(Codebook):
    """Classes evenly on a line, from ``−amplitude`` to ``amplitude``: the paper's code.

    With many classes it is a poor one: a mixture of classes 0 and 9 is read as class 4 or 5.
    Source: Caetano et al., *Symmetrical Flow Matching*, 2025 (arXiv 2506.10634).

    Args:
        num_classes: ``K ≥ 2``.
        amplitude: Half the length of the line.
        q: Of the dequantization noise, in [0, 1).

    >>> Ordinal(3).encode(torch.tensor([0, 1, 2])).T
    tensor([[-1.,  0.,  1.]])
    """

    num_classes: int
    amplitude: float = 1.0
    q: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_positive(self.amplitude, "amplitude")

    @cached_property
    def table(self) -> Tensor:
        """The codes ``(K, 1)``."""
        return torch.linspace(-self.amplitude, self.amplitude, self.num_classes)[:, None]


@dataclass(frozen=True)
class RGBPalette(Codebook):
    """Masks as color images in [-1, 1], one color per class: what an image autoencoder takes.

    Args:
        colors: RGB triples in 0…255, one per class; or the number of classes, for colors evenly
            from the color cube.
        q: Of the dequantization noise, in [0, 1).
        ignore_index: The label of pixels without a label: they are coded by zeros (mid-gray) and do
            not count in the loss. Outside ``[0, K)``.

    Raises:
        ValueError: If two colors are so close that noise and rounding to 8 bits together could
            confuse them: ``√3/(1 − q)`` levels or less.

    >>> RGBPalette([[0, 0, 0], [255, 0, 0]]).encode(torch.tensor([[[1, 0]]])).squeeze()
    tensor([[ 1., -1.], [-1., -1.], [-1., -1.]])
    """

    colors: Sequence[Sequence[int]] | int
    q: float = 0.5
    ignore_index: int | None = None  # type: ignore[misc]
    num_classes: int = field(init=False)

    def __post_init__(self):
        if not isinstance(self.colors, int):
            object.__setattr__(self, "colors", tuple(tuple(color) for color in self.colors))
        size = self.colors if isinstance(self.colors, int) else len(self.colors)
        object.__setattr__(self, "num_classes", size)
        super().__post_init__()
        _check_ignored(self.ignore_index, self.num_classes)
        levels = self.levels
        if levels.shape[1:] != (3,) or levels.min() < 0 or levels.max() > 255:
            raise ValueError(f"colors must be RGB triples in 0...255, got {self.colors}")
        distances = torch.cdist(levels, levels).fill_diagonal_(math.inf)
        closest, needed = float(distances.min()), math.sqrt(3) / (1 - self.q)
        if not closest > needed:
            pair = divmod(int(distances.argmin()), self.num_classes)
            raise ValueError(
                f"colors must be more than {needed:.1f} levels apart for q = {self.q}, got "
                f"{closest:.1f} between classes {pair[0]} and {pair[1]}; lower q or choose others"
            )

    @cached_property
    def levels(self) -> Tensor:
        """The colors ``(K, 3)`` in 0…255, as float64."""
        if not isinstance(self.colors, int):
            return torch.tensor(self.colors, dtype=torch.float64)
        side = math.ceil(round(self.colors ** (1 / 3), 6))
        cells = torch.linspace(0, side**3 - 1, self.colors, dtype=torch.float64).round().long()
        digits = torch.stack([cells // side**2, cells // side % side, cells % side], 1)
        return (255 / (side - 1) * digits.double()).round()

    @cached_property
    def table(self) -> Tensor:
        """The codes ``(K, 3)`` in [-1, 1]."""
        return (self.levels / 127.5 - 1).float()

    def encode(self, labels: Tensor) -> Tensor:
        """Return color images ``(B, 3, H, W)`` of masks ``(B, H, W)``; ignored pixels are 0."""
        _check_mask(labels)
        return super().encode(labels)


def _check_ignored(ignore_index: int | None, num_classes: int) -> None:
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index must lie outside [0, {num_classes - 1}], got {ignore_index}"
        )


def _check_mask(labels: Tensor) -> None:
    if labels.ndim != 3:
        raise ValueError(f"labels must be masks (B, H, W), got shape {tuple(labels.shape)}")
