"""The processes of a training: which one this is, how far it is, and tensors of all of them.

Without ``torch.distributed`` there is one process, and everything here is free.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    all_gather,
    all_reduce,
    get_rank,
    get_world_size,
    is_available,
    is_initialized,
)


def place() -> tuple[int, int]:
    """Return this process's rank and the number of processes.

    >>> place()
    (0, 1)
    """
    if not (is_available() and is_initialized()):
        return 0, 1
    return get_rank(), get_world_size()


def gathered(x: Tensor) -> Tensor:
    """Concatenate ``x (B, *)`` over all ranks, whose batches must be of one size; no gradient."""
    world = place()[1]
    if world == 1:
        return x
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world)]
    all_gather(parts, x)
    return torch.cat(parts)


def own(x: Tensor, batch: int) -> Tensor:
    """Return this rank's part of a tensor like `gathered` returns."""
    return x[place()[0] * batch :][:batch]


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of ``x`` over all ranks; no gradient."""
    world = place()[1]
    if world == 1:
        return x
    x = x.detach().clone()
    all_reduce(x)
    return x / world


def batches_seen(trainer: Any) -> int:
    """Return how many training batches a rank has seen, in all fits that were resumed.

    Unlike optimizer steps it is right for gradient accumulation and for several optimizers.
    Lightning restores it before it asks for a loader. It is a counter of Lightning's own, which
    may change with its version: it is read here alone.

    Args:
        trainer: Lightning's.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed
