"""Image files in one folder, and their mask files in another folder."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import cast

import torch
from torch import Tensor

from flowkit.checks import check_choice
from flowkit.data.arrays import Index, positions
from flowkit.data.broken import FORMATS, BrokenFiles, probe, unreadable, verify, why
from flowkit.data.files import (
    check_root,
    file_hashes,
    find_images,
    first_ten,
    folder_splits,
    share_of_test,
    split_files,
)
from flowkit.data.folder import Files, check_image_format
from flowkit.data.splits import SPLITS, SplitData, partition
from flowkit.types import Batch

LOSSLESS = frozenset({".bmp", ".gif", ".png", ".tif", ".tiff"})
LABEL_MODES = frozenset({"1", "L", "P", "I", "I;16"})  # Pillow's modes with one number per pixel
Colors = Sequence[Sequence[int]]


def read_mask(file: str | Path, size: int, colors: Colors | None = None) -> Tensor:
    """Read a mask file as labels ``(size, size)`` of int64.

    The mask is cropped to the central square, as in `flowkit.data.folder.square`, and resampled by
    nearest neighbors. A label is the gray level or the palette index of a pixel. With ``colors``,
    a label is the position of the pixel's color in ``colors``.

    Args:
        file: The mask file.
        size: Side of the result in pixels.
        colors: RGB triples in 0…255, in the order of their labels; None for masks of one channel.

    Raises:
        ValueError: If ``colors`` is None and the file holds colors, or the file holds a color that
            is not in ``colors``.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(file, formats=FORMATS) as image:
        if colors is None and image.mode not in LABEL_MODES:
            raise ValueError(
                f"mask must hold one label per pixel, got mode {image.mode}; give colors for a "
                "color mask"
            )
        image = ImageOps.exif_transpose(image)
        image = image if colors is None else image.convert("RGB")
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.NEAREST)
        values = torch.from_numpy(np.array(image).astype(np.int64))
    if colors is None:
        return values
    weights = torch.tensor([1 << 16, 1 << 8, 1])
    keys, order = (torch.tensor(colors) * weights).sum(1).sort()
    wanted = (values * weights).sum(2)
    place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    if bool((other := keys[place] != wanted).any()):
        raise ValueError(f"mask must hold only the given colors, got {values[other][0].tolist()}")
    return order[place]


@dataclass(frozen=True, eq=False)
class MaskedFiles:
    """Split of image files and mask files. A file is decoded when a batch needs it.

    Args:
        images: The image files.
        masks: The mask file of each image, in the same order.
        hashes: The SHA-256 of the content of each mask file.
        colors: The colors of the labels, see `read_mask`.
    """

    images: Files
    masks: Sequence[Path]
    hashes: Sequence[str]
    colors: Colors | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: Index) -> Batch:
        """Decode the images and masks at the positions of an index into one batch.

        Raises:
            BrokenFiles: If a file cannot be decoded or holds another color.
        """
        rows = positions(index, len(self))
        masks, broken, size = [], [], self.images.image_size
        for row in rows.tolist():
            try:
                masks.append(read_mask(self.masks[row], size, self.colors))
            except unreadable() as error:
                broken.append(f"{self.masks[row]} ({why(error)})")
        if broken:
            raise BrokenFiles(broken, "masks must be readable labels")
        cond = torch.stack(masks) if masks else torch.empty(0, size, size, dtype=torch.long)
        return Batch(x1=self.images[rows]["x1"], cond=cond)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the images' fingerprint, the masks' names and content, and colors."""
        digest = hashlib.sha256(f"{self.images.fingerprint()} {self.colors}\n".encode())
        for mask, content in zip(self.masks, self.hashes, strict=True):
            digest.update(f"{mask.name} {content}\n".encode())
        return digest.hexdigest()


class MaskFolder(SplitData):
    """Image files in ``root/images`` and their mask files in ``root/masks``.

    Batches hold ``x1 (B, channels, image_size, image_size)`` in [-1, 1] and labels
    ``cond (B, image_size, image_size)`` of int64. A mask has the name of its image, apart from the
    suffix, and the same size in pixels. It is stored in a format without loss, for example PNG.
    `flowkit.data.folder.square` crops and resamples the images, `read_mask` the masks. If a
    training image is mirrored, its mask is mirrored too.

    Files are found and divided into splits as in `flowkit.data.Folder`, by the name and the content
    of the images; folders ``images/train``, ``images/val`` and ``images/test`` are splits.

    Args:
        root: The folder with the folders ``images`` and ``masks``.
        image_size: Side of the square images in pixels.
        channels: Channels of the images: 1 (gray) or 3 (RGB).
        colors: RGB triples in 0…255, in the order of their labels, for color masks. With None, the
            labels are gray levels or palette indices.
        batch_size: Samples per process and training step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The share of the validation split.
        test_fraction: The share of the test split; None means 0.05, and more of fewer files, see
            `flowkit.data.files.share_of_test`.
        split_by: ``"content"``, or ``"order"`` as before version 0.2; see `flowkit.data.Folder`.
        split_seed: The seed of the splits.
        verify: Decode all files on ``setup``, not only some of each split.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.

    Raises:
        ValueError: If ``image_size`` or ``channels`` is out of range, or ``colors`` does not hold
            different triples. On ``setup``, if an image has no mask, a mask has another size than
            its image, or a file is not an image.
        FileNotFoundError: On ``setup``, if a folder does not exist.

    >>> import tempfile
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> for part, levels in (("images", (50, 200)), ("masks", (0, 1))):
    ...     (root / part).mkdir()
    ...     for k in range(20):
    ...         Image.new("L", (12, 8), levels[k % 2]).save(root / part / f"{k}.png")
    >>> data = MaskFolder(root, image_size=8, channels=1, batch_size=4)
    >>> data.setup()
    >>> data.stream()[0]["cond"].shape, data.train[:]["cond"].unique().tolist()
    (torch.Size([4, 8, 8]), [0, 1])
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        channels: int = 3,
        colors: Colors | None = None,
        batch_size: int = 64,
        flip: bool = False,
        val_fraction: float = 0.05,
        test_fraction: float | None = None,
        split_by: str = "content",
        split_seed: int = 0,
        verify: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip)
        check_image_format(image_size, channels)
        self.root, self.image_size, self.channels = Path(root), image_size, channels
        self.colors = None if colors is None else [list(color) for color in colors]
        check_choice(split_by, ("content", "order"), "split_by")
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split_by, self.split_seed, self.verify = split_by, split_seed, verify
        if self.colors is not None:
            _check_colors(self.colors)

    def load(self) -> Mapping[str, MaskedFiles]:
        """Find images and masks, check their headers, and divide them into splits."""
        check_root(self.root)
        images, masks = self.root / "images", self.root / "masks"
        if missing := [folder.name for folder in (images, masks) if not folder.is_dir()]:
            raise FileNotFoundError(
                "root must be a folder with the folders images and masks, got no "
                f"{' and no '.join(missing)} in {self.root}"
            )
        names, left = find_images(images)
        given = folder_splits(images, names) if self.split_by == "content" else None
        _check_stems(names)
        labels = _masks_of(names, masks)
        verify(images / name for name in names)
        verify((masks / name for name in labels), masks=True)
        _check_sizes([images / name for name in names], [masks / name for name in labels])
        hashes, contents = file_hashes(images, names), file_hashes(masks, labels)
        if self.split_by == "order" and not (self.known and self.known["files"]):
            share, notes = share_of_test(self.fractions["test"], len(names))
            shares = [cast(float, self.fractions["val"]), share]
            places = partition(len(names), shares, self.split_seed)
            parts = dict(zip(SPLITS, places, strict=True))
        else:
            fractions, seed = self.fractions, self.split_seed
            parts, notes = split_files(names, hashes, given, fractions, seed, self.known, "images/")
        splits, self.files = {}, {}
        for split, part in parts.items():
            rows = part.tolist()
            own, of_names = [hashes[i] for i in rows], [names[i] for i in rows]
            files = Files(images, of_names, own, None, self.image_size, self.channels)
            paths = [masks / labels[i] for i in rows]
            splits[split] = MaskedFiles(files, paths, [contents[i] for i in rows], self.colors)
            for i in rows:
                self.files[f"images/{names[i]}"] = (hashes[i], split)
                self.files[f"masks/{labels[i]}"] = (contents[i], None)
        probe(splits, self.verify)
        self.notes = [*notes, *left]
        return splits


