"""Label codes of symmetrical flow matching: discrete labels as points that a flow can move.

A codec holds one point per class. Labels ``(B, *)`` become codes ``(B, channels, *)``. Labels of
images have the shape ``(B,)``, labels of pixels the shape ``(B, H, W)``. `dequantize` spreads each
code evenly over a small cube, so that codes have a density. The corners of the cube are
``q d_min / 2`` from the code, where ``d_min`` is the smallest distance of two codes. For ``q < 1``
they are therefore nearer to their own code than to any other.
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
    """The interface of a label code: labels ``(B, *)`` and codes ``(B, channels, *)``."""

    num_classes: int
    channels: int
    ignore_index: int | None
    """The label of elements without a label; None if every element has one."""
    mean_is_posterior: bool
    """True if the mean of random codes determines the probabilities of their classes."""

    def encode(self, labels: Tensor) -> Tensor:
        """Return codes ``(B, channels, *)`` of labels ``(B, *)``."""
        ...

    def counted(self, labels: Tensor) -> Tensor | None:
        """Return booleans ``(B, *)``: False for ignored labels. None stands for all True."""
        ...

    def dequantize(self, code: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return codes ``(B, channels, *)`` with uniform noise."""
        ...

    def decode(self, code: Tensor) -> Tensor:
        """Return the labels ``(B, *)`` of the nearest codes."""
        ...

    def posterior(self, code: Tensor) -> Tensor:
        """Return class probabilities ``(B, num_classes, *)`` of an expected code."""
        ...


@dataclass(frozen=True)
class OneHot(Codebook):
    """One-hot codes: ``amplitude`` in the channel of the class, 0 in the other channels.

    All classes have the distance ``√2 amplitude`` from each other. The expected code is
    ``amplitude`` times the class probabilities, so that a regression of the code is a regression of
    these probabilities.

    Args:
        num_classes: ``K ≥ 2``, also the number of channels.
        amplitude: Size of the code, positive.
        q: Strength of the dequantization noise, in [0, 1).

    Raises:
        ValueError: If a number is out of range.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.amplitude, "amplitude")

    @cached_property
    def table(self) -> Tensor:
        """The codes ``(K, K)``."""
        return self.amplitude * torch.eye(self.num_classes)

    @property
    def min_distance(self) -> float:  # type: ignore[override]  # known without the table
        """``√2 amplitude``."""
        return math.sqrt(2) * self.amplitude

    def decode(self, code: Tensor) -> Tensor:
        """Return the labels ``(B, *)`` of the codes nearest to ``code (B, K, *)``.

        Raises:
            ValueError: If ``code`` has another shape or is not finite.
        """
        code_rows(code, self.channels)
        return code.argmax(1)

    def posterior(self, code: Tensor) -> Tensor:
        """Return the probabilities ``(B, K, *)`` nearest to ``code / amplitude``.

        Args:
            code: Expected codes ``(B, K, *)``.

        Raises:
            ValueError: If ``code`` has another shape or is not finite.
        """
        return nearest_probabilities(code_rows(code, self.channels) / self.amplitude).movedim(-1, 1)


@dataclass(frozen=True)
class OneHotMask(OneHot):
    """`OneHot` codes of masks, in which pixels may have no label.

    Args:
        num_classes: ``K ≥ 2``, also the number of channels.
        amplitude: Size of the code, positive.
        q: Strength of the dequantization noise, in [0, 1).
        ignore_index: The label, outside ``[0, K)``, of pixels without a label. Their code is zeros,
            and they do not count in the loss. None if every pixel has a label.

    Raises:
        ValueError: If a number is out of range.

    >>> codec = OneHotMask(2, ignore_index=255)
    >>> codec.encode(torch.tensor([[[0, 1, 255]]]))[:, 1]
    tensor([[[0., 2., 0.]]])
    """

    ignore_index: int | None = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ignored(self.ignore_index, self.num_classes)

    def encode(self, labels: Tensor) -> Tensor:
        """Return codes ``(B, K, H, W)`` of masks ``(B, H, W)``. Ignored pixels become zeros.

        Raises:
            TypeError: If the labels are not integers.
            ValueError: If the labels are not masks, or a label is out of range.
        """
        _check_mask(labels)
        return super().encode(labels)


@dataclass(frozen=True)
class Simplex(Codebook):
    """The corners of a regular simplex around 0: `OneHot` codes without their common mean.

    Distances between codes are those of `OneHot` of the same amplitude, with one channel less.

    Args:
        num_classes: ``K ≥ 2``; there are ``K − 1`` channels.
        amplitude: As for `OneHot`, positive.
        q: Strength of the dequantization noise, in [0, 1).

    Raises:
        ValueError: If a number is out of range.

    >>> Simplex(2).table
    tensor([[ 1.4142], [-1.4142]])
    """

    mean_is_posterior = True
    num_classes: int
    amplitude: float = 2.0
    q: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.amplitude, "amplitude")

    @cached_property
    def table(self) -> Tensor:
        """The codes ``(K, K − 1)``: one-hot codes in Helmert's basis of the vectors of sum 0."""
        j = torch.arange(1, self.num_classes, dtype=torch.float64)
        basis = torch.ones(self.num_classes, self.num_classes - 1).triu().double()
        basis[1:].diagonal().copy_(-j)
        return (self.amplitude * basis / (j * (j + 1)).sqrt()).float()

    def posterior(self, code: Tensor) -> Tensor:
        """Return the probabilities ``(B, K, *)`` whose mean code is nearest to ``code``.

        Args:
            code: Expected codes ``(B, K − 1, *)``.

        Raises:
            ValueError: If ``code`` has another shape or is not finite.
        """
        rows = code_rows(code, self.channels)
        p = 1 / self.num_classes + rows @ self.table.to(rows).T / self.amplitude**2
        return nearest_probabilities(p).movedim(-1, 1)


