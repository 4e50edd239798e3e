"""Bounds on the step size of `flowkit.flowopt.FlowOpt`, measured by whole solves."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_state, expand_like
from flowkit.sampling import ODESampler, Solution
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, Velocity, bind


class StepBound(NamedTuple):
    """The result of `step_bound`: a bound on the step size, and two facts about its measurement."""

    bound: Tensor
    """Bound ``(B,)`` on the step size; a step below it brings every measured pair closer."""
    cosine: Tensor
    """The smallest cosine ``(B,)`` of ``Δz`` and ``Δf`` among the measured pairs, in (0, 1]."""
    nfe: int
    """Number of velocity evaluations."""


def step_bound(
    velocity: Velocity,
    sampler: ODESampler,
    z: Tensor,
    cond: Cond = None,
    *,
    rounds: int = 4,
    generator: torch.Generator | None = None,
) -> StepBound:
    """Measure the bound ``min 2⟨Δz, Δf⟩ / ‖Δf‖²`` around latents ``z``.

    ``f(z)`` is the result of the whole solve, and ``Δf`` the difference of two results whose
    latents differ by ``Δz``. The step ``z − η (f(z) − y)`` brings the two latents closer if ``η``
    lies below ``2⟨Δz, Δf⟩ / ‖Δf‖²``. For symmetric ``f`` with largest slope ``L`` the bound is
    ``2 / L``. A random pair hardly sees the direction that ``f`` stretches most. The measured pairs
    are therefore those of a power iteration without derivatives: a random ``Δz`` first, then
    ``Δz ← δ Δf / ‖Δf‖``, one solve per round.

    Source: Ronai, Kulikov, Michaeli, *FlowOpt*, 2025 (arXiv 2510.22010). The paper takes its
    condition over random pairs.

    Args:
        velocity: The velocity, guided or not.
        sampler: Solver and grid of ``f``.
        z: Latents ``(B, *)`` at the first time of the sampler's grid. The network computes in their
            type; the states of the solve are float32 or wider.
        cond: The condition that is passed to the velocity.
        rounds: Number of measured pairs, at least 1. There are ``rounds + 1`` solves.
        generator: Draws the first ``Δz``.

    Returns:
        The bound and the smallest cosine of each sample, and the number of evaluations.

    Raises:
        TypeError: If ``z`` is not a floating-point tensor, or ``cond`` is no condition.
        ValueError: If ``rounds`` is below 1, if ``z`` is empty or not finite, or if the cosine of a
            sample is not positive. No step size works for such a sample.

    >>> def stretch(x, t, cond=None):
    ...     return torch.tensor([0.0, 1.0]) * x
    >>> step_bound(stretch, ODESampler(10), torch.ones(1, 2), rounds=8).bound
    tensor([0.771])
    """
    check_at_least(rounds, 1, "rounds")
    check_state(z, "z")
    flow = Flow(sampler, velocity, z.dtype)
    noise = torch.randn(z.shape, device=z.device, generator=generator)
    latent = z.to(flow.dtype)
    with torch.no_grad():
        start = flow(latent, cond)
        bound, cosine = power_bound(lambda z: flow(z, cond), latent, start, noise, rounds, flow.eps)
    require_step(cosine, z, flow.eps)
    return StepBound(bound, cosine, flow.nfe)


class Flow:
    """The map ``f(z; c)`` of the whole solve; it counts velocity evaluations in ``nfe``.

    States are float32 or wider. After the first solve, ``eps`` is the rounding of the network: that
    of its input or of its result, the larger of the two.

    Args:
        sampler: Solver and grid.
        velocity: The velocity. Its states have the type ``dtype``.
        dtype: Type of the network's input.
    """

    def __init__(self, sampler: ODESampler, velocity: Velocity, dtype: torch.dtype) -> None:
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.sampler, self.nfe, self.eps = sampler, 0, torch.finfo(dtype).eps
        self.velocity, self.cast = velocity, _Cast(velocity, dtype, self)
        self.rounds_input = dtype != self.dtype

    def __call__(self, z: Tensor, cond: Cond) -> Tensor:
        """Return ``f(z; cond)`` of latents ``z (B, *)``: NaN for latents that are not finite."""
        finite = expand_like(z.isfinite().flatten(1).all(1), z)
        # A sampler takes finite states alone; a lost sample does not end the others.
        x = self._count(self.sampler.solve(self._next(), z.where(finite, 0), cond))
        return x.where(finite, torch.nan)

    def invert(self, x: Tensor, cond: Cond) -> Tensor:
        """Return the latents ``(B, *)`` of samples ``x (B, *)``; Euler's are corrected."""
        correct = self.sampler.method == "euler"
        return self._count(self.sampler.invert(self._next(), x, cond, correct=correct))

    def _next(self) -> Velocity:
        """Return the velocity of the next solve; the first solve sees the results' type."""
        return self.cast if self.rounds_input or not self.nfe else self.velocity

    def _count(self, solution: Solution) -> Tensor:
        """Add the evaluations of a solution, and return its state."""
        self.nfe += solution.nfe
        return solution.x


