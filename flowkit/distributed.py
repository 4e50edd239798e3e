"""Ranks and progress of a distributed training, and tensors collected from all ranks.

A rank is the number of a process, from 0. Without ``torch.distributed`` there is one process, and
these functions return their input at no cost.
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
    """Return the rank of this process and the number of processes.

    >>> place()
    (0, 1)
    """
    if not (is_available() and is_initialized()):
        return 0, 1
    return get_rank(), get_world_size()


def gathered(x: Tensor) -> Tensor:
    """Concatenate ``x (B, *)`` over all ranks to ``(ranks · B, *)``, in the order of the ranks.

    ``B`` must be the same on all ranks. With several ranks the result carries no gradient.

    >>> gathered(torch.zeros(2, 3)).shape  # one process
    torch.Size([2, 3])
    """
    world = place()[1]
    if world == 1:
        return x
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(world)]
    all_gather(parts, x)
    return torch.cat(parts)


def own(x: Tensor, batch: int) -> Tensor:
    """Return the part ``(batch, *)`` of this rank from a result of `gathered`.

    >>> own(gathered(torch.arange(3)), 3)
    tensor([0, 1, 2])
    """
    return x[place()[0] * batch :][:batch]


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of ``x (*)`` over all ranks. With several ranks it carries no gradient.

    >>> mean_over_ranks(torch.tensor(2.0))
    tensor(2.)
    """
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
