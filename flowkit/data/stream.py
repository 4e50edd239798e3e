"""The order in which samples are seen: an endless training stream, and splits read in order.

Training is counted in steps. Batch ``k`` of rank ``r`` is a pure function of
``(seed, k, r, world_size)``, so that a resumed run sees exactly what an uninterrupted one
would have seen, whatever the number of workers.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from flowkit.data.arrays import Split
from flowkit.types import Batch

Order = Callable[[int, int, int], Tensor]
"""From the number of samples, a seed and an epoch to the order ``(size,)`` of the epoch."""


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a generator that depends on its key alone, as in ``keyed_generator(seed, step)``.

    >>> torch.equal(torch.randn(3, generator=keyed_generator(0, "flip", 7)),
    ...             torch.randn(3, generator=keyed_generator(0, "flip", 7)))
    True
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


@functools.lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation ``(size,)`` of one epoch; shared between calls, so never modify it."""
    return torch.randperm(size, generator=keyed_generator(seed, "epoch", epoch))


def stream_positions(
    size: int, seed: int, start: int, stop: int, order: Order = epoch_order
) -> Tensor:
    """Return entries ``start`` to ``stop`` of the endless stream over ``size`` samples.

    The stream is the concatenation of all epochs' permutations: every sample once per epoch,
    nothing dropped at its end. ``order(size, seed, epoch)`` is one of them.

    >>> sorted(stream_positions(size=5, seed=0, start=5, stop=10).tolist())
    [0, 1, 2, 3, 4]
    """
    epochs = range(start // size, (stop - 1) // size + 1)
    return torch.cat(
        [order(size, seed, e)[max(start - e * size, 0) : stop - e * size] for e in epochs]
    )


@functools.lru_cache(maxsize=4)
def _own_order(split: Any, size: int, seed: int, epoch: int) -> Tensor:
    """The order of a split that reads faster in one of its own."""
    return split.order(seed, epoch)


def draw_pairs(batch: Batch, coupling: Any, generator: torch.Generator) -> Batch:
    """Pair data with their source samples; Gaussian ones are drawn if the batch holds none.

    Args:
        batch: ``x1``, and possibly ``x0`` and ``cond``.
        coupling: Anything with ``pair(x0, x1, cond, generator) -> Pairs``.
        generator: Where noise and coupling draw from.

    Raises:
        ValueError: If the coupling returns weights, which a batch does not carry, or the batch
            holds what pairs do not: a mask or segments.
    """
    if unpaired := sorted(set(batch) - {"x0", "x1", "cond"}):
        raise ValueError(
            f"coupling must be null for data with {', '.join(unpaired)}, got {coupling}; "
            "pairs would lose them"
        )
    x0 = batch["x0"] if "x0" in batch else torch.randn(batch["x1"].shape, generator=generator)
    pairs = coupling.pair(x0, batch["x1"], batch.get("cond"), generator)
    if pairs.log_weight is not None:
        raise ValueError(
            f"coupling must return pairs without weights in a data module, got {coupling}; "
            "give it to the training module instead"
        )
    if pairs.cond is None:
        return Batch(x1=pairs.x1, x0=pairs.x0)
    return Batch(x1=pairs.x1, x0=pairs.x0, cond=pairs.cond)


@dataclass(frozen=True, eq=False)
class Stream(Dataset):
    """The training batches of one rank, indexed by step; endless, so without a length.

    The batches of all ranks together are ``world_size * batch_size`` consecutive entries of
    the stream, of which rank ``r`` takes entries ``r::world_size``: which samples make up a
    step, and which of them are mirrored, depends on the product alone.

    Args:
        split: The training split.
        batch_size: Samples per rank and step.
        seed: The seed of order, mirroring and pairs.
        rank: This process, in ``[0, world_size)``.
        world_size: The number of processes.
        flip: Mirror each image, and a mask of its size, left to right with probability one half.
        coupling: Pairs data with noise here, in the loader's workers; see ``draw_pairs``.
    """

    split: Split
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    flip: bool = False
    coupling: Any = None

    @property
    def total(self) -> int:
        """Samples per step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def share(self) -> slice:
        """This rank's part of a step's samples."""
        return slice(self.rank, None, self.world_size)

    def samples(self, step: int) -> Batch:
        """Return this rank's samples of a step, before mirroring and pairing."""
        start = step * self.total
        own = functools.partial(_own_order, self.split)
        order = own if hasattr(self.split, "order") else epoch_order
        entries = stream_positions(len(self.split), self.seed, start, start + self.total, order)
        return self.split[entries[self.share]]

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step."""
        batch = self.samples(step)
        if self.flip:
            draws = torch.rand(self.total, generator=keyed_generator(self.seed, "flip", step))
            mirrored = draws[self.share] < 0.5
            for part in _images_and_masks(batch):
                part[mirrored] = part[mirrored].flip(-1)
        if self.coupling is None:
            return batch
        generator = keyed_generator(self.seed, "pairs", step, self.rank)
        return draw_pairs(batch, self.coupling, generator)


def _images_and_masks(batch: Batch) -> list[Tensor]:
    images, cond = batch["x1"], batch.get("cond")
    if isinstance(cond, Tensor) and cond.ndim > 2 and cond.shape[-2:] == images.shape[-2:]:
        return [images, cond]
    return [images]


class Steps(SequentialSampler):
    """Counts the steps of a stream, without end.

    It is a kind of ``SequentialSampler`` since Lightning replaces all others on
    ``overfit_batches``.

    Args:
        stream: The stream it counts for.
        start: Returns the number of batches already consumed; asked anew by each iteration.
    """

    def __init__(self, stream: Stream, start: Callable[[], int]) -> None:
        super().__init__(cast(Any, stream))
        self.start = start

    def __iter__(self) -> Iterator[int]:
        """Yield steps from ``start()`` on."""
        return itertools.count(self.start())


@dataclass(frozen=True, eq=False)
class InOrder(Dataset):
    """The batches of a whole split in its own order; each rank takes a strided part.

    >>> from flowkit.data.arrays import Arrays
    >>> batches = InOrder(Arrays({"x1": torch.arange(7.0)}), batch_size=2, rank=1, world_size=2)
    >>> [batches[i]["x1"].tolist() for i in range(len(batches))]
    [[1.0, 3.0], [5.0]]
    """

    split: Split
    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def rows(self) -> range:
        """The positions that belong to this rank."""
        return range(self.rank, len(self.split), self.world_size)

    def __len__(self) -> int:
        """Return the number of batches, the last one possibly smaller."""
        return math.ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        """Return one batch."""
        start = number * self.batch_size
        return self.split[self.rows[start : start + self.batch_size]]
