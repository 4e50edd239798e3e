"""Plain data: tensors, arrays of NumPy, their files, and data sets of torch."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from flowkit.checks import check_finite, check_labels
from flowkit.couplings import Coupling
from flowkit.data.arrays import Arrays
from flowkit.data.files import content_splits, share_of_test
from flowkit.data.splits import SplitData

Source = Tensor | np.ndarray | str | Path


class FromArrays(SplitData):
    """Plain data in memory: tensors, arrays, ``.npy`` files or a ``torch.utils.data.Dataset``.

    Batches hold ``x1 (B, *)`` and with labels or other conditions ``cond (B, …)``.

    - **Images** are bytes ``(N, C, H, W)``, ``(N, H, W, C)`` or ``(N, H, W)`` with 1 or 3 channels,
      or four-dimensional floats in [-1, 1]. With a ``value_range`` any numbers are images, and the
      range is mapped to [-1, 1]. Batches hold ``(B, C, H, W)``.
    - **Other data** are floats ``(N, *)``, for example points ``(N, d)`` or sequences
      ``(N, T, C)``. They are not changed. `summary` says how to make images of the latter.
    - **Conditions** are labels ``(N,)``, whole numbers from 0, or floats ``(N, *)`` with at least
      two dimensions.

    An item of a data set is a tensor, a tuple ``(x1, cond)``, or a mapping with ``x1`` and possibly
    ``cond``. All items are read into memory on ``setup``.

    The split of a sample follows from a hash of ``x1``, see `flowkit.data.files.content_splits`. So
    new samples move no other, and equal samples are in the same split.

    Args:
        x1: The data: a tensor, an array, the name of a ``.npy`` file, or a data set.
        cond: The conditions: a tensor, an array, or the name of a ``.npy`` file; None for data
            without conditions, and for a data set, whose items hold them.
        root: The folder of the files.
        value_range: The two numbers that mean black and white, for example ``(0, 1)``; None for
            bytes, for floats in [-1, 1], and for data that are no images.
        class_names: Names of the classes, or None.
        batch_size: Samples per process and training step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The share of the validation split.
        test_fraction: The share of the test split; None means 0.05, and more of fewer samples, see
            `flowkit.data.files.share_of_test`.
        split_seed: The seed of the splits.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs data with noise in the workers of the loader; see `SplitData`.

    Raises:
        TypeError: On ``setup``, if the data are of another kind or hold other numbers.
        ValueError: On ``setup``, if shape, range or length do not fit, a value is not finite, or a
            file is no ``.npy`` file. A file of Python objects is refused; no code in it is run.
        FileNotFoundError: On ``setup``, if there is no such file.

    >>> images = torch.randint(0, 256, (200, 8, 8), dtype=torch.uint8)
    >>> data = FromArrays(images, torch.arange(200) % 2, batch_size=16)
    >>> from flowkit.modules import ConditionalFlowMatching
    >>> from flowkit.nn import ResidualMLP
    >>> module = ConditionalFlowMatching(ResidualMLP((1, 8, 8), num_classes=2, width=16))
    >>> from lightning import Trainer
    >>> trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, barebones=True)
    >>> trainer.fit(module, data)
    >>> data.shape, data.num_classes, module.sample(4, cond=torch.tensor([0, 0, 1, 1])).shape
    ((1, 8, 8), 2, torch.Size([4, 1, 8, 8]))
    """

    def __init__(
        self,
        x1: Source | Dataset,
        cond: Source | None = None,
        root: str | Path = ".",
        value_range: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int = 64,
        flip: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float | None = None,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip, coupling=coupling
        )
        if value_range is not None and not (
            len(value_range) == 2 and -np.inf < value_range[0] < value_range[1] < np.inf
        ):
            raise ValueError(f"value_range must be two increasing numbers, got {list(value_range)}")
        self.x1, self.cond, self.root = x1, cond, Path(root)
        self.value_range = value_range
        self.class_names = None if class_names is None else list(class_names)
        self.fractions, self.split_seed = (val_fraction, test_fraction), split_seed

    def load(self) -> Mapping[str, Arrays]:
        """Read the data, check them, and divide them into splits."""
        if isinstance(self.x1, Dataset):
            if self.cond is not None:
                raise ValueError(
                    "cond must be None for a data set, whose items hold it, got "
                    f"{type(self.cond).__name__}"
                )
            x1, cond = _items(self.x1)
        else:
            x1 = _numbers(self.x1, self.root, "x1")
            cond = None if self.cond is None else _numbers(self.cond, self.root, "cond")
        columns = {"x1": _states(x1, self.value_range)}
        if cond is not None:
            columns["cond"] = self._conditions(cond, len(x1))
        keys = [hashlib.sha256(row.numpy().data).hexdigest() for row in columns["x1"].contiguous()]
        share, self.notes = share_of_test(self.fractions[1], len(x1))
        if columns["x1"].ndim == 3:  # the commonest such arrays are images
            self.notes.append(
                "read as sequences (N, T, C), not as gray images (N, H, W): with "
                f"{_range(x1)} they are images"
            )
        elif columns["x1"].ndim == 4 and columns["x1"].shape[1] not in (1, 3):
            self.notes.append("not read as images, which have 1 or 3 channels")
        shares = {"val": self.fractions[0], "test": share}
        parts = content_splits(keys, shares, self.split_seed)
        return {
            name: Arrays({key: column[part] for key, column in columns.items()})
            for name, part in parts.items()
        }

    def _conditions(self, cond: Tensor, count: int) -> Tensor:
        """Return labels as int64 or other conditions as float32; set the number of classes."""
        if cond.ndim == 0 or len(cond) != count:
            raise ValueError(f"cond must have {count} rows like x1, got shape {tuple(cond.shape)}")
        if cond.is_floating_point() and cond.ndim > 1:
            check_finite(cond, "cond")
            return cond.float()
        if cond.is_floating_point() or cond.dtype == torch.bool or cond.ndim > 1:
            raise TypeError(
                "cond must hold whole numbers (N,) as labels, or floats (N, *) of two or more "
                f"dimensions, got {cond.dtype} of shape {tuple(cond.shape)}; astype(int) makes "
                "whole numbers, reshape(-1, 1) a second dimension"
            )
        self.num_classes = len(self.class_names or range(max(int(cond.max()) + 1, 1)))
        check_labels(cond, self.num_classes, "cond")
        return cond.long()


def _numbers(source: Any, root: Path, name: str) -> Tensor:
    """Return a tensor, an array or the content of a file as a tensor of real numbers.

    Raises:
        TypeError: If the source is of another kind, or does not hold real numbers.
        ValueError: If a file is no ``.npy`` file of numbers, or there is no sample.
    """
    if isinstance(source, str | Path):
        source = _read(root / source, name)
    if isinstance(source, np.ndarray):
        if source.dtype.kind not in "biuf":
            raise TypeError(f"{name} must hold real numbers, got {source.dtype}")
        kind = source.dtype.newbyteorder("=")
        if kind.kind == "u" and kind.itemsize > 1:
            kind = np.dtype(np.int64)  # torch has few functions for larger unsigned numbers
        kind = np.dtype(np.float64) if kind.itemsize > 8 else kind
        source = torch.from_numpy(np.array(source, kind, order="C"))
    if not isinstance(source, Tensor):
        raise TypeError(
            f"{name} must be a tensor, an array, a .npy file or a data set of torch, got "
            f"{type(source).__name__}"
        )
    if source.is_complex() or source.is_meta:
        kind = "a tensor on the meta device" if source.is_meta else source.dtype
        raise TypeError(f"{name} must hold real numbers, got {kind}")
    if source.numel() == 0:
        raise ValueError(f"{name} must hold samples, got shape {tuple(source.shape)}")
    return source.detach().cpu()


def _read(file: Path, name: str) -> np.ndarray:
    """Read a ``.npy`` file without running code in it."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{name} must be a .npy file, got {file}; a relative path counts from {Path.cwd()}"
        )
    with file.open("rb") as opened:
        if opened.read(6) != b"\x93NUMPY":
            raise ValueError(f"{name} must be a .npy file, as numpy.save writes it, got {file}")
        opened.seek(0)
        try:
            return np.load(opened, allow_pickle=False)
        except (ValueError, EOFError, MemoryError) as error:
            raise ValueError(
                f"{name} must be a whole .npy file of numbers, without Python objects, got {file}: "
                f"{error}"
            ) from error


def _items(data: Dataset) -> tuple[Tensor, Tensor | None]:
    """Read all items of a data set as ``x1`` and ``cond``.

    Raises:
        TypeError: If the data set has no length, or an item is of another kind.
        ValueError: If items differ in shape, or only some have conditions.
    """
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise TypeError(
            f"x1 must be a data set with a length and items by number, got {type(data).__name__}"
        )
    rows: list[Tensor] = []
    conds: list[Tensor] = []
    for k in range(len(data)):  # type: ignore[arg-type]
        x1, cond = _parts(data[k], k)
        rows.append(x1)
        conds += [] if cond is None else [cond]
    if not rows:
        raise ValueError(f"x1 must hold samples, got an empty {type(data).__name__}")
    if len(conds) not in (0, len(rows)):
        raise ValueError(
            f"items of x1 must all have a cond or none, got {len(conds)} of {len(rows)} with one"
        )
    for name, several in (("x1", rows), ("cond", conds)):
        for k, value in enumerate(several):
            if (value.shape, value.dtype) != (several[0].shape, several[0].dtype):
                raise ValueError(
                    f"{name} of all items must have one shape and type, got {several[0].dtype} "
                    f"{tuple(several[0].shape)}, and {value.dtype} {tuple(value.shape)} in item {k}"
                )
    return torch.stack(rows), torch.stack(conds) if conds else None


