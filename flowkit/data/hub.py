"""Image data sets of the Hugging Face hub."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.checks import check_choice, check_labels
from flowkit.couplings import Coupling
from flowkit.data.arrays import Index, positions
from flowkit.data.broken import probe
from flowkit.data.files import content_splits, share_of_test
from flowkit.data.folder import check_image_format, decoded
from flowkit.data.splits import SplitData, partition
from flowkit.extras import install
from flowkit.provenance import located
from flowkit.types import Batch


@dataclass(frozen=True, eq=False)
class Rows:
    """Split of rows of a ``datasets.Dataset``.

    Args:
        rows: The ``datasets.Dataset``, whose images are not decoded.
        image_column: Name of the column of images.
        labels: Integer classes ``(N,)``, or None.
        image_size: Side of the square images in pixels.
        channels: 1 (gray) or 3 (RGB).
    """

    rows: Any
    image_column: str
    labels: Tensor | None
    image_size: int
    channels: int = 3

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: Index) -> Batch:
        """Decode the rows at the positions of an index into one batch."""
        rows = positions(index, len(self))
        x1 = torch.empty(0, self.channels, self.image_size, self.image_size)
        if len(rows):
            images = self.rows[rows.tolist()][self.image_column]
            pairs = zip(rows.tolist(), images, strict=True)
            files = ((f"row {row}", partial(_file, image)) for row, image in pairs)
            x1 = decoded(files, self.image_size, self.channels)
        return Batch(x1=x1) if self.labels is None else Batch(x1=x1, cond=self.labels[rows])

    def fingerprint(self) -> str:
        """Return the SHA-256 of the format, of all encoded images and of the labels."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}\n".encode())
        for row in self.rows:
            digest.update(_file(row[self.image_column]).read())
        digest.update(str(None if self.labels is None else self.labels.tolist()).encode())
        return digest.hexdigest()


def _file(image: Mapping[str, Any]) -> io.BytesIO:
    """Return an image as an open file: its bytes in the data set, or its file on the disk."""
    return io.BytesIO(image["bytes"] or Path(image["path"]).read_bytes())


