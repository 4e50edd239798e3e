"""Low-rank adapters: few trainable numbers beside frozen weights."""

import copy
import re

from torch import nn

from flowkit.checks import check_integer
from flowkit.extras import install


def add_lora(net: nn.Module, rank: int) -> nn.Module:
    """Add trainable low-rank adapters to all linear and convolution layers, in place.

    ``W x`` becomes ``W x + B A x``. The matrix ``A`` has ``rank`` rows, and ``B`` is 0 at the
    start, so the network computes the same as before. ``W`` is frozen. The library ``peft``
    provides the adapters.

    Args:
        net: The network.
        rank: Rank of the adapters, at least 1.

    Returns:
        The same network.

    Raises:
        ImportError: If ``peft`` is not installed.
        ValueError: If ``rank`` is below 1 or the network has no such layers.

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021 (arXiv
    2106.09685).

    >>> net = add_lora(nn.Sequential(nn.Linear(64, 64)), rank=4)
    >>> sum(p.numel() for p in net.parameters() if p.requires_grad)
    512
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            f"peft must be installed for low-rank adapters, got none; {install('lora')}"
        ) from error
    check_integer(rank, "rank", 1)
    # Only these types: a subclass, as in attention, may be used without a call of the layer.
    layers = [n for n, m in net.named_modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d)]
    if not layers:
        raise ValueError(
            f"net must have linear or convolution layers, got {type(net).__name__} without them"
        )
    pattern = "|".join(map(re.escape, layers))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern)
    return inject_adapter_in_model(config, net)


def merge_lora(net: nn.Module) -> nn.Module:
    """Return a copy of the network with the adapters added to the weights.

    The copy has the structure of the original network without adapters.

    >>> net = merge_lora(add_lora(nn.Sequential(nn.Linear(64, 64)), rank=4))
    >>> type(net[0]).__name__
    'Linear'
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    net = copy.deepcopy(net)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            net.set_submodule(name, layer.get_base_layer())
    return net
