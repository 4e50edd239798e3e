"""Low-rank adapters: training a few numbers beside frozen weights."""

import copy
import re

from torch import nn


def add_lora(net: nn.Module, rank: int) -> nn.Module:
    """Add trainable low-rank adapters to all linear and convolution layers, in place.

    ``W x`` becomes ``W x + B A x`` with ``A`` of ``rank`` rows, ``B = 0`` at first, so that the
    network starts as it was; ``W`` is frozen. By the library ``peft``. Source: Hu et al., *LoRA:
    Low-Rank Adaptation of Large Language Models*, 2021 (arXiv 2106.09685).

    Args:
        net: The network.
        rank: Of the adapters, at least 1.

    Returns:
        The network.

    Raises:
        ImportError: Without ``peft``.
        ValueError: If the rank is below 1 or there are no such layers.

    >>> net = add_lora(nn.Sequential(nn.Linear(64, 64)), rank=4)
    >>> sum(p.numel() for p in net.parameters() if p.requires_grad)
    512
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            "peft must be installed for low-rank adapters; pip install 'flowkit-fm[lora]'"
        ) from error
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    # exactly these: what inherits from them, as in attention, may be used without being called
    layers = [n for n, m in net.named_modules() if type(m) in (nn.Linear, nn.Conv1d, nn.Conv2d)]
    if not layers:
        raise ValueError("net must have linear or convolution layers, got none")
    pattern = "|".join(map(re.escape, layers))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern)
    return inject_adapter_in_model(config, net)


def merge_lora(net: nn.Module) -> nn.Module:
    """Return a copy with the adapters added to the weights, of the original's structure.

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
