"""Image data sets in tar files, for data sets that are larger than the memory."""

import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowkit.checks import check_at_least, check_choice
from flowkit.couplings import Coupling
from flowkit.data.arrays import Index, positions
from flowkit.data.broken import probe
from flowkit.data.files import (
    SUFFIXES,
    check_root,
    content_splits,
    count_of_kinds,
    file_hashes,
    first_ten,
    is_hidden,
)
from flowkit.data.folder import check_image_format, decoded
from flowkit.data.splits import SPLITS, SplitData, partition
from flowkit.data.stream import keyed_generator
from flowkit.provenance import write_atomically
from flowkit.types import Batch

INDEX = "index.safetensors"
LARGEST = (
    2**28
)  # bytes of an image, and of a header of a tar file; the label of a sample is shorter


@dataclass(frozen=True, eq=False)
class Tars:
    """Split of images in tar files. A batch reads only the bytes of its own images.

    Args:
        files: The tar files.
        hashes: The SHA-256 of the content of each tar file.
        columns: Tensors ``(N,)`` of all samples: ``shard`` (number of the tar file), ``offset``
            (first byte of the image in the file), ``size`` (bytes of the image), and with labels
            ``label``.
        rows: The samples of the split ``(n,)``, as rows of ``columns``.
        image_size: Side of the square images in pixels.
        channels: 1 (gray) or 3 (RGB).
        mix: Number of tar files whose samples are shuffled together in training.
    """

    files: Sequence[Path]
    hashes: Sequence[str]
    columns: Mapping[str, Tensor]
    rows: Tensor
    image_size: int
    channels: int = 3
    mix: int = 4

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.rows)

    def __getitem__(self, index: Index) -> Batch:
        """Read and decode the samples at the positions of an index into one batch.

        Raises:
            ValueError: If an image cannot be decoded. The error names the first ten such images.
        """
        rows = self.rows[positions(index, len(self))]
        columns = [self.columns[name][rows].tolist() for name in ("shard", "offset", "size")]
        places = list(zip(*columns, strict=True))
        order = sorted(range(len(rows)), key=places.__getitem__)  # in the order on disk
        files = (self._file(*places[k]) for k in order)
        images = decoded(files, self.image_size, self.channels)
        x1 = torch.empty_like(images)
        x1[order] = images
        if "label" not in self.columns:
            return Batch(x1=x1)
        return Batch(x1=x1, cond=self.columns["label"][rows])

    def _file(self, shard: int, offset: int, size: int) -> tuple[str, Callable[[], io.BytesIO]]:
        """Return the name of an image in errors, and a function that reads its bytes."""

        def content() -> io.BytesIO:
            _check_size(size)
            with self.files[shard].open("rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))

        return f"{self.files[shard]} at byte {offset}", content

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the order ``(len(self),)`` of one training epoch, which holds each sample once.

        Each epoch divides the tar files at random into groups of ``mix`` files. The groups follow
        one another, and the samples of one group are shuffled together. So training reads from
        ``mix`` files at a time.
        """
        generator = keyed_generator(seed, "shards", epoch)
        turn = torch.empty(len(self.files), dtype=torch.long)
        turn[torch.randperm(len(self.files), generator=generator)] = torch.arange(len(self.files))
        group = turn[self.columns["shard"][self.rows]] // self.mix
        shuffled = torch.randperm(len(self), generator=generator)
        return shuffled[group[shuffled].argsort(stable=True)]

    def fingerprint(self) -> str:
        """Return a SHA-256 of the format, the names and content of the files, and the samples."""
        digest = hashlib.sha256(f"{self.image_size} {self.channels}\n".encode())
        for file, content in zip(self.files, self.hashes, strict=True):
            digest.update(f"{file.name} {content}\n".encode())
        digest.update(self.rows.numpy().tobytes())
        for name in sorted(self.columns):
            digest.update(self.columns[name][self.rows].numpy().tobytes())
        return digest.hexdigest()


class Shards(SplitData):
    """Images in tar files, in the format of WebDataset, for data larger than the memory.

    Batches hold ``x1 (B, channels, image_size, image_size)`` in [-1, 1], cropped and resampled by
    `flowkit.data.folder.square`, and with labels ``cond (B,)``. Members of a tar file with the same
    name form a sample: an image and optionally its label, a number in a ``.cls`` file (``1.jpg``
    and ``1.cls``). The positions of all samples are written once to ``root/index.safetensors``, if
    the folder can be written.

    The split of a sample follows from a hash of its name and its image, see
    `flowkit.data.files.content_splits`. So new samples and new tar files move no other sample.

    Training shuffles the samples of ``mix`` files together, see `Tars.order`. The order depends on
    the seed and the step only, so a resumed run reads the same batches as an uninterrupted run.

    Args:
        root: The folder of the tar files, without compression.
        image_size: Side of the square images in pixels.
        channels: 1 (gray) or 3 (RGB).
        batch_size: Samples per process and training step.
        flip: Mirror training images left to right with probability one half.
        mix: Number of tar files whose samples are shuffled together in training.
        val_fraction: The share of the validation split.
        test_fraction: The share of the test split.
        split_by: ``"content"`` as described above, or ``"order"``: evenly spaced places in the
            shuffled order of all samples, as in earlier versions.
        split_seed: The seed of the splits.
        verify: Decode all images on ``setup``, not only some of each split.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs data with noise in the workers of the loader; see `SplitData`.

    Raises:
        ValueError: If a number is out of range. On ``setup``, if there are no tar files, a tar file
            cannot be read, a sample has no image or several, only some samples have labels, or an
            image cannot be decoded.
        FileNotFoundError: On ``setup``, if the folder does not exist.

    >>> import tempfile
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> with tarfile.open(root / "0.tar", "w") as tar:
    ...     for k in range(100):
    ...         Image.new("L", (12, 8), 2 * k).save(root / f"{k}.bmp")
    ...         tar.add(root / f"{k}.bmp", f"{k}.bmp")
    >>> data = Shards(root, image_size=8, channels=1, val_fraction=0.1, test_fraction=0.1)
    >>> data.setup()
    >>> data.summary()
    'Shards: 76 train, 10 val, 14 test samples of shape (1, 8, 8), no classes'
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
        check_at_least(mix, 1, "mix")
        self.root, self.image_size, self.channels = Path(root), image_size, channels
        check_choice(split_by, ("content", "order"), "split_by")
        self.mix, self.split_by, self.split_seed, self.verify = mix, split_by, split_seed, verify
        self.fractions = {"val": val_fraction, "test": test_fraction}

    def load(self) -> Mapping[str, Tars]:
        """Find the samples and divide them into splits."""
        check_root(self.root)
        files = sorted(self.root.glob("*.tar"))
        if not files:
            raise ValueError(f"root must hold tar files, got no tar file in {self.root}")
        hashes = file_hashes(self.root, [file.name for file in files])
        columns, self.notes = read_index(self.root, files, hashes)
        labels = columns.get("label")
        if labels is not None:
            self.num_classes = int(labels.max()) + 1
        keys = columns.pop("key").tolist()
        if self.split_by == "order":
            places = partition(len(keys), [*self.fractions.values()], self.split_seed, labels)
            parts = dict(zip(SPLITS, places, strict=True))
        else:
            parts = content_splits([*map(str, keys)], self.fractions, self.split_seed)
        form = (self.image_size, self.channels, self.mix)
        splits = {
            name: Tars(files, hashes, columns, part.sort().values, *form)
            for name, part in parts.items()
        }
        probe(splits, self.verify)
        self.files = {file.name: (h, None) for file, h in zip(files, hashes, strict=True)}
        return splits


def read_index(
    root: Path, files: Sequence[Path], hashes: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the positions of all samples in the tar files of a folder.

    The positions are read from ``index.safetensors`` if the file fits the tar files. Otherwise the
    tar files are read, and the index is written.

    Args:
        root: The folder.
        files: The tar files.
        hashes: The SHA-256 of the content of each tar file.

    Returns:
        ``shard``, ``offset``, ``size`` and with labels ``label`` ``(N,)``, see `Tars`, ``key``
        ``(N,)``, a hash of the name and the image of each sample, and notes on members that were
        not read.

    Raises:
        ValueError: If a tar file cannot be read, a sample has no image or several, or only some
            samples have labels.
    """
    found = "\n".join(f"{file.name} {h}" for file, h in zip(files, hashes, strict=True))
    digest, index = hashlib.sha256(found.encode()).hexdigest(), root / INDEX
    with suppress(FileNotFoundError, SafetensorError), safe_open(index, framework="pt") as stored:
        tag = stored.metadata() or {}
        if tag.get("files") == digest and "key" in stored.keys():  # noqa: SIM118
            columns = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            if int(columns["shard"].min()) < 0 or int(columns["shard"].max()) >= len(files):
                raise ValueError(f"shard in {index} must number a tar file, got another number")
            return columns, tag["notes"].splitlines()
    other: Counter[str] = Counter()
    samples = [(n, *sample) for n, file in enumerate(files) for sample in members(file, other)]
    labels = [sample[4] for sample in samples]
    if None in labels and any(label is not None for label in labels):
        first = files[samples[labels.index(None)][0]]
        raise ValueError(
            f"labels must be given for all samples or for no sample, got one without in {first}"
        )
    names = ("shard", "offset", "size", "key", "label")[: 4 if None in labels else 5]
    columns = {name: torch.tensor([s[k] for s in samples]) for k, name in enumerate(names)}
    count, kinds = other.total(), count_of_kinds(other)
    notes = [f"{count:,} members of other types not read ({kinds})"] if other else []
    metadata = {"files": digest, "notes": "\n".join(notes)}
    with suppress(OSError, SafetensorError):
        write_atomically(index, partial(save_file, columns, metadata=metadata))
    return columns, notes


def members(file: Path, other: Counter[str]) -> list[tuple[int, int, int, int | None]]:
    """Return offset, size, key and label (or None) of each image in a tar file.

    Other members are counted.
    """
    images: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    dotted: dict[str, list[str]] = {}  # names like a.b.png, whose sample is a
    double: list[str] = []
    try:
        with (
            file.open("rb") as opened,
            tarfile.open(fileobj=cast(Any, _Bounded(opened)), mode="r:") as tar,
        ):
            for member in tar:
                if not member.isreg() or member.issparse():
                    continue  # a sparse file can state any size
                *folders, name = [part for part in member.name.split("/") if part != "."]
                key, _, kind = name.partition(".")
                key, kind = "/".join([*folders, key]), f".{kind.lower()}"
                if any(map(is_hidden, [*folders, name])):
                    other["hidden"] += 1
                elif kind in SUFFIXES:
                    _check_size(member.size)
                    double += [member.name] if key in images else []
                    content = cast(BinaryIO, tar.extractfile(member)).read()
                    digest = hashlib.sha256(f"{key}\n".encode() + content).digest()
                    number = int.from_bytes(digest[:8], "big", signed=True)
                    images[key] = (member.offset_data, member.size, number)
                elif kind == ".cls" and (label := tar.extractfile(member)) is not None:
                    double += [member.name] if key in labels else []
                    labels[key] = int(label.read(32))
                    check_at_least(labels[key], 0, "label")
                elif PurePath(name).suffix.lower() in SUFFIXES:
                    dotted.setdefault(key, []).append(member.name)
                else:
                    other[kind] += 1
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ValueError(f"shards must be tar files with labels, got {file}: {error}") from error
    for key in dotted.keys() & images.keys():  # further pictures of a sample, for example masks
        other["further images"] += len(dotted.pop(key))
    if wrong := [name for names in dotted.values() for name in names] + double:
        raise ValueError(
            "names of members must be <sample>.<type>, each once and with one image a sample, and "
            f"without another dot in <sample>, got {len(wrong)} others in {file}: "
            f"{first_ten(wrong)}; rename them"
        )
    if lonely := sorted(set(labels) - set(images)):
        raise ValueError(f"samples must have an image, got no image for {lonely[0]} in {file}")
    if not images:
        raise ValueError(f"shards must hold images, got no image in {file}")
    return [(*place, labels.get(key)) for key, place in images.items()]


def _check_size(size: int) -> None:
    """Require an image of a size that memory is sure to hold.

    Raises:
        ValueError: If it is larger.
    """
    if not 0 <= size <= LARGEST:
        raise ValueError(f"images must have at most {LARGEST} bytes, got {size}")


class _Bounded:
    """A file that reads no more than `LARGEST` bytes at once, whatever the headers in it say."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.name, self.mode = file.name, "rb"

    def read(self, size: int) -> bytes:
        _check_size(size)
        return self.file.read(size)