def _parts(item: Any, number: int) -> tuple[Tensor, Tensor | None]:
    """Return ``x1`` and ``cond`` of an item as tensors."""
    if isinstance(item, Mapping) and "x1" in item and item.keys() <= {"x1", "cond"}:
        values = (item["x1"], item.get("cond"))
    elif isinstance(item, tuple | list) and len(item) in (1, 2):
        values = (*item, None)[:2]
    elif isinstance(item, Tensor | np.ndarray):
        values = (item, None)
    else:
        got = (
            f"keys {', '.join(map(str, item))}"
            if isinstance(item, Mapping)
            else type(item).__name__
        )
        raise TypeError(
            "items of x1 must be a tensor, a tuple (x1, cond), or a mapping with x1 and possibly "
            f"cond, got {got} in item {number}"
        )
    if not isinstance(values[0], Tensor | np.ndarray):
        raise TypeError(
            f"x1 of an item must be a tensor or an array, got {type(values[0]).__name__} in item "
            f"{number}; convert it in the data set, images by PILToTensor of torchvision"
        )
    x1 = _numbers(values[0], Path(), f"x1 of item {number}")
    if values[1] is None:
        return x1, None
    cond = values[1] if isinstance(values[1], Tensor) else np.asarray(values[1])
    return x1, _numbers(cond, Path(), f"cond of item {number}")


def _states(x1: Tensor, value_range: Sequence[float] | None) -> Tensor:
    """Return data as bytes ``(N, C, H, W)`` or float32, checked as `FromArrays` describes.

    Raises:
        TypeError: If the numbers are of a kind that needs a range.
        ValueError: If shape or range do not fit.
    """
    if x1.ndim < 2:
        raise ValueError(
            f"x1 must have two dimensions or more, (N, *), got shape {tuple(x1.shape)}; "
            "reshape(-1, 1) makes points of single numbers"
        )
    if value_range is None and x1.dtype != torch.uint8 and not x1.is_floating_point():
        raise TypeError(
            f"x1 must hold bytes (uint8) or floats, got {x1.dtype}; value_range, for example "
            "[0, 255], makes images of other numbers"
        )
    if x1.is_floating_point():
        check_finite(x1, "x1")
    channels = {x1.shape[1], x1.shape[3]} & {1, 3} if x1.ndim == 4 else set()
    if x1.dtype != torch.uint8 and value_range is None and not channels:
        return x1.float()
    x1 = _channels_first(x1)
    if x1.dtype == torch.uint8 and value_range is None:
        return x1
    low, high = value_range or (-1, 1)
    least, most = x1.min().item(), x1.max().item()
    if not (low <= least and most <= high) or (value_range is None and least >= 0):
        raise ValueError(
            f"x1 must hold images in [{low:g}, {high:g}], got values in [{least:g}, {most:g}]; "
            f"{_range(x1)} maps them"
            + (", value_range=[-1,1] keeps them" if low <= least and most <= high else "")
        )
    return (2 * (x1.double() - low) / (high - low) - 1).float()


def _range(x1: Tensor) -> str:
    """Return the option that makes images of numbers, with the usual range that holds them.

    >>> _range(torch.tensor([0.0, 0.5])), _range(torch.tensor([0.0, 9.0]))
    ('value_range=[0,1]', 'value_range=[0,255]')
    """
    least, most = x1.min().item(), x1.max().item()
    for low, high in ((0, 1), (-1, 1), (0, 255), (0, 65535)):
        if low <= least and most <= high:
            return f"value_range=[{low},{high}]"
    return "value_range=[<black>,<white>]"


def _channels_first(x1: Tensor) -> Tensor:
    """Return images ``(N, C, H, W)`` of images with channels first, last, or without channels."""
    if x1.ndim == 3:
        return x1[:, None]
    if x1.ndim == 4 and x1.shape[1] in (1, 3):
        return x1
    if x1.ndim == 4 and x1.shape[3] in (1, 3):
        return x1.permute(0, 3, 1, 2).contiguous()
    raise ValueError(
        "x1 must be images (N, C, H, W), (N, H, W, C) or (N, H, W) with 1 or 3 channels, got "
        f"shape {tuple(x1.shape)}; reshape them"
    )
