"""Sets of samples in image files: a folder, or tar files. See `flowkit.data.sample_sets`."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowkit.data.broken import FORMATS, BrokenFiles, check_mode, unreadable, why
from flowkit.data.files import find_images, first_ten
from flowkit.data.pixels import Resize, array_of, jpeg_quality
from flowkit.data.sample_sets import Images, state_of
from flowkit.data.shards import members
from flowkit.provenance import read_json, tensor_hash

LABELS = "dataset.json"  # classes of the files of a folder, as the tools of EDM write them
GRAY = frozenset({"1", "L", "LA"})


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in files, decoded when they are read.

    Args:
        name: Name in errors and records.
        kind: ``"folder"`` or ``"tar"``.
        names: Name of each image in errors.
        content: Returns a path or an open file for Pillow by the position of an image.
        labels: Classes ``(N,)``, or None.
        classes: Names of the classes, or None if they have only numbers.
        state: See `flowkit.data.sample_sets.SampleSet`.
        shape: Shape of the images as they are read.
        stored: How they are stored.
        resize: What is done to each image, or None.
    """

    name: str
    names: Sequence[str]
    content: Callable[[int], Any]
    labels: Tensor | None
    classes: Sequence[str] | None
    state: str
    shape: tuple[int, int, int]
    stored: Mapping[str, Any]
    resize: Resize | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def read(self, rows: Tensor) -> Images:
        """Decode the images at positions, and return them with their classes.

        Raises:
            BrokenFiles: If an image cannot be decoded. It names the first ten of these images.
        """
        from PIL import Image

        channels, height, width = self.shape
        found, broken = np.empty((len(rows), height, width, channels), np.uint8), []
        for place, row in zip(found, rows.tolist(), strict=True):
            try:
                with Image.open(self.content(row), formats=FORMATS) as image:
                    array = array_of(image, channels)
            except unreadable() as error:
                broken.append(f"{self.names[row]} ({why(error)})")
                continue
            if self.resize is not None:
                pixels = torch.from_numpy(array.reshape(*array.shape[:2], channels).copy())
                array = self.resize(pixels.permute(2, 0, 1)).permute(1, 2, 0).numpy()
            elif array.shape[:2] != (height, width):
                broken.append(f"{self.names[row]} (turned on its side; give resize=)")
                continue
            place[:] = array.reshape(place.shape)
        if broken:
            raise BrokenFiles(broken)
        labels = None if self.labels is None else self.labels[rows]
        return Images(torch.from_numpy(found).permute(0, 3, 1, 2), labels)


def folder_of_images(
    root: Path, argument: str, class_folders: bool = False, resize: Resize | None = None
) -> ImageFiles:
    """Open the images of a folder and of its sub-folders at any depth, in natural order.

    Their classes are in the file ``dataset.json``, if the folder has one: a mapping with
    ``"labels": [["name", class], …]``.

    Args:
        root: The folder.
        argument: Name of the option, for errors.
        class_folders: Whether the sub-folders of the folder are classes.
        resize: What is done to each image; None requires images of one size.

    Raises:
        BrokenFiles: If a file is no image.
        ValueError: If there is no image, if sizes differ, or not all images have a class.

    >>> import tempfile
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> for k in range(11):
    ...     Image.new("L", (4, 4), k).save(root / f"{k}.png")
    >>> found = folder_of_images(root, "samples")
    >>> found.read(torch.arange(11)).pixels[:, 0, 0, 0].tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    """
    try:
        names = sorted(find_images(root)[0], key=natural)
    except ValueError as error:
        raise ValueError(f"{argument} {str(error).removeprefix('root ')}") from error
    labels, classes = None, None
    if class_folders:
        labels, classes = _by_folder(names, root, argument)
    elif (root / LABELS).is_file():
        labels = _listed(root / LABELS, names)
    files = [root / name for name in names]
    paths = [str(file) for file in files]
    return _opened(
        str(root),
        "folder",
        paths,
        paths.__getitem__,
        (labels, classes),
        state_of(files, None if labels is None else tensor_hash(labels)),
        argument,
        resize,
    )


