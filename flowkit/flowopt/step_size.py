"""How large a step of `flowkit.flowopt.FlowOpt` may be, measured by whole solves."""

from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_finite, expand_like
from flowkit.sampling import ODESampler
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, Velocity, bind


class StepBound(NamedTuple):
    """What `step_bound` returns.

    ``bound``: per sample ``(B,)``, the step size below which every pair of latents visited comes
    closer. ``cosine``: ``(B,)``, the smallest cosine of their ``Δz`` and ``Δf``. ``nfe``: velocity
    evaluations, counted.
    """

    bound: Tensor
    cosine: Tensor
    nfe: int


def step_bound(
    velocity: Velocity,
    sampler: ODESampler,
    z: Tensor,
    cond: Cond = None,
    *,
    rounds: int = 4,
    generator: torch.Generator | None = None,
) -> StepBound:
    """Measure ``min 2⟨Δz, Δf⟩ / ‖Δf‖²`` around ``z``, ``f(z)`` being the whole solve.

    The step ``z − η (f(z) − y)`` brings a pair of latents closer where ``η`` lies below this, for
    symmetric ``f`` below ``2 / L``. A random pair hardly sees the direction that ``f`` stretches
    most, so the pairs are those of a power iteration without derivatives: a random ``Δz``, then
    ``Δz ← δ Δf / ‖Δf‖``, one solve a round. Source: Ronai et al., *FlowOpt*, 2025 (arXiv
    2510.22010), whose condition is taken over random pairs.

    Args:
        velocity: The field.
        sampler: Defines ``f``.
        z: Latents ``(B, *)`` at the first time of the sampler's grid.
        cond: Passed to the velocity.
        rounds: Pairs visited; ``rounds + 1`` solves.
        generator: Draws the first ``Δz``.

    Raises:
        ValueError: If a cosine is not positive, so that no step size works for the sample.

    >>> def stretch(x, t, cond=None):
    ...     return torch.tensor([0.0, 1.0]) * x
    >>> step_bound(stretch, ODESampler(10), torch.ones(1, 2), rounds=8).bound
    tensor([0.771])
    """
    check_at_least(rounds, 1, "rounds")
    check_finite(z, "z")
    flow = Flow(sampler, velocity, z.dtype)
    noise = torch.randn(z.shape, device=z.device, generator=generator)
    latent = z.to(flow.dtype)
    with torch.no_grad():
        start = flow(latent, cond)
        bound, cosine = power_bound(lambda z: flow(z, cond), latent, start, noise, rounds, z.dtype)
    require_step(cosine, z)
    return StepBound(bound, cosine, flow.nfe)


class Flow:
    """``f(z; c)``: the whole solve, with states in float32 at least, counting evaluations.

    Args:
        sampler: The solver.
        velocity: The field; called with states of ``dtype``.
        dtype: What the network computes in.
    """

    def __init__(self, sampler: ODESampler, velocity: Velocity, dtype: torch.dtype):
        self.dtype = torch.promote_types(dtype, torch.float32)
        self.sampler, self.nfe = sampler, 0
        self.velocity = velocity if dtype == self.dtype else _Cast(velocity, dtype)

    def __call__(self, z: Tensor, cond: Cond) -> Tensor:
        return self._count(self.sampler.solve(self.velocity, z, cond))

    def invert(self, x: Tensor, cond: Cond) -> Tensor:
        correct = self.sampler.method == "euler"
        return self._count(self.sampler.invert(self.velocity, x, cond, correct=correct))

    def _count(self, solution) -> Tensor:
        self.nfe += solution.nfe
        return solution.x


class _Cast:
    """A half-precision velocity at float32 states: those are rounded for the network alone."""

    def __init__(self, velocity: Velocity, dtype: torch.dtype):
        self.velocity, self.dtype = velocity, dtype

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.velocity(x.to(self.dtype), t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> BoundVelocity:
        bound = bind(self.velocity, cond, grid)
        return bound.wrapped(_Cast(bound, self.dtype))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """``⟨a, b⟩`` per sample, ``(B,)``."""
    return (a * b).flatten(1).sum(1)


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample, ``(B,)``."""
    return x.square().flatten(1).mean(1).sqrt()


def pair_bound(dz: Tensor, df: Tensor) -> tuple[Tensor, Tensor]:
    """``2⟨Δz, Δf⟩ / ‖Δf‖²`` and the cosine of a pair, per sample; without any ``Δf``, ∞ and 0."""
    product, squared = inner(dz, df), inner(df, df)
    tiny = torch.finfo(dz.dtype).tiny
    cosine = product / (squared.sqrt() * inner(dz, dz).sqrt()).clamp_min(tiny)
    return torch.where(squared > 0, 2 * product / squared, torch.inf), cosine


def power_bound(
    f, z: Tensor, start: Tensor, direction: Tensor, rounds: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Least bound and cosine over the pairs of a power iteration from ``direction``.

    ``dtype`` is what ``f`` computes in: differences are of the size ``ε^⅓``, which is large beside
    its rounding and small beside ``z``.
    """
    size = torch.finfo(dtype).eps ** (1 / 3) * (1 + rms(z))
    tiny = torch.finfo(z.dtype).tiny
    pairs, df = [], direction.to(z.dtype)
    for _ in range(rounds):
        dz = df * expand_like(size / rms(df).clamp_min(tiny), df)
        df = f(z + dz) - start
        pairs.append(torch.stack(pair_bound(dz, df)))
    bound, cosine = torch.stack(pairs).amin(0)
    return bound, cosine


def require_step(cosine: Tensor, z: Tensor, dtype: torch.dtype | None = None) -> None:
    """Refuse samples whose cosine is not positive beyond the rounding of `power_bound`."""
    eps = torch.finfo(dtype or z.dtype).eps
    refused = ~(cosine > 10 * eps ** (2 / 3) / z[0].numel() ** 0.5)
    if bool(refused.any()):
        rows = refused.nonzero().flatten().tolist()
        values = [round(v, 6) for v in cosine[refused].tolist()]
        raise ValueError(
            "the cosine of Δz and Δf must be positive for any step size to converge, got "
            f"{values[:10]} for samples {rows[:10]}; try more steps, fewer skipped or less guidance"
        )
