"""States in float32 along velocities in half precision."""

from functools import partial

import torch
from torch import Tensor

from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, Velocity, bind

HALF = (torch.bfloat16, torch.float16)


class Precise:
    """A velocity between states in float32 or float64, which measures its own precision.

    The steps of a fine grid change a state by less than half precision resolves. So states and sums
    are in float32 at least; only the velocity itself sees states in half precision.

    Args:
        velocity: The velocity.
        dtype: Type of the states that the velocity takes.

    Attributes:
        eps: Relative spacing of the half format that holds all outputs so far, 0 without such a
            format. The values decide: a wrapper may return half precision as float32.
        returns_half: True if outputs are tensors in half precision.
    """

    def __init__(self, velocity: Velocity, dtype: torch.dtype) -> None:
        self.velocity, self.dtype = velocity, dtype
        self.returns_half, self._formats = False, HALF

    @property
    def eps(self) -> float:
        """Relative spacing of the coarsest half format that holds all outputs so far, or 0."""
        return max((torch.finfo(format).eps for format in self._formats), default=0.0)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` in the type of ``x (B, *)``."""
        return self._convert(self.velocity, x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None) -> BoundVelocity:
        """Prepare the velocity for one solve."""
        bound = bind(self.velocity, cond, grid)
        return bound.wrapped(partial(self._convert, bound))

    def _convert(self, velocity: Velocity, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity in the type of ``x``, and keep the formats that hold it."""
        v = velocity(x.to(self.dtype), t, cond)
        self.returns_half |= v.dtype in HALF
        self._formats = tuple(format for format in self._formats if _holds(format, v))
        return v.to(x.dtype)


def precise(velocity: Velocity, x0: Tensor) -> tuple[Precise, Tensor]:
    """Return the velocity and the states ``(B, *)`` for walks in float32, or in float64."""
    return Precise(velocity, x0.dtype), x0.to(torch.promote_types(x0.dtype, torch.float32))


def _holds(format: torch.dtype, v: Tensor) -> bool:
    """Return whether a half format holds all values."""
    return v.dtype == format or torch.equal(v.to(format).to(v.dtype), v)
