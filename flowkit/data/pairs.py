"""What a teacher made: pairs of noise and sample, or segments of its trajectories."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowkit.data.arrays import Arrays, Split
from flowkit.data.splits import SplitData, partition
from flowkit.data.stream import InOrder, Stream
from flowkit.types import Batch

FORMAT, FORMAT_VERSION, RECORD = "flowkit-pairs", 1, "pairs.json"


class Pairs(SplitData):
    """Pairs or segments written by ``flowkit pairs``: ``x0``, ``x1 (B, *)``, ``cond``.

    Segments hold ``t0`` and ``t1 (B,)`` as well. Those of one noise stay together when the
    validation part is cut off. They are states of the flow, so latents where it runs on latents.

    What a trained student is to be measured against are not these, but the real data that the
    teacher was trained on: with ``real`` the splits are its, and only the loaders hold pairs.

    Args:
        root: The folder.
        real: The data module that the teacher was trained on.
        val_fraction: The share of noises for validation.
        split_seed: The seed of that choice.
        batch_size: Pairs per process and step.
        seed: The seed of the training stream.
        num_workers: Processes that read ahead.
    """

    x0_is_noise = True

    def __init__(
        self,
        root: str | Path,
        real: SplitData | None = None,
        val_fraction: float = 0.05,
        split_seed: int = 0,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.root, self.real = Path(root), real
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self._pairs: dict[str, Arrays] = {}

    def prepare_data(self) -> None:
        """Prepare the real data."""
        if self.real is not None:
            self.real.prepare_data()

    def load(self) -> Mapping[str, Split]:
        """Read all shards; return the real data's splits, or those of the pairs without a test."""
        record, columns = read_pairs(self.root)
        self.num_classes = record["num_classes"]
        per_noise = record["rows_per_noise"]
        noises = len(columns["x1"]) // per_noise
        for name, part in zip(
            ("train", "val"), partition(noises, [self.val_fraction], self.split_seed), strict=True
        ):
            rows = (part[:, None] * per_noise + torch.arange(per_noise)).flatten()
            self._pairs[name] = Arrays({k: v[rows] for k, v in columns.items()}, str(self.root))
        if self.real is None:
            return self._pairs
        self.real.setup()
        self.class_names = self.real.class_names
        return {name: self.real.split(name) for name in ("train", "val", "test")}

    def split(self, name: str) -> Split:
        """Return a whole split, of the real data if they are given.

        Raises:
            RuntimeError: Before ``setup``, or if ``test`` is asked for without real data.
            ValueError: If ``name`` is not train, val or test.
        """
        if name == "test" and self.real is None:
            raise RuntimeError(
                "real must be the data that the teacher was trained on, for a student to be "
                "measured against, got None; train with +data@data.real=digits or another"
            )
        return super().split(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one state."""
        return tuple(self._pairs["val"].columns["x1"].shape[1:])

    def summary(self) -> str:
        """Say in a line what was found."""
        kind = "segments" if "t0" in self._pairs["train"].columns else "pairs"
        counts = ", ".join(f"{len(part):,} {name}" for name, part in self._pairs.items())
        real = "no real data" if self.real is None else f"beside {self.real.summary()}"
        return f"Pairs: {counts} {kind} of shape {self.shape}, {real}"

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Return the training pairs of one rank, indexed by step."""
        return Stream(self._pairs["train"], self.batch_size, self.seed, rank, world_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return a loader over the held-out pairs."""
        return self._loader(InOrder(self._pairs["val"], self.batch_size, *self._rank()))


def read_pairs(root: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the record and all shards of a folder.

    Raises:
        FileNotFoundError: If the folder holds no record, or a shard is missing.
        ValueError: Naming the file and the field, if one cannot be read.
    """
    from safetensors.torch import load_file

    file = root / RECORD
    if not file.is_file():
        raise FileNotFoundError(f"root must be a folder written by `flowkit pairs`, got {root}")
    record = json.loads(file.read_text())
    if record.get("format") != FORMAT or record.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"version of {file} must be {FORMAT_VERSION}, got {record.get('version')!r}; "
            "make the pairs again with this flowkit"
        )
    shards = []
    for name in record["shards"]:
        if not (root / name).is_file():
            raise FileNotFoundError(
                f"root must hold all {len(record['shards'])} shards, got none called {name} in "
                f"{root}; run `flowkit pairs` again, which goes on where it stopped"
            )
        try:
            shards.append(load_file(root / name))
        except Exception as error:  # safetensors raises its own kind
            raise ValueError(f"shard must be readable, got {root / name}: {error}") from error
    columns = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    return record, cast(dict[str, Tensor], columns)
