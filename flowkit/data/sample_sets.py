"""Sets of samples, read by rows: npz files, tensors and splits of data; image files are beside.

A set has a number of images of one size, and possibly their classes. Memory holds only the images
that were asked for.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flowkit.data.arrays import Split
from flowkit.data.npz import Npz
from flowkit.data.pixels import Resize, equal_channels
from flowkit.metrics.pictures import to_uint8


class Images(NamedTuple):
    """Images ``(n, C, H, W)`` of uint8 and their integer classes ``(n,)``, or None."""

    pixels: Tensor
    labels: Tensor | None


@runtime_checkable
class SampleSet(Protocol):
    """Protocol of a set of images of one size."""

    @property
    def name(self) -> str:
        """Name in errors and records, for example the path."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of an image, with 1 or 3 channels."""
        ...

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the classes, or None if they have only numbers."""
        ...

    @property
    def stored(self) -> Mapping[str, Any]:
        """Storage of the images: ``kind``, ``file_format``, ``quantization``."""
        ...

    @property
    def state(self) -> str:
        """A hash that changes with the files. It is known without reading them."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, rows: Tensor) -> Images:
        """Return the images at increasing positions ``(n,)``, and their classes."""
        ...


@dataclass(frozen=True, eq=False)
class NpzImages:
    """Images in ``arr_0 (N, H, W, 1 or 3)`` of an npz file, and classes in ``arr_1 (N,)``.

    It is the format of ADM's evaluations. Reading it needs memory for one batch only, see `Npz`.

    Args:
        npz: The file.
        argument: Name of the option, for errors.

    Raises:
        TypeError: If the images are not bytes, or the classes no whole numbers.
        ValueError: If the shape is another, or the set is empty.
    """

    npz: Npz
    argument: str = "samples"
    classes: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check kind and shape of the arrays."""
        shape, dtype = self.npz.shape("arr_0"), self.npz.dtype("arr_0")
        if len(shape) != 4 or shape[3] not in (1, 3):
            raise ValueError(
                f"{self.argument} must hold images (N, H, W, 3) in arr_0, got shape {shape} in "
                f"{self.npz.file}{_turned(shape)}"
            )
        if 0 in shape:
            raise ValueError(f"{self.argument} must hold images, got none in {self.npz.file}")
        if dtype != np.uint8:
            raise TypeError(
                f"{self.argument} must hold uint8 images in arr_0, got {self._values()}"
            )
        if "arr_1" in self.npz:
            kind, count = self.npz.dtype("arr_1"), self.npz.shape("arr_1")
            if kind.kind not in "iu" or count != shape[:1]:
                raise TypeError(
                    f"arr_1 of {self.argument} must hold {shape[0]} whole numbers as classes, got "
                    f"{kind} of shape {count} in {self.npz.file}"
                )

    def _values(self) -> str:
        """Describe images that are not bytes: type, range of the first of them, and the fix."""
        dtype = self.npz.dtype("arr_0")
        if dtype.kind not in "iuf" or dtype.itemsize > 8:  # of which torch has no tensors
            return f"{dtype} in {self.npz.file}"
        first = self.npz.rows("arr_0", torch.arange(min(len(self), 256))).double()
        low, high = first.min().item(), first.max().item()
        found = f"{dtype} in [{low:g}, {high:g}] in {self.npz.file}"
        for top, fix in (
            ((-1, 1), "(127.5 * (x + 1)).round()"),
            ((0, 1), "(255 * x).round()"),
            ((0, 255), "x.round()"),
        ):
            if top[0] <= low and high <= top[1] and (low < 0 or top[0] == 0):
                return f"{found}; write {fix}.astype(numpy.uint8)"
        return f"{found}; map them to whole numbers in [0, 255] as numpy.uint8"

    def __len__(self) -> int:
        """Return the number of images."""
        return self.npz.shape("arr_0")[0]

    @property
    def name(self) -> str:
        """Path of the file."""
        return str(self.npz.file)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of an image."""
        _, height, width, channels = self.npz.shape("arr_0")
        return channels, height, width

    @property
    def stored(self) -> Mapping[str, Any]:
        """Storage of the images."""
        return {"kind": "npz", "file_format": None, "quantization": None}

    @property
    def state(self) -> str:
        """Hash of path, size and time of change of the file."""
        return state_of([self.npz.file])

    def read(self, rows: Tensor) -> Images:
        """Return the images at increasing positions, and their classes."""
        return Images(
            self.npz.rows("arr_0", rows).permute(0, 3, 1, 2),
            None if self._labels is None else self._labels[rows],
        )

    @cached_property
    def _labels(self) -> Tensor | None:
        """All classes, or None."""
        if "arr_1" not in self.npz:
            return None
        return torch.from_numpy(self.npz.whole("arr_1").astype(np.int64))


