"""A device without float64, such as Apple's MPS, simulated on any machine.

Tensors "on the device" are CPU tensors in a wrapper that says that it is on another device.
Whatever they meet stays there until ``.cpu()`` or ``.item()``; a float64 among the results is an
error. Torch has the meta device on all machines, so its name serves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
CPU = torch.device("cpu")


class OnDevice(torch.Tensor):
    """A tensor on the device; ``held`` is its content on the CPU."""

    is_meta = False  # unlike those of the real meta device, its values can be read

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        self.held = held
        return self

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    """Run an operation on the CPU, and put its result on the device that it belongs to."""
    met = []

    def held(x):
        if isinstance(x, OnDevice):
            met.append(x)
            return x.held
        return x

    args_on_cpu, options = tree_map(held, args), tree_map(held, kwargs)
    device = options.get("device")
    if device == DEVICE:
        options["device"] = CPU
    result = func(*args_on_cpu, **options)
    if (device == CPU) or (device is None and not met):
        return result
    if func._schema.is_mutable and isinstance(args[0], OnDevice):
        return args[0]

    def put(x):
        if not isinstance(x, torch.Tensor):
            return x
        if x.dtype == torch.float64:
            raise TypeError(f"the device has no float64, got one by {func}")
        return OnDevice(x)

    return tree_map(put, result)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """`torch.tensor` and the like make their result before any dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return func(*args, **{**kwargs, "device": CPU}).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def device_without_float64() -> Iterator[torch.device]:
    """Give the device, which exists within the context."""
    autocast = torch.autocast

    def on(kind, *args, **options):  # the meta device has no autocast
        return autocast("cpu" if kind == DEVICE.type else kind, *args, **options)

    with _Factories(), _Dispatch(), patch.object(torch, "autocast", on):
        yield DEVICE