def tar_of_images(
    files: Sequence[Path], name: str, argument: str, resize: Resize | None = None
) -> ImageFiles:
    """Open the images of tar files in the format of WebDataset, in their order in the files.

    Args:
        files: The tar files.
        name: Name in errors and records.
        argument: Name of the option, for errors.
        resize: What is done to each image; None requires images of one size.

    Raises:
        BrokenFiles: If a member is no image.
        ValueError: If a tar file cannot be read, sizes differ, or only some images have a class.
    """
    places = [(file, *member) for file in files for member in members(file, Counter())]
    labels = [place[4] for place in places]
    if None in labels and any(label is not None for label in labels):
        raise ValueError(f"{argument} must have a class for all images or for none, got some")

    def content(row: int) -> io.BytesIO:
        file, offset, size = places[row][:3]
        with file.open("rb") as opened:
            opened.seek(offset)
            return io.BytesIO(opened.read(size))

    return _opened(
        name,
        "tar",
        [f"{file} at byte {offset}" for file, offset, *_ in places],
        content,
        (None if None in labels else torch.tensor(labels), None),
        state_of(files),
        argument,
        resize,
    )


def natural(name: str) -> list[Any]:
    """Return the key of the natural order of names, in which 2 comes before 10.

    >>> sorted(["b/10.png", "b/2.png", "a.png"], key=natural)
    ['a.png', 'b/2.png', 'b/10.png']
    """
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", name)]


def _opened(
    name: str,
    kind: str,
    names: Sequence[str],
    content: Callable[[int], Any],
    classes: tuple[Tensor | None, Sequence[str] | None],
    state: str,
    argument: str,
    resize: Resize | None,
) -> ImageFiles:
    """Read the headers of all images, check them, and return the set."""
    sizes: dict[tuple[int, int], list[str]] = {}
    formats: Counter[str] = Counter()
    gray, broken, quality = True, [], None
    for one, found in zip(names, _headers(names, content), strict=True):
        if isinstance(found, str):
            broken.append(found)
            continue
        size, mode, form, level = found
        sizes.setdefault(size, []).append(one)
        formats[form], gray = formats[form] + 1, gray and mode in GRAY
        quality = quality or level
    if broken:
        raise BrokenFiles(broken, f"{argument} must be readable image files")
    if resize is None and len(sizes) > 1:
        raise ValueError(_mixed(sizes, argument))
    channels, (width, height) = 1 if gray else 3, next(iter(sizes))
    shape = (channels, height, width) if resize is None else (channels, resize.size, resize.size)
    stored: dict[str, Any] = {"kind": kind, "file_format": ", ".join(sorted(formats))}
    stored |= {"quantization": None} | ({} if quality is None else {"jpeg_quality": quality})
    return ImageFiles(name, names, content, *classes, state, shape, stored, resize)


def _headers(names: Sequence[str], content: Callable[[int], Any]) -> Iterator[Any]:
    """Yield size, mode, format and JPEG quality of each image, or in words why it is broken.

    The quality is that of the first file only; of others it is None.
    """
    from PIL import Image

    first = True
    for row, name in enumerate(names):
        try:
            with Image.open(content(row), formats=FORMATS) as image:
                check_mode(image)
                form = str(image.format).lower()
                level = jpeg_quality(image) if first and form == "jpeg" else None
                found = (image.size, image.mode, form, level)
            first = first and form != "jpeg"
            yield found
        except unreadable() as error:
            yield f"{name} ({why(error)})"


def _mixed(sizes: Mapping[tuple[int, int], Sequence[str]], argument: str) -> str:
    """Return the message on images of several sizes."""
    ranked = sorted(sizes.items(), key=lambda item: -len(item[1]))
    listed = [f"{w}x{h} ({len(own):,}, {own[0]})" for (w, h), own in ranked]
    return (
        f"{argument} must be images of one size, got {len(sizes)} sizes: {first_ten(listed)}; "
        f"resize={min(ranked[0][0])} crops and resamples all"
    )


def _by_folder(names: Sequence[str], root: Path, argument: str) -> tuple[Tensor, list[str]]:
    """Return the number of the sub-folder of each file, and the names of the sub-folders."""
    folders = [name.split("/")[0] if "/" in name else "" for name in names]
    if "" in folders:
        raise ValueError(
            f"{argument} must lie in class folders with class_folders=true, got "
            f"{names[folders.index('')]} in {root} itself"
        )
    classes = sorted(set(folders), key=natural)
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in folders]), classes


def _listed(file: Path, names: Sequence[str]) -> Tensor | None:
    """Return the class of each file as a list has them; None if the list has no labels."""
    found = read_json(file)
    pairs = found.get("labels") if isinstance(found, dict) else None
    if pairs is None:
        return None
    try:
        by_name = {name: label for name, label in pairs}  # noqa: C416  # it also checks pairs
        labels = [by_name[name] for name in names]
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"labels in {file} must hold a pair of name and class for each image, got {error!r}"
        ) from error
    if not all(type(label) is int and 0 <= label < 2**31 for label in labels):
        raise ValueError(f"labels in {file} must be whole numbers from 0, got others")
    return torch.tensor(labels)
