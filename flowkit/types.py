"""The few types that every part of flowkit agrees on."""

from collections.abc import Mapping
from typing import NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

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


@runtime_checkable
class Velocity(Protocol):
    """Anything that says how fast a state moves: ``velocity(x, t, cond) -> dx/dt``.

    Time runs from noise at ``t = 0`` to data at ``t = 1``. Networks, guided networks and
    closed-form flows are all velocities. A velocity with something to prepare or to cache
    may offer ``bind(cond, grid) -> Velocity``, with the sampler's grid, increasing in either
    direction of the solve (None outside of one); what that returns serves one solve, and may
    offer ``begin_step(t_left, t_right)``, name times in ``edges`` that no step is to lie across,
    and count its network rows in ``rows``. The tensors
    that a solver passes are its buffers: a velocity that keeps one beyond the call clones it.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at states ``x (B, *)`` and times ``t (B,)``."""
        ...


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
