"""Image files in a folder, with one sub-folder per class or without classes."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_choice
from flowkit.couplings import Coupling
from flowkit.data.arrays import Index, positions
from flowkit.data.broken import FORMATS, BrokenFiles, check_mode, probe, unreadable, verify, why
from flowkit.data.files import (
    file_hashes,
    find_images,
    folder_splits,
    folders_of,
    share_of_test,
    split_files,
)
from flowkit.data.splits import SPLITS, SplitData, partition
from flowkit.metrics.pictures import from_uint8
from flowkit.types import Batch

if TYPE_CHECKING:
    from PIL.Image import Image


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

    check_mode(image)
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
        BrokenFiles: If a file cannot be decoded.
    """
    from PIL import Image

    images, broken = [], []
    for name, content in files:
        try:
            with Image.open(content(), formats=FORMATS) as image:
                images.append(square(image, size, channels))
        except unreadable() as error:
            broken.append(f"{name} ({why(error)})")
    if broken:
        raise BrokenFiles(broken)
    return from_uint8(torch.stack(images)) if images else torch.empty(0, channels, size, size)


@dataclass(frozen=True, eq=False)
class Files:
    """Split of image files. A file is decoded when a batch needs it.

    Args:
        root: The folder of the files.
        names: The files, relative to ``root``.
        hashes: The SHA-256 of the content of each file.
        labels: Integer classes ``(N,)``, or None.
        image_size: Side of the square images in pixels.
        channels: 1 (gray) or 3 (RGB).
    """

    root: Path
    names: Sequence[str]
    hashes: Sequence[str]
    labels: Tensor | None
    image_size: int
    channels: int = 3

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.names)

    def __getitem__(self, index: Index) -> Batch:
        """Decode the files at the positions of an index into one batch.

        Raises:
            BrokenFiles: If a file cannot be decoded.
        """
        rows = positions(index, len(self))
        files = [self.root / self.names[int(row)] for row in rows]
        opened = ((str(file), partial(Path, file)) for file in files)
        x1 = decoded(opened, self.image_size, self.channels)
        return Batch(x1=x1) if self.labels is None else Batch(x1=x1, cond=self.labels[rows])

    def fingerprint(self) -> str:
        """Return the SHA-256 of the format and of the name, content and label of each file."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}\n".encode())
        labels = [None] * len(self) if self.labels is None else self.labels.tolist()
        for name, content, label in zip(self.names, self.hashes, labels, strict=True):
            digest.update(f"{name} {content} {label}\n".encode())
        return digest.hexdigest()


class Folder(SplitData):
    """Image files in one sub-folder per class, or in a folder without sub-folders and labels.

    Batches hold ``x1 (B, channels, image_size, image_size)`` in [-1, 1]. With classes they hold
    ``cond (B,)``, the number of the sub-folder in alphabetical order, from 0. The sub-folders may
    have sub-folders of their own. The workers of the loader decode the files; `square` crops and
    resamples them.

    The split of a file follows from a hash of its name and content, see
    `flowkit.data.files.content_splits`. So new files move no file to another split. If the
    sub-folders have the names ``train`` and ``val`` or ``test``, they are the splits, and the
    classes are their sub-folders; a split without a folder is taken from ``train``.

    Hidden files and folders are left out, and links are followed, see
    `flowkit.data.files.find_images`. The summary says what was not read.

    Args:
        root: The folder.
        image_size: Side of the square images in pixels.
        channels: 1 (gray) or 3 (RGB).
        batch_size: Samples per process and training step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The share of the validation split.
        test_fraction: The share of the test split; None means 0.05, and more of fewer files, see
            `flowkit.data.files.share_of_test`.
        split_by: ``"content"`` as described above, or ``"order"``: evenly spaced places in the
            shuffled order of all files, as before version 0.2.
        split_seed: The seed of the splits.
        verify: Decode all files on ``setup``, not only some of each split.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs data with noise in the workers of the loader; see `SplitData`.

    Raises:
        ValueError: If ``image_size`` or ``channels`` is out of range. On ``setup``, if there are no
            images, a class is empty, images lie beside the class folders, or a file is not an
            image. ``setup`` checks the headers of all files and decodes some; other damage behind
            a header appears when the file is decoded, or with ``verify``.
        FileNotFoundError: On ``setup``, if the folder does not exist, or a link leads nowhere.

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
    'Folder: 17 train, 1 val, 2 test samples of shape (1, 8, 8), 2 classes (dark, light)'
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        channels: int = 3,
        batch_size: int = 64,
        flip: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float | None = None,
        split_by: str = "content",
        split_seed: int = 0,
        verify: bool = False,
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
        check_choice(split_by, ("content", "order"), "split_by")
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split_by, self.split_seed, self.verify = split_by, split_seed, verify

    def load(self) -> Mapping[str, Files]:
        """Find the files, check them, and divide them into splits."""
        names, left = find_images(self.root)
        given = folder_splits(self.root, names) if self.split_by == "content" else None
        verify([self.root / name for name in names])
        hashes = file_hashes(self.root, names)
        labels = self._labels(names, hashes, given)
        if self.split_by == "order" and not (self.known and self.known["files"]):
            share, notes = share_of_test(self.fractions["test"], len(names))
            shares = [cast(float, self.fractions["val"]), share]
            places = partition(len(names), shares, self.split_seed, labels)
            parts = dict(zip(SPLITS, places, strict=True))
        else:
            parts, notes = split_files(
                names, hashes, given, self.fractions, self.split_seed, self.known
            )
        splits = {
            split: Files(
                self.root,
                [names[i] for i in part],
                [hashes[i] for i in part],
                None if labels is None else labels[part],
                self.image_size,
                self.channels,
            )
            for split, part in parts.items()
        }
        probe(splits, self.verify)
        self.files = {
            name: (content, split)
            for split, files in splits.items()
            for name, content in zip(files.names, files.hashes, strict=True)
        }
        self.notes = [*notes, *left]
        return splits

    def _labels(
        self, names: Sequence[str], hashes: Sequence[str], given: Mapping[str, str] | None
    ) -> Tensor | None:
        """Return the classes of the files, None without class folders; set the class names."""
        depth = 0 if given is None else 1
        tops = [self.root / name for name in given] if given else [self.root]
        folders = sorted({name for top in tops for name in folders_of(top)})
        if not folders:
            return None
        classes = [(*name.split("/"), "")[depth] for name in names]
        if empty := sorted(set(folders) - set(classes)):
            raise ValueError(f"class folders must hold images, got no image in {', '.join(empty)}")
        if loose := sorted(set(classes) - set(folders)):
            raise ValueError(
                f"images must lie in class folders or all in {self.root} itself, got "
                f"{', '.join(loose[:10])} beside {', '.join(folders[:10])}"
            )
        if self.known:
            folders, numbers = _numbered(folders, classes, hashes, self.known)
        else:
            numbers = {name: number for number, name in enumerate(folders)}
        self.num_classes, self.class_names = len(folders), folders
        return torch.tensor([numbers[name] for name in classes])


def _numbered(
    folders: Sequence[str], classes: Sequence[str], hashes: Sequence[str], known: Mapping[str, Any]
) -> tuple[list[str], dict[str, int]]:
    """Return the classes by number, with those of a record first, and the number of each folder.

    A folder that the record does not know is the class of most of its files in the record, under
    its new name, or else a new class.
    """
    names = list(known["classes"] or [])
    of_content = {
        content: part
        for file, (content, _) in known["files"].items()
        for part in file.split("/")[:-1]
        if part in names
    }
    numbers = {folder: names.index(folder) for folder in folders if folder in names}
    for folder in folders:
        own = (of_content.get(h) for name, h in zip(classes, hashes, strict=True) if name == folder)
        votes = Counter(name for name in own if name is not None and name not in folders)
        if folder not in numbers and votes:
            numbers[folder] = list(known["classes"]).index(votes.most_common(1)[0][0])
            names[numbers[folder]] = folder
        elif folder not in numbers:
            numbers[folder] = len(names)
            names.append(folder)
    return names, numbers
