"""Masks made from images and their classes, by a rule."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from flowkit.data.splits import SplitData
from flowkit.data.stream import Stream
from flowkit.types import Batch


@dataclass(frozen=True)
class ForegroundRule:
    """Pixels brighter than a threshold belong to the image's object, the others to class 0.

    Args:
        threshold: In [-1, 1], on the mean of an image's channels.
        classes: Whether the object's label is ``1 + class``, or 1 for all.

    >>> import torch
    >>> images = torch.tensor([[[[-1.0, 0.5]]], [[[0.1, -0.3]]]])
    >>> ForegroundRule(-0.25)(images, torch.tensor([3, 0]))
    tensor([[[0, 4]], [[1, 0]]])
    """

    threshold: float
    classes: bool = True

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Masks ``(B, H, W)`` of images ``(B, C, H, W)`` and their classes ``(B,)``."""
        foreground = self.foreground(images)
        if not self.classes:
            return foreground.long()
        if labels is None:
            raise ValueError("classes must be False for data without labels, got True")
        return foreground * (1 + labels[:, None, None])

    def foreground(self, images: Tensor) -> Tensor:
        """Where objects are, booleans ``(B, H, W)``."""
        return images.mean(1) > self.threshold


@dataclass(frozen=True, eq=False)
class _Masked:
    """A split or a stream whose conditions are masks."""

    inner: Any
    rule: ForegroundRule

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: Any) -> Batch:
        batch = self.inner[index]
        return cast(Batch, {**batch, "cond": self.rule(batch["x1"], batch.get("cond"))})

    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint()} {self.rule}"


class Masks(SplitData):
    """Any images with their masks as conditions: ``cond (B, H, W)`` of int64.

    Masks are made after mirroring, from the images as they are.

    Args:
        images: The data of the images, and of their classes.
        threshold: See `ForegroundRule`.
        classes: See `ForegroundRule`; there are 11 labels for ten classes, and 2 without.

    >>> from flowkit.data import Digits
    >>> data = Masks(Digits(batch_size=4))
    >>> data.setup()
    >>> data.stream()[0]["cond"].shape, data.test[:100]["cond"].unique().tolist()
    (torch.Size([4, 8, 8]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    """

    def __init__(self, images: SplitData, threshold: float = -0.25, classes: bool = True) -> None:
        super().__init__(
            batch_size=images.batch_size,
            seed=images.seed,
            num_workers=images.num_workers,
            flip=images.flip,
        )
        self.images, self.rule = images, ForegroundRule(threshold, classes)

    def prepare_data(self) -> None:
        """Fetch the images."""
        self.images.prepare_data()

    def load(self) -> Mapping[str, Any]:
        """Read the images."""
        self.images.setup()
        return {name: _Masked(self.images.split(name), self.rule) for name in _SPLITS}

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Return the training batches of one rank, indexed by step."""
        return cast(Stream, _Masked(self.images.stream(rank, world_size), self.rule))


_SPLITS = ("train", "val", "test")
