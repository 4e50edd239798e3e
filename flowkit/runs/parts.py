"""Sampling in parts: processes share the parts, and a stopped command continues from the disk."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from flowkit.provenance import cached, tensor_hash, write_atomically
from flowkit.types import Cond

Columns = dict[str, Tensor]


class Bar:
    """A bar of progress over parts of several steps each; without a terminal it shows nothing.

    Args:
        words: Words beside the bar.
        steps: Steps of a part, at most.
    """

    def __init__(self, words: str, steps: int = 1) -> None:
        self.words, self.steps, self.most = words, steps, 0

    def over(self, parts: Sequence[int], hidden: bool = False) -> Iterator[int]:
        """Yield the numbers of parts; the bar moves on by whole parts, unless `step` was faster."""
        total, shown = len(parts) * self.steps, True if hidden else None  # None: on a terminal
        with tqdm(total=total, desc=self.words, leave=False, disable=shown) as self.bar:
            for number in parts:
                self.most += self.steps
                yield number
                self.bar.update(self.most - self.bar.n)

    def step(self, *_: object) -> None:
        """Move by a step within a part, as a callback of a solver does."""
        if self.bar.n < self.most:  # a velocity with edges takes more steps
            self.bar.update()


class Parts:
    """Numbered parts of a computation. One process makes each part once and keeps it in a folder.

    The content of a part does not depend on the process that makes it, nor on the number of
    processes. A part that a stopped call has left in the folder is not made again.

    Args:
        folder: Parent of the folder of parts. All processes see this folder.
        key: Everything that the parts depend on, as JSON values. Each key has its own folder.
        fabric: The processes.
    """

    def __init__(self, folder: Path, key: Any, fabric: Fabric) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder, self.fabric = folder / f"parts-{digest[:16]}", fabric

    def make(self, count: int, make: Callable[[int], Columns], bar: Bar) -> list[Columns]:
        """Make parts ``0, …, count − 1``; see `stream`.

        Returns:
            All parts on the first process, an empty list on the others.

        A damaged file of a stopped call is named in a warning, and its part is made again. Several
        calls with the same options may run at once.
        """
        return list(self.stream(count, make, bar))

    def stream(self, count: int, make: Callable[[int], Columns], bar: Bar) -> Iterator[Columns]:
        """Make parts as `make` does, and yield one after the other on the first process.

        So memory holds one part. All processes must exhaust the iterator.

        Args:
            count: Number of parts.
            make: Makes a part by its number.
            bar: The bar of progress.
        """
        rank, world = self.fabric.global_rank, self.fabric.world_size
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [self.folder / f"{number:06}.safetensors" for number in range(count)]
        for number in bar.over(range(rank, count, world), hidden=rank > 0):
            if not files[number].is_file():
                _keep(files[number], _whole(make, number))
        self.fabric.barrier()
        if not rank:
            for number, file in enumerate(files):
                yield cached(file, load_file, partial(_whole, make, number), _write)

    def remove(self) -> None:
        """Delete the folder of parts after its use."""
        shutil.rmtree(self.folder, ignore_errors=True)


def hash_of(cond: Cond) -> str | None:
    """Return the hash of conditions, for a key of `Parts`."""
    return None if cond is None else tensor_hash(cast(Any, cond))


def _whole(make: Callable[[int], Columns], number: int) -> Columns:
    """Make a part whose tensors can be stored."""
    return {name: column.contiguous() for name, column in make(number).items()}


def _keep(file: Path, columns: Columns) -> None:
    """Write one part; another call with the same options may just have removed the folder."""
    try:
        write_atomically(file, partial(_write, columns=columns))
    except Exception:
        if file.parent.is_dir():
            raise
        file.parent.mkdir(parents=True)
        write_atomically(file, partial(_write, columns=columns))


def _write(file: Path, columns: Columns) -> None:
    """Write one part."""
    save_file(columns, file)