def _check_stems(names: Sequence[str]) -> None:
    """Require that no two images have the same name apart from the suffix: they have one mask.

    Raises:
        ValueError: If there are such images.
    """
    count = Counter(str(PurePath(name).with_suffix("")) for name in names)
    if double := [name for name in names if count[str(PurePath(name).with_suffix(""))] > 1]:
        raise ValueError(
            "images must differ in more than the suffix, since masks are found by the name without "
            f"it, got {len(double)} that do not: {first_ten(double)}"
        )


def _masks_of(names: Sequence[str], folder: Path) -> list[str]:
    """Return the mask file of each image: the file of the same name without the suffix."""
    found: dict[str, list[str]] = {}
    for mask in find_images(folder)[0]:
        found.setdefault(str(PurePath(mask).with_suffix("")), []).append(mask)
    files, wrong = [], []
    for name in names:
        masks = found.get(str(PurePath(name).with_suffix("")), [])
        if len(masks) == 1 and PurePath(masks[0]).suffix.lower() in LOSSLESS:
            files.append(masks[0])
        else:
            wrong.append(f"{name} ({', '.join(masks) or 'no mask'})")
    if wrong:
        raise ValueError(
            f"each image must have one mask of the same name in {folder}, stored without loss "
            f"({', '.join(sorted(LOSSLESS))}), got {len(wrong)} without: {first_ten(wrong)}"
        )
    return files


def _check_sizes(images: Sequence[Path], masks: Sequence[Path]) -> None:
    """Require that each mask has the size of its image."""
    sizes = zip(masks, map(_size, images), map(_size, masks), strict=True)
    if other := [f"{mask} ({b} beside {a})" for mask, a, b in sizes if a != b]:
        raise ValueError(
            f"masks must have the size of their images, got {len(other)} wrong: {first_ten(other)}"
        )


def _size(file: Path) -> tuple[int, int]:
    """Return width and height after the rotation by the EXIF orientation."""
    from PIL import Image

    with Image.open(file, formats=FORMATS) as image:
        turned = image.getexif().get(0x0112, 1) > 4  # EXIF orientations that swap the sides
        return (image.height, image.width) if turned else (image.width, image.height)


def _check_colors(colors: Colors) -> None:
    """Require two or more different RGB triples in 0…255."""
    triples = all(len(color) == 3 and all(0 <= c <= 255 for c in color) for color in colors)
    if not triples or len({tuple(color) for color in colors}) < max(len(colors), 2):
        raise ValueError(
            f"colors must be two or more RGB triples in 0...255, all different, got {colors}"
        )
