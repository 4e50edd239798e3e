"""Masks computed from images and their classes by a threshold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from flowkit.data.arrays import Index
from flowkit.data.splits import SPLITS, SplitData
from flowkit.data.stream import Stream
from flowkit.types import Batch


@dataclass(frozen=True)
class ForegroundRule:
    """Threshold rule for masks: bright pixels belong to the object, dark pixels to label 0.

    A pixel is bright if the mean of its channels exceeds the threshold.

    Args:
        threshold: The threshold in [-1, 1].
        classes: If True, the label of the object is ``1 + class``; if False, 1 for all classes.

    >>> import torch
    >>> images = torch.tensor([[[[-1.0, 0.5]]], [[[0.1, -0.3]]]])
    >>> ForegroundRule(-0.25)(images, torch.tensor([3, 0]))
    tensor([[[0, 4]], [[1, 0]]])
    """

    threshold: float
    classes: bool = True

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return masks ``(B, H, W)`` of images ``(B, C, H, W)`` with classes ``(B,)``.

        Raises:
            ValueError: If ``classes`` is True and ``labels`` is None.
        """
        foreground = self.foreground(images)
        if not self.classes:
            return foreground.long()
        if labels is None:
            raise ValueError("classes must be False for data without labels, got True")
        return foreground * (1 + labels[:, None, None])

    def foreground(self, images: Tensor) -> Tensor:
        """Return booleans ``(B, H, W)``: True at pixels of the object."""
        return images.mean(1) > self.threshold


@dataclass(frozen=True, eq=False)
class _Masked:
    """Split or stream with masks as conditions."""

    inner: Any
    rule: ForegroundRule

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int | Index) -> Batch:
        batch = self.inner[index]
        return cast(Batch, {**batch, "cond": self.rule(batch["x1"], batch.get("cond"))})

    def fingerprint(self) -> str:
        return f"{self.inner.fingerprint()} {self.rule}"


class Masks(SplitData):
    """Images of another data module, with masks as conditions: ``cond (B, H, W)`` of int64.

    A mask is computed from its image by a `ForegroundRule`. In training, the image is mirrored
    first.

    Args:
        images: The data module of the images and their classes.
        threshold: The threshold in [-1, 1], see `ForegroundRule`.
        classes: If True, the label of an object is ``1 + class``: ten classes give the labels
            0…10. If False, the labels are 0 and 1.

    Raises:
        ValueError: When a batch is read, if ``classes`` is True and the images have no classes.

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
        self.root = getattr(images, "root", None)

    def prepare_data(self) -> None:
        """Fetch the images."""
        self.images.prepare_data()

    def load(self) -> Mapping[str, Any]:
        """Read the images."""
        self.images.known = self.known
        self.images.setup()
        self.notes, self.files = self.images.notes, self.images.files
        return {name: _Masked(self.images.split(name), self.rule) for name in SPLITS}

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Return the training batches of one rank, indexed by step."""
        return cast(Stream, _Masked(self.images.stream(rank, world_size), self.rule))
