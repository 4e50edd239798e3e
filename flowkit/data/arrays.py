"""Protocol of a split, and splits held in memory as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from flowkit.metrics.pictures import from_uint8
from flowkit.provenance import content_hash
from flowkit.types import Batch

Index = slice | Sequence[int] | Tensor
"""Positions in a split: a slice, a list, a 1-D integer tensor or a boolean mask ``(N,)``."""


class Split(Protocol):
    """Protocol of one part of a data set (train, val or test), indexed by several positions.

    ``split[:100]["x1"]`` holds the first 100 samples. An index always selects a whole batch, which
    is much faster than single samples. So an index is never a single number.
    """

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: Index) -> Batch:
        """Return the samples at the positions, in the order of the index, as a new batch."""
        ...

    def fingerprint(self) -> str:
        """Return a SHA-256 of the content. Caches and evaluation records store it."""
        ...


def positions(index: Index, length: int) -> Tensor:
    """Convert an index to a 1-D int64 tensor of positions in ``[0, length)``.

    Negative positions count from the end, as in Python lists.

    Args:
        index: A slice, a list or a 1-D tensor of positions, or a boolean mask ``(length,)``.
        length: Number of samples of the split.

    Raises:
        TypeError: If the index is a single number, or does not hold integers.
        IndexError: If a position lies outside the split.

    >>> positions(slice(None, None, 2), 5), positions([-1], 5)
    (tensor([0, 2, 4]), tensor([4]))
    """
    if isinstance(index, slice):
        index = range(length)[index]
    rows = index if isinstance(index, Tensor) else torch.tensor(index)
    if rows.numel() == 0:
        rows = rows.long()  # an empty list has no type
    if rows.dtype == torch.bool and rows.shape == (length,):
        rows = rows.nonzero()[:, 0]
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"index must be a slice, a list or a 1-D tensor of positions, or a mask, got {index}"
        )
    if rows.numel() and not (-length <= rows.min() and rows.max() < length):
        raise IndexError(f"index must lie in [-{length}, {length - 1}], got {rows.tolist()}")
    return torch.where(rows < 0, rows + length, rows)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Split held in memory: tensors with one row per sample.

    Images can be stored as ``uint8``, which takes a quarter of the memory of float32. A batch then
    holds them as float32 in [-1, 1].

    Args:
        columns: Tensors ``(N, *)`` under the names of ``flowkit.types.Batch``; ``x1`` is required.
        name: Name of the data in errors, for example their file.

    Raises:
        ValueError: If the columns differ in length, or hold NaN or infinity.

    >>> split = Arrays({"x1": torch.tensor([[0.0], [1.0], [2.0]]), "cond": torch.tensor([4, 5, 6])})
    >>> split[[2, 0]]
    {'x1': tensor([[2.], [0.]]), 'cond': tensor([6, 4])}
    """

    columns: Mapping[str, Tensor]
    name: str = "data"

    def __post_init__(self) -> None:
        """Check that all columns have the same length and hold finite values."""
        for key, column in self.columns.items():
            if len(column) != len(self.columns["x1"]):
                raise ValueError(
                    f"{key} of {self.name} must have {len(self.columns['x1'])} rows like x1, "
                    f"got {len(column)}"
                )
            if column.is_floating_point() and not bool(torch.isfinite(column).all()):
                row = int((~torch.isfinite(column)).nonzero()[0, 0])
                raise ValueError(
                    f"{key} of {self.name} must be finite, got NaN or infinity at index {row}"
                )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.columns["x1"])

    def __getitem__(self, index: Index) -> Batch:
        """Return the samples at the positions of an index as one batch."""
        rows = positions(index, len(self))
        # index_select copies whole rows: on images it is several times faster than column[rows].
        batch = {key: column.index_select(0, rows) for key, column in self.columns.items()}
        if batch["x1"].dtype == torch.uint8:
            batch["x1"] = from_uint8(batch["x1"])
        return cast(Batch, batch)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the names, types, shapes and bytes of all columns."""
        return content_hash(self.columns)
