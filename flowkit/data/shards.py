"""Images in tar files: data sets of any size, read a few files at a time."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.data.arrays import Index, positions
from flowkit.data.folder import SUFFIXES, check_image_format, decoded
from flowkit.data.splits import SplitData, partition
from flowkit.data.stream import keyed_generator
from flowkit.provenance import write_atomically
from flowkit.types import Batch

INDEX = "index.safetensors"


@dataclass(frozen=True, eq=False)
class Tars:
    """A split whose samples lie in tar files; a batch reads its own bytes and no others.

    Args:
        files: The tar files.
        columns: ``shard``, ``offset``, ``size`` and perhaps ``label`` ``(N,)`` of all samples:
            which file, where its image begins and how long it is in bytes.
        rows: The samples that belong to the split, in order.
        image_size: Side of the square images.
        channels: 1 (gray) or 3 (RGB).
        mix: How many files training is shuffled across at a time.
    """

    files: Sequence[Path]
    columns: Mapping[str, Tensor]
    rows: Tensor
    image_size: int
    channels: int = 3
    mix: int = 4

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getitem__(self, index: Index) -> Batch:
        """Read and decode some samples into one batch.

        Raises:
            ValueError: If images do not decode; all of this batch are named.
        """
        rows = self.rows[positions(index, len(self))]
        columns = [self.columns[name][rows].tolist() for name in ("shard", "offset", "size")]
        places = list(zip(*columns, strict=True))
        order = sorted(range(len(rows)), key=places.__getitem__)  # file by file, as bytes lie there
        files = (self._file(*places[k]) for k in order)
        images = decoded(files, self.image_size, self.channels)
        x1 = torch.empty_like(images)
        x1[order] = images
        if "label" not in self.columns:
            return Batch(x1=x1)
        return Batch(x1=x1, cond=self.columns["label"][rows])

    def _file(self, shard: int, offset: int, size: int) -> tuple[str, Callable[[], io.BytesIO]]:
        def content() -> io.BytesIO:
            with self.files[shard].open("rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))

        return f"{self.files[shard]} at byte {offset}", content

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the order ``(len,)`` of an epoch of training: every sample once.

        Files come in a new order each epoch, ``mix`` at a time, and the samples of those are
        shuffled with each other; so training reads from few files at a time.
        """
        generator = keyed_generator(seed, "shards", epoch)
        turn = torch.empty(len(self.files), dtype=torch.long)
        turn[torch.randperm(len(self.files), generator=generator)] = torch.arange(len(self.files))
        group = turn[self.columns["shard"][self.rows]] // self.mix
        shuffled = torch.randperm(len(self), generator=generator)
        return shuffled[group[shuffled].argsort(stable=True)]

    def fingerprint(self) -> str:
        """Return a SHA-256 of the format, the files' names and sizes, and the split's samples."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}\n".encode())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        digest.update(self.rows.numpy().tobytes())
        for name in sorted(self.columns):
            digest.update(self.columns[name][self.rows].numpy().tobytes())
        return digest.hexdigest()


class Shards(SplitData):
    """Images in tar files, in the format of WebDataset: for data that outgrow a machine.

    ``x1 (B, channels, image_size, image_size)``, squared by ``square``. Members of one name are a
    sample: an image, and perhaps its label, a number in a ``.cls`` file (``1.jpg``, ``1.cls``).
    Where samples lie is written once to ``root/index.safetensors``, if root can be written.
    Shuffling is within ``mix`` files at a time, see `Tars.order`; like everything else it depends
    on the seed and the step alone: ranks share the samples of a step, and runs resume exactly.

    Args:
        root: The folder of the tar files, which are not compressed.
        image_size: Side of the square images in pixels.
        channels: 1 (gray) or 3 (RGB).
        batch_size: Samples per process and step.
        flip: Mirror training images left to right with probability one half.
        mix: How many files training is shuffled across at a time.
        val_fraction: The share of the validation split, stratified by class.
        test_fraction: The share of the test split, stratified by class.
        split_seed: The seed of the splits.
        seed: The seed of the training stream.
        num_workers: Processes that read ahead.
        coupling: Pairs data with noise in the loader; see ``SplitData``.

    Raises:
        ValueError: If a number is out of range; on ``setup``, if there are no tar files, one cannot
            be read, or samples have no image or only some have labels.
        FileNotFoundError: On ``setup``, if there is no such folder.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        channels: int = 3,
        batch_size: int = 64,
        flip: bool = False,
        mix: int = 4,
        val_fraction: float = 0.01,
        test_fraction: float = 0.01,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Any = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, flip=flip, coupling=coupling
        )
        check_image_format(image_size, channels)
        check_at_least(mix, 1, "mix")
        self.root, self.image_size, self.channels = Path(root), image_size, channels
        self.mix, self.split_seed = mix, split_seed
        self.fractions = (val_fraction, test_fraction)

    def load(self) -> Mapping[str, Tars]:
        """Find the samples and cut them into splits."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"root must be a folder, got {self.root}")
        files = sorted(self.root.glob("*.tar"))
        if not files:
            raise ValueError(f"root must hold tar files, got none in {self.root}")
        columns = read_index(self.root, files)
        labels = columns.get("label")
        if labels is not None:
            self.num_classes = int(labels.max()) + 1
        parts = partition(len(columns["shard"]), self.fractions, self.split_seed, labels)
        return {
            name: Tars(files, columns, part.sort().values, self.image_size, self.channels, self.mix)
            for name, part in zip(("train", "val", "test"), parts, strict=True)
        }


def read_index(root: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """Say where all samples lie, from the index of a folder, which is written if there is none.

    Returns:
        ``shard``, ``offset``, ``size`` and perhaps ``label`` ``(N,)``, see `Tars`.
    """
    # With the time of writing: a file made anew may be as large as before.
    states = [(file.name, file.stat()) for file in files]
    found = "\n".join(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states)
    digest, index = hashlib.sha256(found.encode()).hexdigest(), root / INDEX
    with suppress(FileNotFoundError, SafetensorError), safe_open(index, framework="pt") as stored:
        if (stored.metadata() or {}).get("files") == digest:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    samples = [(n, *sample) for n, file in enumerate(files) for sample in _samples(file)]
    labels = [sample[3] for sample in samples]
    if None in labels and any(label is not None for label in labels):
        first = files[samples[labels.index(None)][0]]
        raise ValueError(f"samples must all have labels or none, got both; one in {first} has none")
    names = ("shard", "offset", "size", "label")[: 3 if None in labels else 4]
    columns = {name: torch.tensor([s[k] for s in samples]) for k, name in enumerate(names)}
    with suppress(OSError, SafetensorError):
        write_atomically(index, partial(save_file, columns, metadata={"files": digest}))
    return columns


def _samples(file: Path) -> list[tuple[int, int, int | None]]:
    """Offset and size of every image of a tar file, and its label."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                key = f"{folder}/{key}"
                if f".{kind.lower()}" in SUFFIXES:
                    images[key] = (member.offset_data, member.size)
                elif kind == "cls" and (content := tar.extractfile(member)) is not None:
                    labels[key] = int(content.read())
                    check_at_least(labels[key], 0, "label")
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ValueError(f"shards must be tar files with labels, got {file}: {error}") from error
    if lonely := sorted(set(labels) - set(images)):
        raise ValueError(f"samples must have an image, got none for {lonely[0]} in {file}")
    if not images:
        raise ValueError(f"shards must hold images, got none in {file}")
    return [(*place, labels.get(key)) for key, place in images.items()]
