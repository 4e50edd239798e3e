"""Training examples that a network is judged by, and the network with its calls counted."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.losses import draw_states
from flowkit.paths import Path
from flowkit.types import Cond, Pairs, take
from flowkit.velocity import BoundVelocity, Velocity, bind

ROWS, CHUNK, FIRST, LAST = 1024, 256, 0.02, 0.98  # of examples, of one call; times
SMALL = 32  # rows that are held in float64 at once


class Watched:
    """A velocity whose calls are counted, and whose errors name the network.

    Args:
        velocity: The network of the user.

    Attributes:
        calls: Calls so far.
        rows: Rows that the network has seen in these calls.
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity, self.calls, self.rows = velocity, 0, 0

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity, and count the call."""
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.velocity(x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> Velocity:
        """Return the velocity of one solve; that of a mean velocity is the instantaneous one."""
        bound = bind(self.velocity, cond, grid)
        if bound.has_means:
            return BoundVelocity(self)

        def call(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
            self.calls, self.rows = self.calls + 1, self.rows + len(x)
            return bound(x, t, cond)

        return bound.wrapped(call)

    def outputs(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the outputs for many rows, by calls of at most 256 rows, in float32 at least."""
        rows = [slice(k, k + CHUNK) for k in range(0, len(x), CHUNK)]
        found = torch.cat([self(x[part], t[part], take(cond, part)) for part in rows])
        return found.to(torch.promote_types(found.dtype, torch.float32))


class Examples(NamedTuple):
    """States of pairs at times in [0.02, 0.98], with their target velocities.

    There are ``R`` rounds of all ``N`` pairs: row ``r N + i`` belongs to pair ``i``. Rows of one
    pair depend on each other, so errors of means are those of means over ``N`` pairs.
    """

    x_t: Tensor
    """States ``(R N, *)``."""
    t: Tensor
    """Times ``(R N,)``: of each pair one in each of ``R`` equal parts of the interval."""
    u: Tensor
    """Target velocities ``(R N, *)``."""
    cond: Cond
    """Conditions of the rows."""
    pairs: int
    """The number ``N`` of pairs."""

    @property
    def pair(self) -> Tensor:
        """Return the pair of each row, ``(R N,)``."""
        return torch.arange(len(self.t), device=self.t.device) % self.pairs

    def some(self, rows: slice | Tensor) -> "Examples":
        """Return the examples of some rows; ``pair`` no longer holds."""
        return self._replace(
            x_t=self.x_t[rows], t=self.t[rows], u=self.u[rows], cond=take(self.cond, rows)
        )


def draw_examples(
    x0: Tensor, x1: Tensor, cond: Cond, path: Path, generator: torch.Generator
) -> Examples:
    """Draw examples of pairs ``x0, x1 (N, *)``, about 1024 and at least 2 of each pair."""
    pairs = len(x1)
    rounds = max(2, math.ceil(ROWS / pairs))
    shift = torch.rand(rounds, pairs, generator=generator)
    part = torch.stack([torch.randperm(rounds, generator=generator) for _ in range(pairs)], 1)
    t = FIRST + (LAST - FIRST) * (part + shift).flatten() / rounds
    rows = torch.arange(pairs).repeat(rounds)
    drawn = draw_states(
        Pairs(x0[rows], x1[rows], take(cond, rows)), t.to(x1), path, generator=generator
    )
    return Examples(drawn.x_t, drawn.t, drawn.u, drawn.cond, pairs)


class Mean(NamedTuple):
    """A mean over pairs and its standard error."""

    value: float
    error: float

    @property
    def z(self) -> float:
        """Return the mean in standard errors; 0 for a mean of equal zeros."""
        if self.error == 0:
            return 0.0 if self.value == 0 else math.copysign(math.inf, self.value)
        return self.value / self.error


def mean_of(values: Tensor, pair: Tensor, weight: Tensor | None = None) -> Mean:
    """Return the mean of rows, with the error of dependent rows of one pair.

    The mean is the ratio ``Σ w v / Σ w``. Its error is that of a ratio of sums over pairs.

    Args:
        values: Numbers ``(M,)``.
        pair: The pair of each row ``(M,)``.
        weight: Weights ``(M,)``; None is 1.
    """
    values = values.double()
    weight = torch.ones_like(values) if weight is None else weight.double()
    mean = (weight * values).sum() / weight.sum()
    size = int(pair.max()) + 1
    sums = values.new_zeros(size).index_add_(0, pair, weight * (values - mean))
    there = len(pair.unique())
    error = sums.square().sum().sqrt() / weight.sum() * math.sqrt(there / max(there - 1, 1))
    return Mean(mean.item(), error.item())


def squares(x: Tensor) -> Tensor:
    """Return the mean square of each row ``(M,)``."""
    return torch.cat([part.double().square().flatten(1).mean(1) for part in x.split(SMALL)])


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of each row ``(M,)``."""
    return squares(x).sqrt()
