"""Latents in single npy files, as the tools of EDM2 write them and as REPA trains on them."""

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flowkit.autoencoders import FrozenAutoencoder, identity
from flowkit.couplings import Coupling
from flowkit.data.broken import probe
from flowkit.data.cache import Columns
from flowkit.data.files import check_root, file_hashes, first_ten
from flowkit.data.image_files import natural
from flowkit.data.latents import LatentSplit, LatentStream
from flowkit.data.splits import SPLITS, SplitData, partition
from flowkit.data.stream import Stream
from flowkit.provenance import LARGEST, parse_json, read_json

LABELS, FOLDER = "dataset.json", "vae-sd"


class EDMLatents(SplitData):
    """Latents of a folder in the format of EDM2 and REPA: ``x1 (B, c, h, w)``, ``cond (B,)``.

    The folder, or a folder or zip file ``vae-sd`` in it, holds a file per image,
    ``00000/img-mean-std-00000000.npy``, with ``(2c, h, w)`` numbers: the mean and the standard
    deviation of an unscaled latent, or with ``(c, h, w)`` numbers: the latent. The file
    ``dataset.json`` holds ``{"labels": [["00000/img-mean-std-00000000.npy", class], …]}``, or
    ``{"labels": null}`` for latents without classes.

    A sample is ``z = (mean + std ε − shift) · scale``, where ``ε`` is standard normal, and the
    autoencoder gives ``shift`` (its ``mean``) and ``scale`` (1 / ``std``). The training stream
    draws a new ``ε`` at every step; the splits use a fixed ``ε`` for each row. The files do not say
    which autoencoder made them, so you say it: batches hold its hash as ``encoded_by``, and a
    module with another autoencoder refuses them.

    Args:
        root: The folder, or the zip file of the latents.
        autoencoder: The autoencoder that made the latents. Its scale and its identity are kept.
        val_fraction: The share of the validation split.
        test_fraction: The share of the test split.
        split_seed: The seed of the splits.
        verify: Read all files on ``setup``, not only some of each split.
        batch_size: Samples per process and training step.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs latents with noise in the workers of the loader; see `SplitData`.

    Attributes:
        autoencoder: Hash and config of the autoencoder, see `flowkit.autoencoders.identity`.
        image_shape: Shape ``(C, H, W)`` of the images.

    Raises:
        TypeError: If ``autoencoder`` is no network of diffusers.
        FileNotFoundError: On ``setup``, if there is no folder, or no ``dataset.json``.
        ValueError: On ``setup``, if a file has no label, the labels are no classes, or a file that
            is looked at has another shape than the latents of the autoencoder, is damaged or is not
            finite. Other files are checked when they are read, or with ``verify``.

    Source: Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, 2024
    (arXiv 2312.02696); Yu et al., *Representation Alignment for Generation*, 2024 (arXiv
    2410.06940).
    """

    def __init__(
        self,
        root: str | Path,
        autoencoder: FrozenAutoencoder,
        val_fraction: float = 0.01,
        test_fraction: float = 0.01,
        split_seed: int = 0,
        verify: bool = False,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, coupling=coupling
        )
        if not isinstance(autoencoder, FrozenAutoencoder):
            raise TypeError(
                "autoencoder must be the network that made the latents, got "
                f"{type(autoencoder).__name__}; for example autoencoder=kl autoencoder.path=..."
            )
        self.root, self.autoencoder = Path(root), identity(autoencoder)
        self.scale = autoencoder.mean.cpu().float()[0], autoencoder.std.cpu().float()[0]
        self.sizes_of_images = autoencoder.channels, autoencoder.factor
        self.fractions, self.split_seed = (val_fraction, test_fraction), split_seed
        self.verify = verify

    def load(self) -> Mapping[str, LatentSplit]:
        """Find the files and their labels, look at some, and divide them into splits."""
        files = _found(self.root)
        labels = self._labels(files)
        columns = _Files(files, labels, *self.scale)
        height, width = columns.shape_of(0)[1:]
        channels, factor = self.sizes_of_images
        own = self.autoencoder["config"]["image_shape"]
        self.image_shape = tuple(own or (channels, height * factor, width * factor))
        shape, hashes = (len(self.scale[0]), height, width), files.hashes()
        parts = partition(len(files.names), self.fractions, self.split_seed, labels)
        splits = {}
        for split, rows in zip(SPLITS, parts, strict=True):
            chosen = [(files.names[k], hashes[k], labels[k] if labels is not None else None)
                      for k in rows.tolist()]  # fmt: skip
            digest = hashlib.sha256("\n".join(map(str, chosen)).encode()).hexdigest()
            some = cast(Any, _Rows(columns, rows, shape))
            splits[split] = LatentSplit(some, shape, self.autoencoder["hash"], digest)
        probe(splits, self.verify)
        return splits

    def _labels(self, files: "_Found") -> Tensor | None:
        """Return the classes of the files, and set their number; None without classes."""
        listed = files.listing.get("labels") if isinstance(files.listing, dict) else ()
        place = f"{files.place}: {LABELS}"
        if listed is None:
            return None
        try:
            known = {str(name): label for name, label in listed}
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"labels must be null or pairs of a file and its class, got others in {place}"
            ) from error
        if missing := [name for name in files.names if name not in known]:
            raise ValueError(
                f"labels must name all files, got no label of {len(missing):,} in {place}: "
                f"{first_ten(missing)}"
            )
        labels = [known[name] for name in files.names]
        if not all(type(label) is int and 0 <= label < 2**31 for label in labels):
            raise ValueError(f"labels must be whole numbers from 0, got others in {place}")
        self.num_classes = max(labels) + 1
        return torch.tensor(labels)

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Return the training batches of one rank, indexed by step."""
        return LatentStream(
            self.train, self.batch_size, self.seed, rank, world_size, coupling=self.coupling
        )


@dataclass(frozen=True, eq=False)
class _Found:
    """Files of latents in a folder or in a zip file, in natural order, and their listing."""

    place: Path
    names: Sequence[str]
    listing: Any
    read: Callable[[str], bytes]
    hashes: Callable[[], Sequence[str]]


def _found(root: Path) -> _Found:
    """Find the files of latents: in ``vae-sd``, in ``vae-sd.zip``, or in the folder itself."""
    places = [root / FOLDER, root / f"{FOLDER}.zip", root]
    place = next((one for one in places if one.exists()), root)
    if zipfile.is_zipfile(place):
        return _in_zip(place)
    check_root(place)
    if not (place / LABELS).is_file():
        raise FileNotFoundError(_NO_LIST.format(place))
    names = sorted((f.relative_to(place).as_posix() for f in place.rglob("*.npy")), key=natural)
    _check_some(names, place)
    return _Found(
        place,
        names,
        read_json(place / LABELS),
        lambda name: (place / name).read_bytes(),
        lambda: _states(place, names),
    )


_NO_LIST = (
    f"root must hold {LABELS} beside the latents, got none in {{}}; the file is "
    '{{"labels": [["00000/img-mean-std-00000000.npy", 3], ...]}}, or {{"labels": null}}'
)


def _states(place: Path, names: Sequence[str]) -> list[str]:
    """Return the sizes of files, or the SHA-256 of a thousand: all may be hundreds of GB."""
    some = names[:: max(1, len(names) // 1000)]
    hashed = dict(zip(some, file_hashes(place, some), strict=True))
    return [hashed.get(name) or str((place / name).stat().st_size) for name in names]


def _check_some(names: Sequence[str], place: Path) -> None:
    """Require files of latents."""
    if not names:
        raise ValueError(f"root must hold latents as .npy files, got none in {place}")


def _in_zip(place: Path) -> _Found:
    """Find the files in a zip file. A file is read by its place, without the list of all files."""
    try:
        with zipfile.ZipFile(place) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"root must hold whole zip files, got {error} in {place}") from error
    if LABELS not in members:
        raise FileNotFoundError(_NO_LIST.format(place))

    def read(name: str) -> bytes:
        info = members[name]
        if info.file_size > LARGEST or info.compress_type not in (0, zipfile.ZIP_DEFLATED):
            raise ValueError(f"files must be stored or deflated, got {name} in {place}")
        with place.open("rb") as opened:
            opened.seek(info.header_offset + 26)
            lengths = opened.read(4)
            opened.seek(sum(np.frombuffer(lengths, "<u2").tolist()), 1)
            content = opened.read(info.compress_size)
        if info.compress_type:
            content = zlib.decompressobj(-15).decompress(content, max(1, info.file_size))
        if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
            raise ValueError(f"files must be whole, got another content of {name} in {place}")
        return content

    names = sorted((name for name in members if name.endswith(".npy")), key=natural)
    _check_some(names, place)
    listing = parse_json(read(LABELS).decode(), place / LABELS)
    return _Found(place, names, listing, read, lambda: [f"{members[n].CRC:08x}" for n in names])


@dataclass(frozen=True, eq=False)
class _Files:
    """Columns ``mean``, ``std`` and ``cond`` of files, scaled by mean and standard deviation."""

    found: _Found
    labels: Tensor | None
    mean: Tensor
    std: Tensor

    def shape_of(self, row: int) -> tuple[int, ...]:
        """Return the shape of the array in a file, checked against the channels of a latent."""
        return tuple(self._array(row).shape)

    def read(self, rows: Tensor, shape: Sequence[int]) -> Columns:
        """Return the columns of rows ``(n,)``, with latents of a shape."""
        mean, std = torch.empty(len(rows), *shape), torch.zeros(len(rows), *shape)
        for place, row in enumerate(rows.tolist()):
            array, channels = self._array(row), len(self.mean)
            if tuple(array.shape[1:]) != tuple(shape[1:]):
                raise ValueError(
                    f"latents must have one size, {shape[1]}x{shape[2]}, got {tuple(array.shape)} "
                    f"in {self._name(row)}"
                )
            mean[place] = (array[:channels] - self.mean) / self.std
            if len(array) > channels:
                std[place] = array[channels:] / self.std
        columns = {"mean": mean, "std": std}
        return columns if self.labels is None else {**columns, "cond": self.labels[rows]}

    def _name(self, row: int) -> str:
        """Return the name of a file for errors."""
        return f"{self.found.place}: {self.found.names[row]}"

    def _array(self, row: int) -> Tensor:
        """Read the array of a file."""
        try:
            content = io.BytesIO(self.found.read(self.found.names[row]))
            array = np.load(content, allow_pickle=False)
            found = torch.from_numpy(np.asarray(array, np.float32))
        except (ValueError, TypeError, EOFError, OSError, MemoryError, zlib.error) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"latents must be whole .npy files, got {self._name(row)}: {reason}"
            ) from error
        channels = len(self.mean)
        found = found[0] if found.ndim == 4 and len(found) == 1 else found
        if found.ndim != 3 or len(found) not in (channels, 2 * channels):
            raise ValueError(
                f"latents must have shape ({2 * channels}, h, w) for mean and standard deviation, "
                f"or ({channels}, h, w), as the autoencoder has {channels} channels, got "
                f"{tuple(found.shape)} in {self._name(row)}"
            )
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"latents must be finite, got NaN or infinity in {self._name(row)}")
        if bool((found[channels:] < 0).any()):
            raise ValueError(
                "the second half of the channels must be standard deviations, got negative ones "
                f"in {self._name(row)}"
            )
        return found


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a split among all files."""

    files: _Files
    rows: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Tensor) -> Columns:
        """Return the columns of rows of the split."""
        return self.files.read(self.rows[rows], self.shape)
