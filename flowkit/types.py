"""The few types that every part of flowkit agrees on."""

from collections.abc import Mapping
from typing import NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

Cond = Tensor | Mapping[str, Tensor] | None
"""A condition: labels or another tensor, several named ones, or none. Always one argument."""


def take(cond: Cond, rows: slice | Tensor) -> Cond:
    """Return the conditions of some samples.

    >>> take({"label": torch.arange(3)}, slice(1, 3))
    {'label': tensor([1, 2])}
    """
    if isinstance(cond, Mapping):
        return {name: value[rows] for name, value in cond.items()}
    return None if cond is None else cond[rows]


def to_device(cond: Cond, device: torch.device | str) -> Cond:
    """Return a condition on a device.

    >>> to_device({"label": torch.arange(2)}, "cpu")
    {'label': tensor([0, 1])}

    Raises:
        TypeError: If it is neither a tensor nor tensors by name.
    """
    if isinstance(cond, Mapping):
        return {name: value.to(device) for name, value in cond.items()}
    if not (cond is None or isinstance(cond, Tensor)):
        raise TypeError(f"cond must be a tensor, or tensors by name, got {type(cond).__name__}")
    return None if cond is None else cond.to(device)


class Batch(TypedDict):
    """What a data module yields; only ``x1`` is required."""

    x1: Tensor
    """Data ``(B, *)``: images in [-1, 1], latents or points."""
    cond: NotRequired[Cond]
    """Labels ``(B,)`` or other conditions."""
    mask: NotRequired[Tensor]
    """Broadcastable to ``x1``: 1 counts, 0 (padding) carries no loss."""
    encoded_by: NotRequired[str]
    """``x1`` are latents already: the hash of the autoencoder that they are of."""
    taught_by: NotRequired[str]
    """``x0 -> x1`` was made by a teacher: the hash of its weights."""
    x0: NotRequired[Tensor]
    """Given source samples ``(B, *)``: no noise is drawn."""
    t0: NotRequired[Tensor]
    """``(B,)``: with ``t1``, says that ``x0 -> x1`` is a segment of the flow."""
    t1: NotRequired[Tensor]


class Pairs(NamedTuple):
    """Paired samples ``x0, x1 (B, *)`` with the condition of each and perhaps its log weight."""

    x0: Tensor
    x1: Tensor
    cond: Cond = None
    log_weight: Tensor | None = None
