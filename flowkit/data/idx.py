"""IDX files, the file format of MNIST and Fashion-MNIST."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from flowkit.checks import check_labels
from flowkit.couplings import Coupling
from flowkit.data.arrays import Arrays
from flowkit.data.splits import SplitData, partition

LARGEST = 2**32  # bytes; a small gzip file can hold any number
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def read_idx(file: str | Path) -> Tensor:
    """Read one IDX file of unsigned bytes. A name that ends in ``.gz`` means a gzip file.

    Format: two zero bytes, a type code (8), the number of dimensions, the size of each dimension
    as a big-endian 32-bit integer, then the values.

    Args:
        file: The file.

    Returns:
        The values as uint8, in the shape that the file states.

    Raises:
        ValueError: If the file has another format, or is not complete.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
    >>> _ = file.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
    >>> read_idx(file)
    tensor([7, 2, 1], dtype=torch.uint8)
    """
    file = Path(file)
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as opened:
            data = cast(bytes, opened.read(LARGEST + 1))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} must be a complete gzip file, got {error}") from error
    if len(data) > LARGEST:
        raise ValueError(f"{file} must hold at most {LARGEST} bytes, got more")
    if data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{file} must be an IDX file of unsigned bytes, got header {data[:4]!r}")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{file} must hold {shape} bytes, got {len(data) - start}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).reshape(shape)


class IDX(SplitData):
    """Images in the four IDX files of MNIST: ``x1 (B, 1, H, W)`` in [-1, 1], ``cond (B,)``.

    The folder holds ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, and for test the
    same two names with ``t10k`` instead of ``train``; ``.gz`` may follow each name. The validation
    split is a random part of the training files. The default folder is that of Debian's package
    ``dataset-fashion-mnist``.

    Source of Fashion-MNIST: Xiao, Rasul and Vollgraf, 2017 (arXiv 1708.07747).

    Args:
        root: The folder; None means the folder of Debian's package.
        class_names: Names of the classes. None means the names of Fashion-MNIST for the default
            folder, and no names for other folders.
        batch_size: Samples per process and training step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The share of the validation split in the training files, stratified by class.
        split_seed: The seed of the validation split.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs data with noise in the workers of the loader; see `SplitData`.

    Raises:
        FileNotFoundError: On ``setup``, if files are missing.
        ValueError: On ``setup``, if a file is damaged, or the numbers of images and labels differ.

    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for part, count in (("train", 20), ("t10k", 10)):
    ...     head = bytes([0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 2, 0, 0, 0, 2])
    ...     _ = (root / f"{part}-images-idx3-ubyte").write_bytes(head + bytes(4 * count))
    ...     labels = bytes([0, 0, 8, 1, 0, 0, 0, count]) + bytes([0, 1] * (count // 2))
    ...     _ = (root / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    >>> data = IDX(root, val_fraction=0.1)
    >>> data.setup()
    >>> data.summary()
    'IDX: 18 train, 2 val, 10 test samples of shape (1, 2, 2), 2 classes'
    """

    def __init__(
        self,
        root: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int = 128,
        flip: bool = False,
        val_fraction: float = 1 / 12,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip, coupling=coupling
        )
        self.root = DEBIAN_FASHION_MNIST if root is None else Path(root)
        if class_names is None and self.root == DEBIAN_FASHION_MNIST:
            class_names = FASHION_MNIST_CLASSES
        self.class_names = None if class_names is None else list(class_names)
        self.val_fraction = val_fraction
        self.split_seed = split_seed

    def load(self) -> Mapping[str, Arrays]:
        """Read the four files, and take the validation split from the training files."""
        files = {
            (part, kind): self._find(f"{part}-{kind}-ubyte")
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        }
        images, labels = self._read(files["train", "images-idx3"], files["train", "labels-idx1"])
        test_images, test_labels = self._read(
            files["t10k", "images-idx3"], files["t10k", "labels-idx1"]
        )
        self.num_classes = len(self.class_names) if self.class_names else int(labels.max()) + 1
        check_labels(labels, self.num_classes, f"labels of {self.root}/train-…")
        check_labels(test_labels, self.num_classes, f"labels of {self.root}/t10k-…")
        train, val = partition(len(images), [self.val_fraction], self.split_seed, labels)
        name = str(self.root)
        return {
            "train": Arrays({"x1": images[train], "cond": labels[train]}, name),
            "val": Arrays({"x1": images[val], "cond": labels[val]}, name),
            "test": Arrays({"x1": test_images, "cond": test_labels}, name),
        }

    def _find(self, name: str) -> Path:
        """Return the file of a name, plain or with ``.gz``."""
        for file in (self.root / name, self.root / f"{name}.gz"):
            if file.is_file():
                return file
        raise FileNotFoundError(
            f"root must hold {name} or {name}.gz, got neither in {self.root}; install "
            "Fashion-MNIST by apt-get install dataset-fashion-mnist, or give the folder of another "
            "data set of this format as root"
        )

    @staticmethod
    def _read(image_file: Path, label_file: Path) -> tuple[Tensor, Tensor]:
        """Read images ``(N, 1, H, W)`` of uint8 and their labels ``(N,)`` of int64."""
        images, labels = read_idx(image_file), read_idx(label_file)
        if images.ndim != 3:
            raise ValueError(f"{image_file} must hold images (N, H, W), got {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{label_file} must hold {len(images)} labels, one per image, "
                f"got {tuple(labels.shape)}"
            )
        return images[:, None], labels.long()
