"""Cache of latents on disk. Images are encoded once and stored in files, called shards.

A cache is a folder of safetensors files, ``train-00000.safetensors`` and so on, and an
``index.json``. The index is written last: a folder without the index holds an unfinished cache.
A shard holds the ``mean`` and the ``std`` of the posterior of each of its images. If the data are
mirrored, the rows of the mirror images follow those of the images. The conditions are stored as
``cond``, or as ``cond.<name>`` if there are several by name. Shards are mapped into memory: only
the rows of a batch are read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from flowkit.autoencoders import FrozenAutoencoder, identity
from flowkit.checks import check_at_least, check_finite, check_labels
from flowkit.data.arrays import Index, Split, positions
from flowkit.data.splits import SPLITS, SplitData
from flowkit.data.stream import InOrder
from flowkit.provenance import beside, read_json, write_atomically
from flowkit.types import Batch, Cond

INDEX = "index.json"
Columns = dict[str, Tensor]


def write_cache(
    data: SplitData,
    autoencoder: FrozenAutoencoder,
    root: str | Path,
    shard_size: int = 2048,
    batch_size: int = 64,
    source: Mapping[str, Any] | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Encode the images of all splits and store their latents in a folder.

    If ``data.flip`` is set, the mirror images of the training split are encoded too. A shard is
    moved into the folder when it is complete, and a later call keeps the complete shards. So the
    same call continues an interrupted one.

    Args:
        data: The images; ``data.setup()`` was called.
        autoencoder: The encoder. Its device encodes the images.
        root: The folder of the cache.
        shard_size: Images per shard.
        batch_size: Images per call of the encoder.
        source: The configuration of ``data``, with which an evaluation finds the images again.
        done: Called with the number of images of each encoded batch, and with the number of images
            whose latents an earlier call stored.

    Returns:
        The content of ``index.json``.

    Raises:
        ValueError: If the folder holds shards of another encoding, the data are not images, a
            label is out of range or a latent is not finite.
    """
    check_at_least(shard_size, 1, "shard_size")
    if len(data.shape) != 3:
        raise ValueError(f"data must hold images (C, H, W), got shape {data.shape}")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    shards = list(_plan(data, autoencoder, root, shard_size))
    missing = [shard for shard in shards if not shard.is_done()]
    if missing:  # after the checks above, which leave a cache of another encoding unchanged
        (root / INDEX).unlink(missing_ok=True)
    done(sum(len(shard.part) for shard in shards if shard not in missing))
    for shard in missing:
        batches = InOrder(shard.part, batch_size)
        loader = DataLoader(batches, batch_size=None, num_workers=data.num_workers)
        columns = _encode(loader, autoencoder, shard.mirror, data.num_classes, done)
        write_atomically(shard.file, partial(save_file, columns, metadata=shard.tag))
    index = {
        "autoencoder": identity(autoencoder),
        "image_shape": list(data.shape),
        "latent_shape": list(autoencoder.latent_shape(data.shape)),
        "num_classes": data.num_classes,
        "class_names": data.class_names,
        "source": source,
        "splits": {
            name: {
                "images": data.fingerprint(name),
                "shards": [
                    {"file": shard.file.name, "rows": len(shard.part) * (1 + shard.mirror)}
                    for shard in shards
                    if shard.split == name
                ],
            }
            for name in SPLITS
        },
    }
    text = json.dumps(index, indent=2) + "\n"
    write_atomically(root / INDEX, lambda file: file.write_text(text))
    return index


@dataclass(frozen=True, eq=False)
class _Part:
    """Consecutive samples ``[start, stop)`` of a split."""

    split: Split
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: Index) -> Batch:
        return self.split[positions(index, len(self)) + self.start]

    def fingerprint(self) -> str:
        return self.split.fingerprint()


@dataclass(frozen=True, eq=False)
class _Shard:
    """Plan of one shard: its images, its file, and the metadata ``tag`` of the file.

    If ``mirror`` is True, the shard holds the mirror images too.
    """

    split: str
    part: _Part
    file: Path
    mirror: bool
    tag: dict[str, str]

    def is_done(self) -> bool:
        """Return True if the file exists and is complete.

        Raises:
            ValueError: If the file holds another encoding.
        """
        try:
            with safe_open(self.file, framework="pt") as shard:
                found = shard.metadata() or {}
        except (FileNotFoundError, SafetensorError):
            return False
        for key, value in self.tag.items():
            if found.get(key) != value:
                raise ValueError(
                    f"root must hold latents of one encoding, with {key} {value}, got {self.file} "
                    f"with {found.get(key)}; choose another root"
                )
        return True


def _plan(
    data: SplitData, autoencoder: FrozenAutoencoder, root: Path, shard_size: int
) -> Iterator[_Shard]:
    """Yield the plans of all shards, split by split."""
    for name in SPLITS:
        split, mirror = data.split(name), data.flip and name == "train"
        tag = {
            "autoencoder": autoencoder.hash,
            "images": data.fingerprint(name),
            "mirrored": str(mirror),
        }
        for number, start in enumerate(range(0, len(split), shard_size)):
            part = _Part(split, start, min(start + shard_size, len(split)))
            file = root / f"{name}-{number:05}.safetensors"
            yield _Shard(name, part, file, mirror, {**tag, "rows": f"{start}:{part.stop}"})


