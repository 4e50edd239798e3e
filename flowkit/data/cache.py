"""A cache of latents on disk: images encoded once, as shards that are read by memory map.

A cache is a folder of safetensors shards, ``train-00000.safetensors`` and so on, and an
``index.json`` that is written last: without it a cache is not finished. A shard holds the
posterior's ``mean`` and ``std`` of its images and, where they are mirrored too, after those the
same of their mirror images; beside them ``cond``, or ``cond.<name>`` for each of several.
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

from flowkit.autoencoders import KLAutoencoder, identity
from flowkit.checks import check_at_least, check_finite, check_labels
from flowkit.data.arrays import Index, Split, positions
from flowkit.data.splits import SplitData
from flowkit.data.stream import InOrder
from flowkit.provenance import write_atomically
from flowkit.types import Batch, Cond

INDEX = "index.json"
SPLITS = ("train", "val", "test")
Columns = dict[str, Tensor]


def write_cache(
    data: SplitData,
    autoencoder: KLAutoencoder,
    root: str | Path,
    shard_size: int = 2048,
    batch_size: int = 64,
    source: Mapping[str, Any] | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Encode all splits of some images; the training split's mirror images too if ``data.flip``.

    Each shard appears in one move when it is complete, and is kept by a later call, so that the
    same call again goes on where it was stopped.

    Args:
        data: The images, set up.
        autoencoder: On the device that shall encode.
        root: The cache's folder.
        shard_size: Images per shard.
        batch_size: Images encoded at a time.
        source: The configuration of ``data``, by which evaluations find the images again.
        done: Told the number of images of every batch, or of a shard that was there.

    Returns:
        The index.

    Raises:
        ValueError: If the folder holds shards of another encoding, data are no images, labels are
            out of range or latents not finite.
    """
    check_at_least(shard_size, 1, "shard_size")
    if len(data.shape) != 3:
        raise ValueError(f"data must hold images (C, H, W), got shape {data.shape}")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    shards = list(_plan(data, autoencoder, root, shard_size))
    missing = [shard for shard in shards if not shard.is_done()]
    if missing:  # only now: a cache of another encoding has been refused, and stays as it is
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
    """Consecutive samples of a split."""

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
    """A shard to be: its images, whether mirrored ones too, and the metadata it shall have."""

    split: str
    part: _Part
    file: Path
    mirror: bool
    tag: dict[str, str]

    def is_done(self) -> bool:
        """Whether it is there and whole; one of another encoding is an error."""
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
    data: SplitData, autoencoder: KLAutoencoder, root: Path, shard_size: int
) -> Iterator[_Shard]:
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
    autoencoder: KLAutoencoder,
    mirror: bool,
    num_classes: int | None,
    done: Callable[[int], object],
) -> Columns:
    """The columns of one shard."""
    parts: list[Columns] = []
    mirrored: list[Columns] = []
    for batch in loader:
        conds = _named(batch.get("cond"))
        if num_classes is not None and "cond" in conds:
            check_labels(conds["cond"], num_classes, "cond of data")
        images = batch["x1"].to(autoencoder.mean.device)
        parts.append({**_moments(autoencoder, images), **conds})
        if mirror:
            # A map, of labels or other, is mirrored with its image.
            size = images.shape[-2:]
            turned = {k: v.flip(-1) if v.shape[-2:] == size else v for k, v in conds.items()}
            mirrored.append({**_moments(autoencoder, images.flip(-1)), **turned})
        done(len(images))
    parts += mirrored
    return {k: torch.cat([part[k] for part in parts]).contiguous() for k in parts[0]}


def _moments(autoencoder: KLAutoencoder, images: Tensor) -> Columns:
    columns = {k: v.cpu() for k, v in autoencoder.posterior(images)._asdict().items()}
    for name, value in columns.items():
        check_finite(value, f"{name} of the latents")
    return columns


def _named(cond: Cond) -> Columns:
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"cond": cond}
    return {f"cond.{name}": value for name, value in cond.items()}


def read_index(root: str | Path) -> dict[str, Any]:
    """Read the index of a cache and look at all its shards' headers.

    Raises:
        FileNotFoundError: If the cache is not finished, or shards are missing.
        ValueError: If the index or a shard is damaged or of another encoding.
    """
    root = Path(root)
    if not (root / INDEX).is_file():
        raise FileNotFoundError(
            f"root must hold a finished cache, got no {INDEX} in {root}; {_AGAIN}"
        )
    try:
        index = json.loads((root / INDEX).read_text())
        hashed, shape = index["autoencoder"]["hash"], index["latent_shape"]
        for split in index["splits"].values():
            for shard in split["shards"]:
                made = {"autoencoder": hashed, "images": split["images"]}
                _check_shard(root / shard["file"], made, [shard["rows"], *shape])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{INDEX} must be as `flowkit encode` writes it, got {root}/{INDEX}: {error!r}; "
            f"{_AGAIN}"
        ) from error
    return index


_AGAIN = "run `flowkit encode` with the same options again"


def _check_shard(file: Path, made: Mapping[str, str], expected: list[int]) -> None:
    """Require a whole shard of the autoencoder and images of its index, and of its shape."""
    if not file.is_file():
        raise FileNotFoundError(
            f"root must hold all shards of its {INDEX}, got no {file}; {_AGAIN}"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            tag, shape = opened.metadata() or {}, opened.get_slice("mean").get_shape()
    except SafetensorError as error:
        raise ValueError(f"shards must be whole, got {file}: {error}; {_AGAIN}") from error
    found = {key: tag.get(key) for key in made}
    if found != made:
        raise ValueError(
            f"shards must be of the autoencoder and images of the {INDEX}, hashes "
            f"{' and '.join(made.values())}, got {file} of "
            f"{' and '.join(map(str, found.values()))}; {_AGAIN} in another root"
        )
    if shape != expected:
        raise ValueError(
            f"latents must have shape {expected} as the {INDEX} says, got {shape} in {file}"
        )


@cache
def open_shard(file: str, version: int) -> Columns:
    """The tensors of a shard, mapped into memory: read from disk when touched, once a process.

    Args:
        file: The shard.
        version: Its time of change, so that one written anew is opened anew.
    """
    with safe_open(file, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118


@dataclass(frozen=True, eq=False)
class Shards:
    """The columns of consecutive shards, read by row.

    Args:
        files: The shards and their times of change, see `open_shard`.
        rows: How many rows each has.
    """

    files: tuple[tuple[str, int], ...]
    rows: tuple[int, ...]

    @classmethod
    def find(cls, root: Path, shards: Sequence[Mapping[str, Any]]) -> "Shards":
        """The shards of a split, as the index lists them."""
        files = [root / shard["file"] for shard in shards]
        return cls(
            tuple((str(file), file.stat().st_mtime_ns) for file in files),
            tuple(shard["rows"] for shard in shards),
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(self.rows)

    def read(self, rows: Tensor) -> Columns:
        """Return the columns of some rows ``(n,)``, in their order."""
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
