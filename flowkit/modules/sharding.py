"""Fully sharded training (FSDP2), for networks that do not fit on one device."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from flowkit.modules.flow import FlowModule
from flowkit.sampling import MeanVelocity


class FullySharded(ModelParallelStrategy):
    """Strategy for FSDP2: each device of each node holds a shard of the parameters.

    A checkpoint is a single file with all parameters.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Start the processes as one data-parallel group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard_if_asked(module: LightningModule, trainer: Trainer) -> None:
    """Shard the network of a module, if the strategy of the trainer is `FullySharded`.

    A block of the network is an entry of one of its outermost ``nn.ModuleList``. Each block is a
    unit: its parameters are gathered only for its forward and backward pass. The parameters outside
    of the blocks are one more unit.

    Args:
        module: The module.
        trainer: The trainer that will fit the module.

    Raises:
        ValueError: If a callback averages the weights, or the module is no flow or has trainable
            parameters outside of its velocity. Lightning does not average sharded weights.
    """
    if not isinstance(trainer.strategy, FullySharded):
        return
    if any(isinstance(callback, WeightAveraging) for callback in cast(Any, trainer).callbacks):
        raise ValueError(
            "callback must be raw with trainer=fsdp, got averaged weights; Lightning does not "
            "average sharded weights"
        )
    if not isinstance(module, FlowModule):
        raise ValueError(
            f"module must be a flow with trainer=fsdp, got {type(module).__name__}; use trainer=ddp"
        )
    if isinstance(module.velocity, MeanVelocity):
        raise ValueError(
            "module must be no mean flow with trainer=fsdp, since sharded weights have no "
            f"derivative along the flow, got {type(module).__name__}; use trainer=ddp"
        )
    inside = {id(p) for p in cast(nn.Module, module.velocity).parameters()}
    outside = [n for n, p in module.named_parameters() if p.requires_grad and id(p) not in inside]
    if outside:
        raise ValueError(
            "module must train its velocity only with trainer=fsdp, got "
            f"{', '.join(outside[:5])}; use trainer=ddp"
        )
    # The hook is set on the instance: Lightning takes each class with this hook for sharded.
    module.configure_model = partial(_shard, module)  # type: ignore[method-assign]


def even_validation(trainer: Trainer, num_samples: int, batch_size: int) -> None:
    """Limit validation to the same number of batches on all ranks, for a sharded network.

    Each call of a sharded network needs all ranks. A rank with one batch more than the others would
    wait without end. Without the strategy `FullySharded` the function changes nothing.

    Args:
        trainer: The trainer, whose ``limit_val_batches`` is set.
        num_samples: Number of validation samples.
        batch_size: Samples per rank and batch.
    """
    if not isinstance(trainer.strategy, FullySharded):
        return
    fewest = math.ceil(num_samples // trainer.world_size / batch_size)
    limit = trainer.limit_val_batches
    even = int(limit * fewest) if isinstance(limit, float) else min(limit, fewest)
    trainer.limit_val_batches = even


def _shard(module: FlowModule) -> None:
    """Shard the blocks of the velocity, then the rest of the velocity."""
    from torch.distributed.fsdp import fully_shard

    if cast(Any, module.trainer).state.fn == "fit":
        module.on_fit_start()  # now: sharded parameters take no whole weights
    mesh = cast(Any, module.device_mesh)["data_parallel"]
    network = cast(nn.Module, module.velocity)
    for block in _blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of the outermost module lists of a network."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
