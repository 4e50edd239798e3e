"""A folder of image files."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.data.arrays import Index, positions
from flowkit.data.splits import SplitData, partition
from flowkit.metrics.pictures import from_uint8
from flowkit.types import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def square(image: "Image", size: int, channels: int = 3) -> Tensor:
    """Bring an image to ``size x size`` pixels, ``(channels, size, size)`` uint8.

    Turned as its EXIF orientation says, converted to RGB or gray, then the largest centered
    square is resampled once, with Pillow's Lanczos filter, which widens with the reduction
    (no aliasing). The square's corners may lie between pixels; none is rounded.

    Raises:
        ValueError: If the image has more than 8 bits per channel, which Pillow would clip.

    >>> from PIL import Image
    >>> square(Image.new("L", (6, 4), 200), size=2, channels=1).tolist()
    [[[200, 200], [200, 200]]]
    """
    import numpy as np
    from PIL import Image, ImageOps

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"image must have 8 bits per channel, got mode {image.mode}")
    image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image).reshape(size, size, channels)).permute(2, 0, 1)


def check_image_format(image_size: int, channels: int) -> None:
    """Require a size of at least one pixel, and gray or RGB."""
    check_at_least(image_size, 1, "image_size")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (gray) or 3 (RGB), got {channels}")


def raise_broken(broken: Sequence[str]) -> None:
    """Raise ``ValueError`` if there are broken files, naming the first of them."""
    if broken:
        shown = "; ".join(broken[:10]) + ("; …" if len(broken) > 10 else "")
        raise ValueError(
            f"image files must be readable, got {len(broken)} broken: {shown}; "
            "remove or replace them"
        )


def image_files(root: Path) -> list[str]:
    """Return the names of a folder's image files at any depth, relative to it and sorted.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"root must be a folder, got {root}")
    names = sorted(
        file.relative_to(root).as_posix()
        for file in root.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not names:
        raise ValueError(
            f"root must hold images ({', '.join(sorted(SUFFIXES))}), got none in {root}"
        )
    return names


def verify(files: Iterable[Path]) -> None:
    """Look into image files.

    Raises:
        ValueError: If some are none; the first of them are named.
    """
    from PIL import Image

    broken = []
    for file in files:
        try:
            with Image.open(file) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError) as error:
            broken.append(f"{file} ({error})")
    raise_broken(broken)


def decoded(files: Iterable[tuple[str, Callable[[], Any]]], size: int, channels: int) -> Tensor:
    """Decode files into one batch ``(N, channels, size, size)`` in [-1, 1], squared by ``square``.

    Args:
        files: Of each file a name for errors, and a function that gives what Pillow opens.
        size: Side of the images in pixels.
        channels: 1 (gray) or 3 (RGB).

    Raises:
        ValueError: If files do not decode; the first of them are named.
    """
    from PIL import Image

    images, broken = [], []
    for name, content in files:
        try:
            with Image.open(content()) as image:
                images.append(square(image, size, channels))
        except (OSError, SyntaxError, ValueError) as error:
            broken.append(f"{name} ({error})")
    raise_broken(broken)
    return from_uint8(torch.stack(images)) if images else torch.empty(0, channels, size, size)


@dataclass(frozen=True, eq=False)
class Files:
    """A split whose samples are image files, decoded when a batch asks for them.

    Args:
        root: The folder that names are relative to.
        names: The files.
        labels: Integer classes ``(N,)``, or None.
        image_size: Side of the square images.
        channels: 1 (gray) or 3 (RGB).
    """

    root: Path
    names: Sequence[str]
    labels: Tensor | None
    image_size: int
    channels: int = 3

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.names)

    def __getitem__(self, index: Index) -> Batch:
        """Decode some files into one batch.

        Raises:
            ValueError: If files do not decode; all of this batch are named.
        """
        rows = positions(index, len(self))
        files = [self.root / self.names[int(row)] for row in rows]
        opened = ((str(file), partial(Path, file)) for file in files)
        x1 = decoded(opened, self.image_size, self.channels)
        return Batch(x1=x1) if self.labels is None else Batch(x1=x1, cond=self.labels[rows])

    def fingerprint(self) -> str:
        """Return a SHA-256 of the format and of every file's name, size in bytes and label."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}\n".encode())
        labels = [None] * len(self) if self.labels is None else self.labels.tolist()
        for name, label in zip(self.names, labels, strict=True):
            size = (self.root / name).stat().st_size
            digest.update(f"{name} {size} {label}\n".encode())
        return digest.hexdigest()


class Folder(SplitData):
    """Image files, one sub-folder per class, or a flat folder without labels.

    ``x1 (B, channels, image_size, image_size)``; ``cond`` counts the sub-folders in
    alphabetical order. Files are found at any depth, decoded by the loader's workers and
    squared by ``square``: centered, resampled once.

    Args:
        root: The folder.
        image_size: Side of the square images in pixels.
        channels: 1 (gray) or 3 (RGB).
        batch_size: Samples per process and step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The share of the validation split, stratified by class.
        test_fraction: The share of the test split, stratified by class.
        split_seed: The seed of the splits.
        seed: The seed of the training stream.
        num_workers: Processes that read ahead.
        coupling: Pairs data with noise in the loader; see ``SplitData``.

    Raises:
        ValueError: If ``image_size`` or ``channels`` is out of range; on ``setup``, if there
            are no images, a class is empty, images lie beside class folders, or files are no
            images (all are looked at; damage beyond the header may show only when decoding).
        FileNotFoundError: On ``setup``, if there is no such folder.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        channels: int = 3,
        batch_size: int = 64,
        flip: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Any = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip, coupling=coupling
        )
        check_image_format(image_size, channels)
        self.root = Path(root)
        self.image_size, self.channels = image_size, channels
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = split_seed

    def load(self) -> Mapping[str, Files]:
        """Find the files, look into each, and cut them into splits."""
        names, labels = self._find()
        verify([self.root / name for name in names])
        parts = partition(len(names), self.fractions, self.split_seed, labels)
        return {
            name: Files(
                self.root,
                [names[i] for i in part],
                None if labels is None else labels[part],
                self.image_size,
                self.channels,
            )
            for name, part in zip(("train", "val", "test"), parts, strict=True)
        }

    def _find(self) -> tuple[list[str], Tensor | None]:
        names = image_files(self.root)
        folders = sorted(
            entry.name
            for entry in self.root.iterdir()
            if entry.is_dir() and not entry.name.startswith(".")
        )
        if not folders:
            return names, None
        classes = [name.partition("/")[0] for name in names]
        empty = sorted(set(folders) - set(classes))
        if empty:
            raise ValueError(f"class folders must hold images, got none in {', '.join(empty)}")
        if loose := sorted(set(classes) - set(folders)):
            raise ValueError(
                f"images must lie in class folders or all in {self.root} itself, got "
                f"{', '.join(loose[:10])} beside {', '.join(folders[:10])}"
            )
        self.num_classes, self.class_names = len(folders), folders
        return names, torch.tensor([folders.index(name) for name in classes])
