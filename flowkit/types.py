"""Types shared by all parts of flowkit: conditions, batches and pairs."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from flowkit.checks import check_cond

Cond = Tensor | Mapping[str, Tensor] | None
"""A condition: one tensor (labels, for example), tensors by name, or None. Always one argument."""


def take(cond: Cond, rows: slice | Tensor) -> Cond:
    """Select the conditions of some samples.

    Args:
        cond: A tensor ``(B, ...)``, tensors ``(B, ...)`` by name, or None.
        rows: The samples: a slice, or a tensor of positions or of booleans.

    Returns:
        The condition of the selected samples, of the same kind as ``cond``.

    >>> take({"label": torch.arange(3)}, slice(1, 3))
    {'label': tensor([1, 2])}
    """
    if isinstance(cond, Mapping):
        return {name: value[rows] for name, value in cond.items()}
    return None if cond is None else cond[rows]


def per_sample(cond: Cond, count: int) -> Cond:
    """Return the conditions of ``count`` samples, a row each; a single row serves all samples.

    Args:
        cond: A tensor ``(1, ...)`` or ``(count, ...)``, such tensors by name, or None.
        count: Number of samples.

    Returns:
        Conditions ``(count, ...)`` of the same kind as ``cond``. Repeated rows take no memory.

    Raises:
        TypeError: If ``cond`` is not None, a tensor or a mapping of tensors.
        ValueError: If a tensor has another number of rows.

    >>> per_sample({"label": torch.tensor([7])}, 3)
    {'label': tensor([7, 7, 7])}
    """
    check_cond(cond)
    if isinstance(cond, Mapping):
        return {name: _rows(value, count) for name, value in cond.items()}
    return None if cond is None else _rows(cond, count)


def _rows(value: Tensor, count: int) -> Tensor:
    """Return ``value (count, ...)``, or the single row of ``value`` for each sample."""
    if value.ndim and len(value) == count:
        return value
    if not value.ndim or len(value) != 1:
        raise ValueError(
            f"cond must hold one row for all samples, or one for each of {count} samples, "
            f"got a tensor of shape {tuple(value.shape)}"
        )
    return value.expand(count, *value.shape[1:])


def to_device(cond: Cond, device: torch.device | str) -> Cond:
    """Move a condition to a device.

    Args:
        cond: A tensor, tensors by name, or None.
        device: The device.

    Returns:
        The condition on the device, of the same kind as ``cond``.

    Raises:
        TypeError: If ``cond`` is not None, a tensor or a mapping.

    >>> to_device({"label": torch.arange(2)}, "cpu")
    {'label': tensor([0, 1])}
    """
    if isinstance(cond, Mapping):
        return {name: value.to(device) for name, value in cond.items()}
    if not (cond is None or isinstance(cond, Tensor)):
        raise TypeError(f"cond must be a tensor, or tensors by name, got {type(cond).__name__}")
    return None if cond is None else cond.to(device)


class Batch(TypedDict):
    """One batch of a data module: a dictionary of tensors. Only ``x1`` is required."""

    x1: Tensor
    """Data ``(B, *)``: images in [-1, 1], latents or points."""
    cond: NotRequired[Cond]
    """Labels ``(B,)`` or other conditions."""
    mask: NotRequired[Tensor]
    """Mask, broadcastable to ``x1``: 1 where an element counts, 0 (padding) where the loss is 0."""
    encoded_by: NotRequired[str]
    """Hash of the autoencoder whose latents ``x1`` holds; absent if ``x1`` holds data."""
    taught_by: NotRequired[str]
    """Hash of the weights of the teacher that computed ``x0 -> x1``; absent without a teacher."""
    x0: NotRequired[Tensor]
    """Source samples ``(B, *)``. With them, training draws no noise."""
    t0: NotRequired[Tensor]
    """Start times ``(B,)`` in [0, 1]. With ``t0`` and ``t1``, ``x0 -> x1`` is a segment."""
    t1: NotRequired[Tensor]
    """End times ``(B,)`` in [0, 1], later than ``t0``."""


class Pairs(NamedTuple):
    """Pairs of source samples and data, with conditions and weights.

    ``x0`` and ``x1`` have the shape ``(B, *)``; row ``i`` of both is one pair. ``cond`` holds the
    conditions of the pairs or None. ``log_weight (B,)`` holds the natural logarithms of their
    weights; None means that all pairs weigh the same.
    """

    x0: Tensor
    x1: Tensor
    cond: Cond = None
    log_weight: Tensor | None = None


def __getattr__(name: str) -> Any:
    """Find ``Velocity`` where code written for version 0.1 looks for it."""
    if name == "Velocity":
        return import_module("flowkit.velocity").Velocity
    raise AttributeError(f"module 'flowkit.types' has no attribute {name!r}")
