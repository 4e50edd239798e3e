"""Image files in a folder, with one sub-folder per class or without classes."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.couplings import Coupling
from flowkit.data.arrays import Index, positions
from flowkit.data.splits import SplitData, partition
from flowkit.metrics.pictures import from_uint8
from flowkit.types import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow may read, whatever the name of a file says: for PostScript it would start a program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def square(image: "Image", size: int, channels: int = 3) -> Tensor:
    """Crop an image to its central square and resample it to ``size x size`` pixels.

    The image is first rotated according to its EXIF orientation and converted to RGB or gray. Then
    Pillow's Lanczos filter resamples the largest centered square in one step. The width of the
    filter grows with the reduction, so there is no aliasing. The corners of the square may lie
    between pixels: they are not rounded.

    Args:
        image: The image.
        size: Side of the result in pixels.
        channels: 1 (gray) or 3 (RGB).

    Returns:
        The pixels ``(channels, size, size)`` as uint8.

    Raises:
        ValueError: If the image has more than 8 bits per channel. Pillow would clip its values.

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
    """Require a size of at least one pixel, and 1 or 3 channels.

    Raises:
        ValueError: If a value is out of range.
    """
    check_at_least(image_size, 1, "image_size")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (gray) or 3 (RGB), got {channels}")


def raise_broken(broken: Sequence[str]) -> None:
    """Raise an error that names the first ten broken files, if there are broken files.

    Args:
        broken: Name and error of each broken file.

    Raises:
        ValueError: If ``broken`` is not empty.
    """
    if broken:
        shown = "; ".join(broken[:10]) + ("; …" if len(broken) > 10 else "")
        raise ValueError(
            f"image files must be readable, got {len(broken)} broken: {shown}; "
            "remove or replace them"
        )


def image_files(root: Path) -> list[str]:
    """List the image files of a folder and of its sub-folders at any depth.

    Hidden files are left out.

    Returns:
        The names relative to the folder, sorted.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the folder holds no images.
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
            f"root must hold images ({', '.join(sorted(SUFFIXES))}), got no image in {root}"
        )
    return names


def verify(files: Iterable[Path]) -> None:
    """Check the headers of image files.

    Raises:
        ValueError: If a file is not a readable image. The error names the first ten such files.
    """
    from PIL import Image

    broken = []
    for file in files:
        try:
            with Image.open(file, formats=FORMATS) as image:
                image.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            broken.append(f"{file} ({error})")
    raise_broken(broken)


def decoded(files: Iterable[tuple[str, Callable[[], Any]]], size: int, channels: int) -> Tensor:
    """Decode image files into one batch of square images, see `square`.

    Args:
        files: For each file, its name in errors and a function that returns a path or an open
            file for Pillow.
        size: Side of the images in pixels.
        channels: 1 (gray) or 3 (RGB).

    Returns:
        The images ``(N, channels, size, size)`` in [-1, 1].

    Raises:
        ValueError: If a file cannot be decoded. The error names the first ten such files.
    """
    from PIL import Image

    images, broken = [], []
    for name, content in files:
        try:
            with Image.open(content(), formats=FORMATS) as image:
                images.append(square(image, size, channels))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            broken.append(f"{name} ({error})")
    raise_broken(broken)
    return from_uint8(torch.stack(images)) if images else torch.empty(0, channels, size, size)


@dataclass(frozen=True, eq=False)
class Files:
    """Split of image files. A file is decoded when a batch needs it.

    Args:
        root: The folder of the files.
        names: The files, relative to ``root``.
        labels: Integer classes ``(N,)``, or None.
        image_size: Side of the square images in pixels.
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
        """Decode the files at the positions of an index into one batch.

        Raises:
            ValueError: If a file cannot be decoded. The error names the first ten such files.
        """
        rows = positions(index, len(self))
        files = [self.root / self.names[int(row)] for row in rows]
        opened = ((str(file), partial(Path, file)) for file in files)
        x1 = decoded(opened, self.image_size, self.channels)
        return Batch(x1=x1) if self.labels is None else Batch(x1=x1, cond=self.labels[rows])

    def fingerprint(self) -> str:
        """Return the SHA-256 of the format and of the name, size and label of each file."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}\n".encode())
        labels = [None] * len(self) if self.labels is None else self.labels.tolist()
        for name, label in zip(self.names, labels, strict=True):
            size = (self.root / name).stat().st_size
            digest.update(f"{name} {size} {label}\n".encode())
        return digest.hexdigest()


class Folder(SplitData):
    """Image files in one sub-folder per class, or in a folder without sub-folders and labels.

    Batches hold ``x1 (B, channels, image_size, image_size)`` in [-1, 1]. With classes they hold
    ``cond (B,)``, the number of the sub-folder in alphabetical order, from 0. The sub-folders may
    have sub-folders of their own. The workers of the loader decode the files; `square` crops and
    resamples them.

    Args:
        root: The folder.
        image_size: Side of the square images in pixels.
        channels: 1 (gray) or 3 (RGB).
        batch_size: Samples per process and training step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The share of the validation split, stratified by class.
        test_fraction: The share of the test split, stratified by class.
        split_seed: The seed of the splits.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs data with noise in the workers of the loader; see `SplitData`.

    Raises:
        ValueError: If ``image_size`` or ``channels`` is out of range. On ``setup``, if there are no
            images, a class is empty, images lie beside the class folders, or a file is not an
            image. ``setup`` checks the headers of all files; damage behind a header appears when
            the file is decoded.
        FileNotFoundError: On ``setup``, if the folder does not exist.

    >>> import tempfile
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> for name, level in (("dark", 50), ("light", 200)):
    ...     (root / name).mkdir()
    ...     for k in range(10):
    ...         Image.new("L", (12, 8), level).save(root / name / f"{k}.png")
    >>> data = Folder(root, image_size=8, channels=1, val_fraction=0.1, test_fraction=0.1)
    >>> data.setup()
    >>> data.summary()
    'Folder: 16 train, 2 val, 2 test samples of shape (1, 8, 8), 2 classes (dark, light)'
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
        coupling: Coupling | None = None,
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
        """Find the files, check their headers, and divide them into splits."""
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
        """Find the files and their classes, None without class folders; set the class names."""
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
            raise ValueError(f"class folders must hold images, got no image in {', '.join(empty)}")
        if loose := sorted(set(classes) - set(folders)):
            raise ValueError(
                f"images must lie in class folders or all in {self.root} itself, got "
                f"{', '.join(loose[:10])} beside {', '.join(folders[:10])}"
            )
        self.num_classes, self.class_names = len(folders), folders
        return names, torch.tensor([folders.index(name) for name in classes])