class Hub(SplitData):
    """Image data set of the Hugging Face hub, or a folder on disk in the same format.

    Batches hold ``x1 (B, channels, image_size, image_size)`` in [-1, 1], cropped and resampled by
    `flowkit.data.folder.square`, and with labels ``cond (B,)``. If the data set has the parts
    ``validation`` and ``test``, they are the splits val and test. A missing part is taken from
    ``train``, by a hash of each image, see `flowkit.data.files.content_splits`. So new rows move no
    other row, and equal images are in the same split.

    Args:
        path: ``hub:owner/name``, a folder written by ``save_to_disk``, or another folder that
            ``datasets.load_dataset`` reads.
        image_size: Side of the square images in pixels.
        name: The configuration of the data set, if the data set has several.
        image_column: Name of the column of images.
        label_column: Name of the column of class labels; None for data without labels.
        channels: 1 (gray) or 3 (RGB).
        batch_size: Samples per process and training step.
        flip: Mirror training images left to right with probability one half.
        val_fraction: The share of a validation split that is taken from ``train``.
        test_fraction: The share of a test split that is taken from ``train``; None means 0.05, and
            more of fewer rows, see `flowkit.data.files.share_of_test`.
        split_by: ``"content"`` as described above, or ``"order"``: evenly spaced places in the
            shuffled order of all rows, as in earlier versions.
        split_seed: The seed of the splits.
        verify: Decode all images on ``setup``, not only some of each split.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs data with noise in the workers of the loader; see `SplitData`.

    Raises:
        ImportError: On ``setup``, if the package ``datasets`` is not installed.
        FileNotFoundError: On ``setup``, if there is no such folder.
        ValueError: If ``image_size`` or ``channels`` is out of range. On ``setup``, if a column or
            the part ``train`` is missing, or a label is out of range.
        TypeError: On ``setup``, if labels are not integers.
    """

    def __init__(
        self,
        path: str | Path,
        image_size: int,
        name: str | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
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
        self.path, self.name = str(path), name
        self.image_column, self.label_column = image_column, label_column
        self.image_size, self.channels = image_size, channels
        self.fractions = {"validation": val_fraction, "test": test_fraction}
        check_choice(split_by, ("content", "order"), "split_by")
        self.split_by, self.split_seed, self.verify = split_by, split_seed, verify

    def load(self) -> Mapping[str, Rows]:
        """Load the data set, and take missing parts from ``train``."""
        parts = self._read()
        labels = {part: self._labels(rows) for part, rows in parts.items()}
        if (known := labels["train"]) is not None:
            names = getattr(parts["train"].features[self.label_column], "names", None)
            self.num_classes = len(names) if names else int(known.max()) + 1
            self.class_names = names
            for part, values in labels.items():
                check_labels(cast(Tensor, values), self.num_classes, f"labels of {part}")
        missing = [part for part in self.fractions if part not in parts]
        if missing:
            train = parts["train"]
            for part, cut in self._cut(train, missing, known).items():
                parts[part] = train.select(cut.tolist())
                labels[part] = None if known is None else known[cut]
        splits = {
            name: Rows(parts[part], self.image_column, labels[part], self.image_size, self.channels)
            for name, part in (("train", "train"), ("val", "validation"), ("test", "test"))
        }
        probe(splits, self.verify)
        return splits

    def _cut(self, rows: Any, missing: list[str], labels: Tensor | None) -> dict[str, Tensor]:
        """Return the positions of the rows that stay in ``train`` and that each part takes."""
        share, notes = share_of_test(self.fractions["test"], len(rows))
        self.notes = notes if "test" in missing else []
        shares = {**self.fractions, "test": share}
        shares = {part: cast(float, shares[part]) for part in missing}
        if self.split_by == "order":
            places = partition(len(rows), [*shares.values()], self.split_seed, labels)
            return dict(zip(("train", *missing), places, strict=True))
        images = (_file(row[self.image_column]).read() for row in rows)
        keys = [hashlib.sha256(image).hexdigest() for image in images]
        return content_splits(keys, shares, self.split_seed)

    def _read(self) -> dict[str, Any]:
        """Read the parts of the data set, and check their columns."""
        try:
            from datasets import Dataset, Image, load_dataset, load_from_disk
        except ImportError as error:
            raise ImportError(
                f"datasets must be installed for data=hub, got none; {install('hub')}"
            ) from error
        saved = any((Path(self.path) / f).is_file() for f in ("state.json", "dataset_dict.json"))
        place, _ = located(self.path, "path")
        found = load_from_disk(place) if saved else load_dataset(place, self.name)
        parts: dict[str, Any] = {"train": found}
        if not isinstance(found, Dataset):
            parts = {str(part): rows for part, rows in found.items()}
        if "train" not in parts:
            raise ValueError(f"path must have a part train, got {', '.join(parts)} in {self.path}")
        check_choice(self.image_column, parts["train"].column_names, "image_column")
        if self.label_column is not None:
            check_choice(self.label_column, parts["train"].column_names, "label_column")
        kept = {part: parts[part] for part in ("train", *self.fractions) if part in parts}
        # Images are decoded here: `datasets` would let Pillow read formats that start a program.
        encoded = Image(decode=False)
        return {part: rows.cast_column(self.image_column, encoded) for part, rows in kept.items()}

    def _labels(self, rows: Any) -> Tensor | None:
        """Return the labels ``(N,)`` of a part, or None without a column of labels."""
        if self.label_column is None:
            return None
        values = list(rows[self.label_column])
        wrong = [value for value in values if not isinstance(value, int)]
        if wrong:
            raise TypeError(
                f"label_column must hold integers, got {wrong[0]!r} in {self.label_column}; "
                "convert it with class_encode_column, or pass label_column=None"
            )
        return torch.tensor(values)
