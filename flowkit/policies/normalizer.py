"""Statistics of actions: the map between a robot's numbers and those of a flow."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from flowkit.checks import check_choice, check_finite, check_integer

KINDS = ("std", "quantile")
OUTSIDE = ("clip", "error", "keep")
CONSTANT = 1e-6  # a dimension whose scale is below this share of its size does not move
FLOOR = 1e-3  # the scale of a dimension that does not move


class ActionNormalizer(nn.Module):
    """Affine map of each dimension of an action, with the statistics of demonstrations.

        normalize(a) = (a − center) / scale

    With ``kind="std"`` the center is the mean and the scale the standard deviation; with
    ``"quantile"`` the 1 and 99 % quantiles become −1 and 1. The statistics are buffers, so they are
    part of every checkpoint. A checkpoint without them is refused, also by ``strict=False``: an
    action that passes through as it is looks like one, and means another motion.

    A dimension that does not move gets the scale 1e-3, with a warning, so that all numbers stay
    finite. Actions outside of the range of the demonstrations are clipped to it and counted, raise
    an error, or are kept.

    Args:
        size: Number of dimensions ``D``.
        outside: ``"clip"``, ``"error"`` or ``"keep"``.

    Attributes:
        clipped: Number of values that were clipped so far.

    Raises:
        ValueError: If the size is below 1, or ``outside`` is another word.

    >>> normalizer = ActionNormalizer.fit(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    >>> normalizer.normalize(torch.tensor([2.0, 3.0])).tolist()
    [1.0, 0.0]
    >>> normalizer.denormalize(torch.tensor([9.0, 0.0])).tolist(), normalizer.clipped
    ([2.0, 3.0], 1)
    """

    center: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, size: int, outside: str = "clip") -> None:
        super().__init__()
        check_integer(size, "size", 1)
        check_choice(outside, OUTSIDE, "outside")
        self.size, self.outside, self.clipped = size, outside, 0
        for name in ("center", "scale", "low", "high"):
            self.register_buffer(name, torch.full((size,), math.nan))

    @classmethod
    def fit(
        cls,
        actions: Tensor,
        kind: str = "std",
        outside: str = "clip",
        may_be_constant: bool = False,
    ) -> "ActionNormalizer":
        """Return the normalizer of actions ``(N, D)``.

        Args:
            actions: The actions, or observations.
            kind: ``"std"`` or ``"quantile"``.
            outside: ``"clip"``, ``"error"`` or ``"keep"``.
            may_be_constant: True for observations, whose constant dimensions need no warning.

        Raises:
            ValueError: If the actions have another shape or are not finite, or ``kind`` is another
                word.
        """
        check_choice(kind, KINDS, "kind")
        if actions.ndim != 2 or not len(actions):
            raise ValueError(f"actions must have shape (N, D), got {tuple(actions.shape)}")
        check_finite(actions, "actions")
        x = actions.double()
        if kind == "std":
            center, scale = x.mean(0), x.std(0, correction=0)
        else:
            low, high = _quantiles(x)
            center, scale = (low + high) / 2, (high - low) / 2
        still = scale <= CONSTANT * center.abs().clamp(min=1)
        if bool(still.any()) and not may_be_constant:
            warnings.warn(
                f"actions must move in every dimension, got constant dimensions "
                f"{still.nonzero()[:, 0].tolist()}; their scale is {FLOOR:g}",
                stacklevel=2,
            )
        found = cls(x.shape[1], outside)
        found.take(center, scale.where(~still, torch.tensor(FLOOR)), x.amin(0), x.amax(0))
        return found

    def take(self, *statistics: Tensor) -> None:
        """Take center, scale and both ends of the range, ``(D,)`` each."""
        for buffer, value in zip(self.buffers(), statistics, strict=True):
            buffer.copy_(value)

    def normalize(self, actions: Tensor) -> Tensor:
        """Return ``(a − center) / scale`` of actions ``(..., D)``.

        Raises:
            ValueError: If the size is another, or an action lies outside and this is an error.
            RuntimeError: If there are no statistics.
        """
        return (self._inside(actions) - self.center) / self.scale

    def denormalize(self, actions: Tensor) -> Tensor:
        """Return actions ``(..., D)``, ``center + scale · a``, within the range of the data.

        Raises:
            ValueError: If the size is another, or an action lies outside and this is an error.
            RuntimeError: If there are no statistics.
        """
        return self._inside(self.center + self.scale * self._of_size(actions))

    def _of_size(self, actions: Tensor) -> Tensor:
        """Require ``D`` dimensions, and statistics."""
        if actions.shape[-1] != self.size:
            raise ValueError(f"actions must have {self.size} dimensions, got {actions.shape[-1]}")
        if bool(self.scale.isnan().any()):
            raise RuntimeError(
                "statistics of the normalizer must be known, got none; use ActionNormalizer.fit or "
                "load a checkpoint"
            )
        return actions

    def _inside(self, actions: Tensor) -> Tensor:
        """Return actions within the range of the data."""
        self._of_size(actions)
        if self.outside == "keep":
            return actions
        slack = 1e-5 * (self.high - self.low) + 1e-6 * self.high.abs()  # of round-off
        outside = (actions < self.low - slack) | (actions > self.high + slack)
        count = int(outside.sum())
        if count and self.outside == "error":
            place = outside.nonzero()[0].tolist()
            low, high = self.low[place[-1]].item(), self.high[place[-1]].item()
            raise ValueError(
                f"actions must lie in [{low:g}, {high:g}] in dimension {place[-1]}, got "
                f"{actions[tuple(place)].item():g}"
            )
        self.clipped += count
        return torch.where(outside, actions.clamp(self.low, self.high), actions)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Load the statistics; missing ones are an error even if others may be missing."""
        errors = rest[-1]
        for name, buffer in self.named_buffers():
            found = state_dict.get(prefix + name)
            if found is None or found.shape != buffer.shape or bool(found.isnan().any()):
                errors.append(
                    f"{prefix}{name} must hold statistics of {self.size} dimensions, got "
                    f"{'none' if found is None else tuple(found.shape)}"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _quantiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 1 and 99 % quantiles of the columns of ``x``, of any number of rows."""
    rows = x.sort(0).values  # torch.quantile takes 2²⁴ values at most
    ends = []
    for share in (0.01, 0.99):
        place = share * (len(rows) - 1)
        left = math.floor(place)
        ends.append(torch.lerp(rows[left], rows[min(left + 1, len(rows) - 1)], place - left))
    return ends[0], ends[1]
