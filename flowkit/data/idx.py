"""Files in the format of MNIST."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit.checks import check_labels
from flowkit.data.arrays import Arrays
from flowkit.data.splits import SplitData, partition

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
    """Read one IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The format: two zero bytes, a type code (8), the number of dimensions, each dimension as
    a big-endian 32-bit integer, then the values.

    Raises:
        ValueError: If the file is not of this format, or is cut short.
    """
    file = Path(file)
    data = file.read_bytes()
    if file.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{file} must be a whole gzip file, got {error}") from error
    if data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{file} must be an IDX file of unsigned bytes, got header {data[:4]!r}")
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(f"{file} must hold {shape} bytes, got {len(data) - start}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).reshape(shape)


class IDX(SplitData):
    """Images in the four files of MNIST: ``x1 (B, 1, H, W)``, ``cond`` labels.

    The folder holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same two
    with ``t10k`` for test, each plain or with ``.gz``. Validation is carved out of train. The
    default folder is where Debian's package ``dataset-fashion-mnist`` puts Fashion-MNIST
    (Xiao, Rasul, Vollgraf, 2017, arXiv 1708.07747).

    Args:
        root: The folder.
        class_names: Names of the classes; None: known for the default folder, else not named.
        batch_size: Samples per process and step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The validation split's share of the training files, stratified by class.
        split_seed: The seed of this split.
        seed: The seed of the training stream.
        num_workers: Processes that read ahead.
        coupling: Pairs data with noise in the loader; see ``SplitData``.

    Raises:
        FileNotFoundError: On ``setup``, if files are missing.
        ValueError: On ``setup``, if files are damaged or do not fit together.
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
        coupling: Any = None,
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
        """Read the four files, and carve the validation split."""
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
        for file in (self.root / name, self.root / f"{name}.gz"):
            if file.is_file():
                return file
        raise FileNotFoundError(
            f"root must hold {name} or {name}.gz, got neither in {self.root}; Fashion-MNIST comes "
            "with Debian's dataset-fashion-mnist (apt-get install dataset-fashion-mnist), other "
            "sets of this format from their authors: name their folder as root"
        )

    @staticmethod
    def _read(image_file: Path, label_file: Path) -> tuple[Tensor, Tensor]:
        images, labels = read_idx(image_file), read_idx(label_file)
        if images.ndim != 3:
            raise ValueError(f"{image_file} must hold images (N, H, W), got {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"{label_file} must hold {len(images)} labels, one per image, "
                f"got {tuple(labels.shape)}"
            )
        return images[:, None], labels.long()