class _Cast:
    """A velocity of float32 states; the input of the network is rounded to its type."""

    def __init__(self, velocity: Velocity, dtype: torch.dtype, flow: Flow) -> None:
        self.velocity, self.dtype, self.flow = velocity, dtype, flow

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at states ``x (B, *)`` and times ``t (B,)``."""
        v = self.velocity(x.to(self.dtype), t, cond)
        if v.is_floating_point():
            self.flow.eps = max(self.flow.eps, torch.finfo(v.dtype).eps)
        return v

    def bind(self, cond: Cond, grid: Tensor | None = None) -> BoundVelocity:
        """Bind the network for one solve, with the same rounding."""
        bound = bind(self.velocity, cond, grid)
        return bound.wrapped(_Cast(bound, self.dtype, self.flow))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product ``⟨a, b⟩`` of each sample, ``(B,)``."""
    return (a * b).flatten(1).sum(1)


def rms(x: Tensor) -> Tensor:
    """Compute the root mean square of each sample, ``(B,)``."""
    return x.square().flatten(1).mean(1).sqrt()


def pair_bound(dz: Tensor, df: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the bound ``2⟨Δz, Δf⟩ / ‖Δf‖²`` and the cosine of a pair, both ``(B,)``.

    Where ``Δf = 0``, the bound is ∞ and the cosine is 0.
    """
    product, squared = inner(dz, df), inner(df, df)
    tiny = torch.finfo(dz.dtype).tiny
    cosine = product / (squared.sqrt() * inner(dz, dz).sqrt()).clamp_min(tiny)
    return torch.where(squared > 0, 2 * product / squared, torch.inf), cosine


def power_bound(
    f: Callable[[Tensor], Tensor],
    z: Tensor,
    start: Tensor,
    direction: Tensor,
    rounds: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute the least bound and the least cosine over the pairs of a power iteration.

    Args:
        f: The map of latents ``(B, *)``.
        z: Latents ``(B, *)``, the first of both in every pair.
        start: ``f(z)``.
        direction: The first ``Δf (B, *)``, of any length.
        rounds: Number of pairs.
        eps: Rounding ``ε`` of ``f``. Differences ``Δz`` have the size ``ε^⅓``, which is large
            compared with ``ε`` and small compared with ``z``.

    Returns:
        The bounds and the cosines, both ``(B,)``.
    """
    size = eps ** (1 / 3) * (1 + rms(z))
    tiny = torch.finfo(z.dtype).tiny
    pairs, df = [], direction.to(z.dtype)
    for _ in range(rounds):
        dz = df * expand_like(size / rms(df).clamp_min(tiny), df)
        df = f(z + dz) - start
        pairs.append(torch.stack(pair_bound(dz, df)))
    bound, cosine = torch.stack(pairs).amin(0)
    return bound, cosine


def require_step(cosine: Tensor, z: Tensor, eps: float) -> None:
    """Require cosines ``(B,)`` that are positive by more than the rounding of `power_bound`.

    Args:
        cosine: The least cosine of every sample.
        z: The latents ``(B, *)``.
        eps: Rounding of the flow.

    Raises:
        ValueError: If the cosine of a sample is smaller.
    """
    refused = ~(cosine > 10 * eps ** (2 / 3) / z[0].numel() ** 0.5)
    if bool(refused.any()):
        rows = refused.nonzero().flatten().tolist()
        values = [round(v, 6) for v in cosine[refused].tolist()]
        raise ValueError(
            "the cosine of Δz and Δf must be positive for any step size to converge, got "
            f"{values[:10]} for samples {rows[:10]}; try more steps, fewer skipped or less guidance"
        )
