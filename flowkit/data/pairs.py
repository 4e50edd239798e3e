"""Pairs of noise and sample, or segments of trajectories, computed by a teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.data.arrays import Arrays, Index, Split
from flowkit.data.splits import SplitData, partition
from flowkit.provenance import beside, read_json
from flowkit.types import Batch

FORMAT, FORMAT_VERSION, RECORD = "flowkit-pairs", 1, "pairs.json"
NAMED = "cond."  # prefix of the columns of conditions by name
FIELDS = (
    ("shards", list),
    ("rows_per_noise", int),
    ("num_classes", int | None),
    ("x0_is_noise", bool),
    ("encoded_by", str | None),
    ("source", dict),
    ("provenance", dict),
)


@dataclass(frozen=True, eq=False)
class Taught:
    """Split of pairs or segments. Each batch holds the hash of the teacher.

    Args:
        arrays: The columns of `to_columns`.
        made_by: Further entries of a batch: ``taught_by``, the hash of the teacher, and for latents
            ``encoded_by``, the hash of the autoencoder.
    """

    arrays: Arrays
    made_by: Mapping[str, str]

    def __len__(self) -> int:
        """Return the number of pairs or segments."""
        return len(self.arrays)

    def __getitem__(self, index: Index) -> Batch:
        """Return the pairs or segments at the positions of an index as one batch."""
        columns = cast(dict[str, Any], self.arrays[index])
        named = {k: columns.pop(k) for k in list(columns) if k.startswith(NAMED)}
        if named:
            columns["cond"] = {k.removeprefix(NAMED): v for k, v in named.items()}
        return cast(Batch, {**columns, **self.made_by})

    def fingerprint(self) -> str:
        """Return the SHA-256 of all columns."""
        return self.arrays.fingerprint()


def to_columns(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors of a batch by name. Conditions by name become ``cond.<name>``.

    >>> list(to_columns({"x1": torch.zeros(1, 2), "cond": {"label": torch.tensor([3])}}))
    ['x1', 'cond.label']
    """
    columns: dict[str, Any] = dict(batch)
    if isinstance(columns.get("cond"), Mapping):
        columns |= {NAMED + name: value for name, value in columns.pop("cond").items()}
    return columns


class Pairs(SplitData):
    """Pairs or segments from the folder of ``flowkit pairs``: ``x0``, ``x1 (B, *)``, ``cond``.

    Segments hold their times ``t0`` and ``t1 (B,)`` too. ``x0`` and ``x1`` are states of the flow;
    for a flow on latents they are latents. All segments of one noise are in the same split.

    There is no test split: a trained student is compared with the data of its teacher.
    ``flowkit evaluate`` finds these data by ``source``.

    Args:
        root: The folder.
        val_fraction: The share of the noises in the validation split.
        split_seed: The seed of the splits.
        batch_size: Pairs per process and step.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.

    Attributes:
        source: The configuration of the data of the teacher.

    Raises:
        FileNotFoundError: On ``setup``, if the folder or a shard is missing.
        ValueError: On ``setup``, if a file is damaged or has another version of the format.
    """

    def __init__(
        self,
        root: str | Path,
        val_fraction: float = 0.05,
        split_seed: int = 0,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.root = Path(root)
        self.val_fraction, self.split_seed = val_fraction, split_seed

    def load(self) -> Mapping[str, Split]:
        """Read all shards."""
        record, columns = read_pairs(self.root)
        self.num_classes, self.x0_is_noise = record["num_classes"], record["x0_is_noise"]
        self.source = record["source"]
        hashes = {
            "taught_by": record["provenance"]["model_hash"],
            "encoded_by": record["encoded_by"],
        }
        made_by = {name: value for name, value in hashes.items() if value is not None}
        per_noise = record["rows_per_noise"]
        noises, splits = len(columns["x1"]) // per_noise, {}
        for name, part in zip(
            ("train", "val"), partition(noises, [self.val_fraction], self.split_seed), strict=True
        ):
            rows = (part[:, None] * per_noise + torch.arange(per_noise)).flatten()
            arrays = Arrays({k: v[rows] for k, v in columns.items()}, str(self.root))
            splits[name] = Taught(arrays, made_by)
        return splits

    def split(self, name: str) -> Split:
        """Return a split.

        Raises:
            RuntimeError: Before ``setup``, or if ``name`` is test.
            ValueError: If ``name`` is not train, val or test.
        """
        if name == "test":
            raise RuntimeError(
                "split must be train or val of pairs, got test; compare a student with the data of "
                "its teacher"
            )
        return super().split(name)

    def summary(self) -> str:
        """Describe the data in one line: number of pairs or segments, shape, classes."""
        counts = ", ".join(f"{len(self.split(name)):,} {name}" for name in ("train", "val"))
        first = self.val[:1]
        kind = "segments" if "t0" in first else "pairs"
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        if self.num_classes is None and "cond" in first:
            classes += " but other conditions"
        return f"Pairs: {counts} {kind} of shape {self.shape}, {classes}"


def read_pairs(root: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the record and all shards of a folder.

    Returns:
        The record ``pairs.json`` and the columns ``(N, *)`` of all shards by name.

    Raises:
        FileNotFoundError: If the folder holds no record, or a shard is missing.
        ValueError: If a file or a field of the record cannot be read. The error names both.
    """
    from safetensors.torch import load_file

    file = root / RECORD
    if not file.is_file():
        raise FileNotFoundError(f"root must be a folder written by `flowkit pairs`, got {root}")
    record = _read_record(file)
    shards = []
    for name in record["shards"]:
        if not beside(root, name).is_file():
            raise FileNotFoundError(
                f"root must hold all {len(record['shards'])} shards, got no {name} in {root}; "
                "run `flowkit pairs` again to compute the missing shards"
            )
        try:
            shards.append(load_file(root / name))
        except Exception as error:  # safetensors raises errors of its own class
            raise ValueError(f"shard must be readable, got {root / name}: {error}") from error
    columns = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    return record, cast(dict[str, Tensor], columns)


def _read_record(file: Path) -> dict[str, Any]:
    """Read ``pairs.json`` and check its format, version and fields."""
    try:
        record = read_json(file)
    except ValueError as error:
        raise ValueError(f"pairs must be described by JSON, got {file}: {error}") from error
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if found != FORMAT:
        raise ValueError(
            f"format of {file} must be {FORMAT!r}, got {found!r}; make the pairs again"
        )
    if record.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"version of {file} must be {FORMAT_VERSION}, got {record.get('version')!r}; "
            "make the pairs again with this flowkit"
        )
    for name, kind in FIELDS:
        if name not in record or not isinstance(record[name], kind):
            kind = getattr(kind, "__name__", kind)
            raise ValueError(
                f"{name} in {file} must be a {kind}, got {record.get(name)!r}; make the pairs again"
            )
    return record