def _turned(shape: tuple[int, ...]) -> str:
    """Return the fix for images in another order, as the end of an error."""
    if len(shape) == 4 and shape[1] in (1, 3):
        return "; channels are last: write x.transpose(0, 2, 3, 1)"
    if len(shape) != 3:
        return ""
    return "; of one image write x[None]" if shape[2] in (1, 3) else "; write x[..., None]"


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples in the tensors that ``flowkit sample format=pt`` writes: floats in [-1, 1].

    Args:
        file: The file.
        samples: The samples ``(N, C, H, W)``, mapped into memory.
        labels: Classes ``(N,)``, or None.
        quantization: The rule from floats to bytes, see `flowkit.metrics.to_uint8`.
    """

    file: Path
    samples: Tensor
    labels: Tensor | None
    quantization: str
    classes: Sequence[str] | None = None

    @classmethod
    def open(cls, file: Path, argument: str, quantization: str) -> "Drawn":
        """Map the file, with torch's ``weights_only``.

        Raises:
            ValueError: If the file holds something else than images of samples.
        """
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises a dozen kinds of errors for a damaged file
            raise ValueError(
                f"{argument} must be a file of flowkit sample format=pt, got {file}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        samples = content.get("samples") if isinstance(content, dict) else None
        if not isinstance(samples, Tensor) or not samples.is_floating_point():
            raise ValueError(
                f"{argument} must hold floats under 'samples', as flowkit sample writes them, got "
                f"others in {file}"
            )
        if samples.ndim != 4 or samples.shape[1] not in (1, 3) or not len(samples):
            raise ValueError(
                f"{argument} must hold images (N, 1 or 3, H, W), got shape {tuple(samples.shape)} "
                f"in {file}"
            )
        return cls(file, samples, _classes(content.get("cond")), quantization)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    @property
    def name(self) -> str:
        """Path of the file."""
        return str(self.file)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of an image."""
        return cast(Any, tuple(self.samples.shape[1:]))

    @property
    def stored(self) -> Mapping[str, Any]:
        """Storage of the images."""
        return {"kind": "pt", "file_format": None, "quantization": self.quantization}

    @property
    def state(self) -> str:
        """Hash of path, size and time of change of the file, and of the rule."""
        return state_of([self.file], self.quantization)

    def read(self, rows: Tensor) -> Images:
        """Return the images at increasing positions, and their classes.

        Raises:
            ValueError: If a sample is not finite; the error has its number.
        """
        samples = self.samples[rows]
        finite = samples.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            first = int(rows[~finite][0])
            raise ValueError(
                f"samples must be finite, got NaN or infinity in sample {first} of {self.file}"
            )
        labels = None if self.labels is None else self.labels[rows]
        return Images(to_uint8(samples, self.quantization), labels)


def _classes(cond: Any) -> Tensor | None:
    """Return a condition if it is integer classes ``(N,)``, else None."""
    known = isinstance(cond, Tensor) and cond.ndim == 1 and not cond.is_floating_point()
    return cond if known else None


@dataclass(frozen=True, eq=False)
class OfSplit:
    """The images of a split of a data module.

    Args:
        split: The split.
        name: Name in records, for example ``"IDX, test split"``.
        num_classes: Number of classes of the data, or None.
        classes: Names of the classes, or None.
    """

    split: Split
    name: str
    num_classes: int | None
    classes: Sequence[str] | None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.split)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(C, H, W)`` of an image."""
        return cast(Any, tuple(self.split[:1]["x1"].shape[1:]))

    @property
    def stored(self) -> Mapping[str, Any]:
        """Storage of the images."""
        return {"kind": "data", "file_format": None, "quantization": None}

    @property
    def state(self) -> str:
        """Hash of the content of the split."""
        return self.split.fingerprint()

    def read(self, rows: Tensor) -> Images:
        """Return the images at increasing positions, and their classes."""
        batch = self.split[rows]
        labels = None if self.num_classes is None else _classes(batch.get("cond"))
        return Images(to_uint8(batch["x1"]), labels)


@dataclass(frozen=True, eq=False)
class Resized:
    """A set of images of arrays, whose images are resized when they are read."""

    images: SampleSet
    resize: Resize

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def name(self) -> str:
        """Name of the images."""
        return self.images.name

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the classes, or None."""
        return self.images.classes

    @property
    def stored(self) -> Mapping[str, Any]:
        """Storage of the images."""
        return self.images.stored

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape ``(C, size, size)`` of an image."""
        return self.images.shape[0], self.resize.size, self.resize.size

    @property
    def state(self) -> str:
        """The state of the images and the resize."""
        return f"{self.images.state} {self.resize}"

    def read(self, rows: Tensor) -> Images:
        """Return the images at increasing positions, and their classes."""
        pixels, labels = self.images.read(rows)
        return Images(torch.stack([self.resize(one) for one in pixels]), labels)


def is_gray(images: SampleSet) -> bool:
    """Return True if all images are gray; sets in color are known by their first images.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.npz"
    >>> np.savez(file, arr_0=np.full((9, 4, 4, 3), 7, np.uint8))
    >>> found = NpzImages(Npz.open(file))
    >>> found.shape, is_gray(found)
    ((3, 4, 4), True)
    """
    batches = torch.arange(len(images)).split(64)
    return images.shape[0] == 1 or all(
        bool(equal_channels(images.read(rows).pixels).all()) for rows in batches
    )


def state_of(files: Iterable[Path], *more: object) -> str:
    """Return a hash of the paths, sizes and times of change of files, and of further values."""
    digest = hashlib.sha256(repr(more).encode())
    for file in files:
        found = file.stat()
        digest.update(f"{file.absolute()} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()