@dataclass(frozen=True)
class Ordinal(Codebook):
    """Points at equal distances on a line from ``−amplitude`` to ``amplitude``: the paper's code.

    With many classes this code is poor: a mixture of classes 0 and 9 is decoded as class 4 or 5.
    Source: Caetano et al., *Symmetrical Flow Matching*, 2025 (arXiv 2506.10634).

    Args:
        num_classes: ``K ≥ 2``; there is 1 channel.
        amplitude: Half the length of the line, positive.
        q: Strength of the dequantization noise, in [0, 1).

    Raises:
        ValueError: If a number is out of range.

    >>> Ordinal(3).encode(torch.tensor([0, 1, 2])).T
    tensor([[-1.,  0.,  1.]])
    """

    num_classes: int
    amplitude: float = 1.0
    q: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.amplitude, "amplitude")

    @cached_property
    def table(self) -> Tensor:
        """The codes ``(K, 1)``."""
        return torch.linspace(-self.amplitude, self.amplitude, self.num_classes)[:, None]


@dataclass(frozen=True)
class RGBPalette(Codebook):
    """Color images in [-1, 1] as codes of masks, one color per class.

    An image autoencoder can encode them.

    Args:
        colors: RGB triples in 0…255, one per class, or the number ``K ≥ 2`` of classes. A number
            takes colors at equal distances from the color cube.
        q: Strength of the dequantization noise, in [0, 1).
        ignore_index: The label, outside ``[0, K)``, of pixels without a label. Their code is zeros
            (mid-gray), and they do not count in the loss. None if every pixel has a label.

    Raises:
        ValueError: If a number is out of range. If two colors are ``√3/(1 − q)`` levels apart or
            less: noise and rounding to 8 bits could then confuse the two.

    >>> RGBPalette([[0, 0, 0], [255, 0, 0]]).encode(torch.tensor([[[1, 0]]])).squeeze()
    tensor([[ 1., -1.], [-1., -1.], [-1., -1.]])
    """

    colors: Sequence[Sequence[int]] | int
    q: float = 0.5
    ignore_index: int | None = None  # type: ignore[misc]
    num_classes: int = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.colors, int):
            object.__setattr__(self, "colors", tuple(tuple(color) for color in self.colors))
        size = self.colors if isinstance(self.colors, int) else len(self.colors)
        object.__setattr__(self, "num_classes", size)
        super().__post_init__()
        _check_ignored(self.ignore_index, self.num_classes)
        self._check_colors()

    def _check_colors(self) -> None:
        """Require RGB triples that noise and rounding cannot confuse."""
        levels = self.levels
        if levels.shape[1:] != (3,) or levels.min() < 0 or levels.max() > 255:
            raise ValueError(f"colors must be RGB triples in 0...255, got {self.colors}")
        distances = torch.cdist(levels, levels).fill_diagonal_(math.inf)
        closest, needed = float(distances.min()), math.sqrt(3) / (1 - self.q)
        if not closest > needed:
            pair = divmod(int(distances.argmin()), self.num_classes)
            raise ValueError(
                f"colors must be more than {needed:.1f} levels apart for q = {self.q}, got "
                f"{closest:.1f} between classes {pair[0]} and {pair[1]}; "
                "lower q or choose other colors"
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
        """Return color images ``(B, 3, H, W)`` of masks ``(B, H, W)``. Ignored pixels are 0.

        Raises:
            TypeError: If the labels are not integers.
            ValueError: If the labels are not masks, or a label is out of range.
        """
        _check_mask(labels)
        return super().encode(labels)


def _check_ignored(ignore_index: int | None, num_classes: int) -> None:
    """Require a label that no class has."""
    if ignore_index is not None and 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index must lie outside [0, {num_classes - 1}], got {ignore_index}"
        )


def _check_mask(labels: Tensor) -> None:
    """Require labels of pixels."""
    if labels.ndim != 3:
        raise ValueError(f"labels must be masks (B, H, W), got shape {tuple(labels.shape)}")
