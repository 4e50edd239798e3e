"""Networks that are too large for one device: parameters sharded over all of them (FSDP2)."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from lightning import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from flowkit.modules.flow import FlowModule


class FullySharded(ModelParallelStrategy):
    """Lightning's FSDP2, over all devices of all nodes, with checkpoints in one file."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the processes, and make one group of them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard_if_asked(module: FlowModule, trainer: Trainer) -> None:
    """Have the trainer shard a module's network, if its strategy is `FullySharded`.

    Every block of the network (an entry of one of its outermost ``nn.ModuleList``) is a unit whose
    parameters are gathered for its forward and backward pass only; what is left is another.

    Raises:
        ValueError: If weights are averaged, which Lightning cannot do with shards, or something
            else than the network has parameters to train.
    """
    if not isinstance(trainer.strategy, FullySharded):
        return
    if any(isinstance(callback, WeightAveraging) for callback in cast(Any, trainer).callbacks):
        raise ValueError(
            "callback must be raw with trainer=fsdp, got averaged weights; Lightning averages no "
            "sharded ones"
        )
    inside = {id(p) for p in cast(nn.Module, module.velocity).parameters()}
    outside = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise ValueError(
            "module must train nothing but its velocity with trainer=fsdp, got "
            f"{', '.join(outside[:5])}; use trainer=ddp"
        )
    # On the instance, since Lightning treats every class that overrides the hook as sharded.
    module.configure_model = partial(_shard, module)  # type: ignore[method-assign]


def even_validation(trainer: Trainer, num_samples: int, batch_size: int) -> None:
    """Have all ranks validate on equally many batches, if the trainer shards the network.

    Each call of a sharded network needs every rank: one that had a batch more would wait for ever.
    """
    if not isinstance(trainer.strategy, FullySharded):
        return
    fewest = math.ceil(num_samples // trainer.world_size / batch_size)
    limit = trainer.limit_val_batches
    even = int(limit * fewest) if isinstance(limit, float) else min(limit, fewest)
    trainer.limit_val_batches = even


def _shard(module: FlowModule) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = cast(Any, module.device_mesh)["data_parallel"]
    network = cast(nn.Module, module.velocity)
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
