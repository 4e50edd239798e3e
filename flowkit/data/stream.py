"""Order of the samples: an endless training stream, and splits read in order.

Training is counted in steps. Batch ``k`` of rank ``r`` is a function of
``(seed, k, r, world_size)`` only. So a resumed run reads exactly the batches of an uninterrupted
run, for any number of workers.
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

from flowkit.couplings import Coupling
from flowkit.data.arrays import Split
from flowkit.types import Batch

Order = Callable[[int, int, int], Tensor]
"""Function ``order(size, seed, epoch)`` that returns the permutation ``(size,)`` of an epoch."""


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a random generator whose seed is a hash of the key, for example of (seed, step).

    The same key gives the same random numbers.

    >>> torch.equal(torch.randn(3, generator=keyed_generator(0, "flip", 7)),
    ...             torch.randn(3, generator=keyed_generator(0, "flip", 7)))
    True
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


@functools.lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation ``(size,)`` of one epoch.

    Calls share the result, so a caller must not modify it in place.
    """
    return torch.randperm(size, generator=keyed_generator(seed, "epoch", epoch))


def stream_positions(
    size: int, seed: int, start: int, stop: int, order: Order = epoch_order
) -> Tensor:
    """Return entries ``start`` to ``stop - 1`` of the endless stream over ``size`` samples.

    The stream is the concatenation of the permutations of all epochs. Each epoch holds each sample
    exactly once. A batch may continue in the next epoch, so no sample is left out.

    Args:
        size: Number of samples.
        seed: The seed of the permutations.
        start: First entry, at least 0.
        stop: Entry after the last one, larger than ``start``.
        order: Returns the permutation of an epoch.

    Returns:
        Positions of samples ``(stop - start,)``.

    >>> sorted(stream_positions(size=5, seed=0, start=5, stop=10).tolist())
    [0, 1, 2, 3, 4]
    """
    epochs = range(start // size, (stop - 1) // size + 1)
    return torch.cat(
        [order(size, seed, e)[max(start - e * size, 0) : stop - e * size] for e in epochs]
    )


@functools.lru_cache(maxsize=4)
def _own_order(split: Any, size: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation that a split with a method ``order`` defines for an epoch."""
    return split.order(seed, epoch)


def draw_pairs(batch: Batch, coupling: Coupling, generator: torch.Generator) -> Batch:
    """Pair the data of a batch with source samples.

    If the batch holds no source samples, they are drawn from N(0, I).

    Args:
        batch: ``x1 (B, *)``, and possibly ``x0 (B, *)`` and ``cond``.
        coupling: Pairs source samples with data.
        generator: Draws the noise and the pairs.

    Returns:
        The pairs ``x0``, ``x1`` and, with conditions, ``cond``.

    Raises:
        ValueError: If the coupling returns weights, which a batch cannot hold, or the batch holds
            other entries than ``x0``, ``x1`` and ``cond``, for example a mask.

    >>> from flowkit.couplings import MinibatchOT
    >>> batch = {"x0": torch.tensor([[0.0], [1.0]]), "x1": torch.tensor([[1.1], [0.1]])}
    >>> pairs = draw_pairs(batch, MinibatchOT(), torch.Generator())
    >>> bool(((pairs["x1"] - pairs["x0"]).abs() < 0.2).all())
    True
    """
    if unpaired := sorted(set(batch) - {"x0", "x1", "cond"}):
        raise ValueError(
            f"coupling must be null for data with {', '.join(unpaired)}, got {coupling}; "
            "pairs do not hold these entries"
        )
    x0 = batch["x0"] if "x0" in batch else torch.randn(batch["x1"].shape, generator=generator)
    pairs = coupling.pair(x0, batch["x1"], batch.get("cond"), generator)
    if pairs.log_weight is not None:
        raise ValueError(
            f"coupling must return pairs without weights in a data module, got {coupling}; "
            "give this coupling to the training module instead"
        )
    if pairs.cond is None:
        return Batch(x1=pairs.x1, x0=pairs.x0)
    return Batch(x1=pairs.x1, x0=pairs.x0, cond=pairs.cond)


@dataclass(frozen=True, eq=False)
class Stream(Dataset):
    """Training batches of one rank, indexed by step. The stream is endless and has no length.

    A step uses ``world_size * batch_size`` consecutive entries of the stream, and rank ``r`` takes
    the entries ``r::world_size`` of them. The samples of a step, and their mirroring, depend on
    this product only, not on its factors.

    Args:
        split: The training split.
        batch_size: Samples per rank and step.
        seed: The seed of order, mirroring and pairs.
        rank: The number of this process, in ``[0, world_size)``.
        world_size: The number of processes.
        flip: Mirror each image, and its mask, left to right with probability one half.
        coupling: Pairs data with noise, see `draw_pairs`; None leaves batches without pairs.

    >>> from flowkit.data.arrays import Arrays
    >>> stream = Stream(Arrays({"x1": torch.arange(4.0)[:, None]}), batch_size=2, seed=0)
    >>> torch.cat([stream[0]["x1"], stream[1]["x1"]]).flatten().sort().values
    tensor([0., 1., 2., 3.])
    """

    split: Split
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    flip: bool = False
    coupling: Coupling | None = None

    @property
    def total(self) -> int:
        """Number of samples per step, over all ranks."""
        return self.batch_size * self.world_size

    @property
    def share(self) -> slice:
        """Slice of a step's samples that belongs to this rank."""
        return slice(self.rank, None, self.world_size)

    def samples(self, step: int) -> Batch:
        """Return the samples of this rank in a step, before mirroring and pairing."""
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
    """Return the tensors to mirror: the images, and a condition of the size of the images."""
    images, cond = batch["x1"], batch.get("cond")
    if isinstance(cond, Tensor) and cond.ndim > 2 and cond.shape[-2:] == images.shape[-2:]:
        return [images, cond]
    return [images]


class Steps(SequentialSampler):
    """Sampler of the steps of a stream, without end.

    It is a subclass of ``SequentialSampler``: with ``overfit_batches`` Lightning replaces samplers
    of other classes.

    Args:
        stream: The training stream.
        start: Returns the number of batches already read. Each iteration calls it once.
    """

    def __init__(self, stream: Stream, start: Callable[[], int]) -> None:
        super().__init__(cast(Any, stream))
        self.start = start

    def __iter__(self) -> Iterator[int]:
        """Yield the steps ``start()``, ``start() + 1`` and so on."""
        return itertools.count(self.start())


@dataclass(frozen=True, eq=False)
class InOrder(Dataset):
    """Batches of a split in order. Rank ``r`` of ``n`` takes the samples ``r::n``.

    Args:
        split: The split.
        batch_size: Samples per batch; the last batch may be smaller.
        rank: The number of this process, in ``[0, world_size)``.
        world_size: The number of processes.

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
        """Positions of the samples of this rank."""
        return range(self.rank, len(self.split), self.world_size)

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return math.ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        """Return the batch of a number, from 0."""
        start = number * self.batch_size
        return self.split[self.rows[start : start + self.batch_size]]