@torch.inference_mode()
def _encode(
    loader: DataLoader[Batch],
    autoencoder: FrozenAutoencoder,
    mirror: bool,
    num_classes: int | None,
    done: Callable[[int], object],
) -> Columns:
    """Encode the images of one shard and return its columns."""
    parts: list[Columns] = []
    mirrored: list[Columns] = []
    for batch in loader:
        conds = _named(batch.get("cond"))
        if num_classes is not None and "cond" in conds:
            check_labels(conds["cond"], num_classes, "cond of data")
        images = batch["x1"].to(autoencoder.mean.device)
        parts.append({**_moments(autoencoder, images), **conds})
        if mirror:
            # A condition of the size of the image, a mask for example, is mirrored too.
            size = images.shape[-2:]
            turned = {k: v.flip(-1) if v.shape[-2:] == size else v for k, v in conds.items()}
            mirrored.append({**_moments(autoencoder, images.flip(-1)), **turned})
        done(len(images))
    parts += mirrored
    return {k: torch.cat([part[k] for part in parts]).contiguous() for k in parts[0]}


def _moments(autoencoder: FrozenAutoencoder, images: Tensor) -> Columns:
    """Return the mean and the std of the posteriors of some images, on the CPU."""
    columns = {k: v.cpu() for k, v in autoencoder.posterior(images)._asdict().items()}
    for name, value in columns.items():
        check_finite(value, f"{name} of the latents")
    return columns


def _named(cond: Cond) -> Columns:
    """Return a condition as columns, under the names that a shard uses."""
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"cond": cond}
    return {f"cond.{name}": value for name, value in cond.items()}


def read_index(root: str | Path) -> dict[str, Any]:
    """Read the index of a cache and check the headers of all its shards.

    Args:
        root: The folder of the cache.

    Returns:
        The content of ``index.json``.

    Raises:
        FileNotFoundError: If the cache is not finished, or a shard is missing.
        ValueError: If the index or a shard is damaged, or a shard holds another encoding.
    """
    root = Path(root)
    if not (root / INDEX).is_file():
        raise FileNotFoundError(
            f"root must hold a finished cache, got no {INDEX} in {root}; {_AGAIN}"
        )
    try:
        index = read_json(root / INDEX)
    except ValueError as error:
        raise ValueError(_FOREIGN.format(root, error)) from error
    try:
        hashed, shape = index["autoencoder"]["hash"], index["latent_shape"]
        for split in index["splits"].values():
            for shard in split["shards"]:
                made = {"autoencoder": hashed, "images": split["images"]}
                _check_shard(beside(root, shard["file"]), made, [shard["rows"], *shape])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(_FOREIGN.format(root, repr(error))) from error
    return index


_AGAIN = "run `flowkit encode` with the same options again"
_FOREIGN = f"{INDEX} must be as `flowkit encode` writes it, got {{}}/{INDEX}: {{}}; {_AGAIN}"


def _check_shard(file: Path, made: Mapping[str, str], expected: list[int]) -> None:
    """Require a complete shard with the hashes ``made`` and with means of the expected shape."""
    if not file.is_file():
        raise FileNotFoundError(
            f"root must hold all shards of its {INDEX}, got no {file}; {_AGAIN}"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            tag, shape = opened.metadata() or {}, opened.get_slice("mean").get_shape()
    except SafetensorError as error:
        raise ValueError(f"shards must be complete, got {file}: {error}; {_AGAIN}") from error
    found = {key: tag.get(key) for key in made}
    if found != made:
        raise ValueError(
            f"shards must have the hashes of autoencoder and images in {INDEX}, "
            f"{' and '.join(made.values())}, got {file} with "
            f"{' and '.join(map(str, found.values()))}; {_AGAIN} in another root"
        )
    if shape != expected:
        raise ValueError(
            f"latents must have shape {expected} as the {INDEX} says, got {shape} in {file}"
        )


@cache
def open_shard(file: str, version: int) -> Columns:
    """Open a shard as tensors that are mapped into memory, once per process.

    The system reads a row from the disk when a program first uses the row.

    Args:
        file: The shard.
        version: The modification time of the file in ns. If it changes, the file is opened again.
    """
    with safe_open(file, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118


@dataclass(frozen=True, eq=False)
class Shards:
    """Columns of consecutive shards, read by row.

    Args:
        files: The shards and their modification times in ns, see `open_shard`.
        rows: The number of rows of each shard.
    """

    files: tuple[tuple[str, int], ...]
    rows: tuple[int, ...]

    @classmethod
    def find(cls, root: Path, shards: Sequence[Mapping[str, Any]]) -> "Shards":
        """Find the shards of a split from their entries in the index."""
        files = [root / shard["file"] for shard in shards]
        return cls(
            tuple((str(file), file.stat().st_mtime_ns) for file in files),
            tuple(shard["rows"] for shard in shards),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(self.rows)

    def read(self, rows: Tensor) -> Columns:
        """Return the columns ``(n, *)`` of the rows ``(n,)``, in the order of the rows."""
        ends = torch.tensor(self.rows).cumsum(0)
        owner = torch.bucketize(rows.contiguous(), ends, right=True)
        columns: Columns = {}
        for number in owner.unique().tolist() or [0]:
            here = (owner == number).nonzero()[:, 0]
            local = rows[here] - (ends[number] - self.rows[number])
            for name, column in open_shard(*self.files[number]).items():
                if name not in columns:
                    columns[name] = column.new_empty(len(rows), *column.shape[1:])
                columns[name].index_copy_(0, here, column.index_select(0, local))
        return columns
