"""Log-likelihoods of data under a flow, each with its own error."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_choice, check_integer, check_state, check_whole
from flowkit.sampling import ADAPTIVE, ODESampler
from flowkit.sampling.solvers import CLOSE, ORDER, widest_float, with_edges
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, Velocity, bind


class LogLikelihood(NamedTuple):
    """Log-likelihoods and their errors, per sample ``(B,)`` and in float64.

    ``value``: in nats. ``stderr``: of the value, ``√(probe_error² + integration_error²)``.
    ``bits_per_dim``: ``−value / (d ln 2)``, without a quantization offset. ``nfe``: velocity
    evaluations of all solves. ``probe_error``: the standard deviation of Hutchinson's estimate; 0
    if the divergence is exact. ``integration_error``: a bound on the error of finite steps.
    """

    value: Tensor
    stderr: Tensor
    bits_per_dim: Tensor
    nfe: int
    probe_error: Tensor
    integration_error: Tensor


def log_likelihood(
    sampler: ODESampler,
    velocity: Velocity,
    x1: Tensor,
    cond: Cond = None,
    divergence: str = "hutchinson",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """Return log-likelihoods under the flow, with an estimate of their errors.

    ``log p(x1) = log N(x0; 0, I) − ∫₀¹ div v(x_t, t) dt`` along the flow through ``x1``.

    The divergence is exact (one backward pass per dimension), or Hutchinson's estimate
    ``εᵀ J ε``, ``J = ∂v/∂x``, with ``P`` Rademacher probes ``ε``, fixed during the solve. State
    and integral are kept in float64 (float32 on a device that has no float64); the velocity
    receives states in the dtype of ``x1``.

    *Error of the probes.* With ``A = ∫ J dt``, the variance of the estimate is
    ``Σ_{i≠j} (A_ij² + A_ij A_ji) / P``. Each probe gets a twin (a single probe gets two), with the
    signs of half of its coordinates flipped. The shares ``ε_i (Aᵀε)_i`` of the coordinates in the
    trace differ between twins by off-diagonal elements alone, and ``Σ_{i≠j} A_ij² = E ‖difference‖²
    / (4 π)``, where ``π`` is the probability that a twin tells two coordinates apart. For a
    symmetric ``A`` this gives the variance without bias; the velocities of Gaussian sources have
    symmetric Jacobians. For any other ``A`` it is a bound. With few probes the error of one sample
    is itself a rough estimate, which may be 0 by chance for an ``A`` of low rank.

    *Error of the integration.* The sampler's solve is compared with solves of half and of a
    quarter of its steps (adaptive methods: 10 and 100 times its tolerances), with the same probes.
    For a method of order ``p`` the difference to half of the steps is ``2^p − 1`` times the error
    of the value, where steps are short enough for the order to hold. Reported is the larger of this
    difference and ``2^−p`` of the next; twice that for Euler, for which it would be no bound. For
    adaptive methods it is at least ``atol + rtol |value|``. A block with one step (see
    `flowkit.velocity.Velocity` on edges) gets a second one. With few steps the value means nothing,
    and the error is large.

    Source: Grathwohl et al., *FFJORD*, 2018 (arXiv 1810.01367), equations 4 and 8; the error
    estimates are ours.

    Args:
        sampler: Its grid must run from 0 to 1; fixed-step methods need at least 2 steps.
        velocity: The field; guided ones are fine.
        x1: Data ``(B, *)`` of any shape.
        cond: Passed to the velocity.
        divergence: ``"hutchinson"`` or ``"exact"``.
        probes: Probes per sample for Hutchinson's estimate.
        generator: Draws the probes.

    Raises:
        TypeError: If ``x1`` is not a floating-point tensor with data, or ``probes`` no whole
            number.
        ValueError: If the grid is partial or too short, ``probes`` is not positive, or ``x1`` is
            empty or not finite.
        RuntimeError: If the velocity cannot be differentiated by its state.

    >>> from flowkit.exact import GaussianFlow
    >>> flow, x1 = GaussianFlow(2.0, 0.5), torch.full((1, 3), 2.0)
    >>> result = log_likelihood(ODESampler(50, "rk4"), flow, x1)
    >>> bool((result.value - flow.log_prob(x1)).abs() < 1e-4)
    True
    """
    check_state(x1, "x1")
    check_choice(divergence, ("hutchinson", "exact"), "divergence")
    check_integer(probes, "probes", 1)
    check_whole(sampler.times)
    if sampler.method not in ADAPTIVE:
        check_at_least(len(sampler.times) - 1, 2, "the number of steps of sampler.grid")
    # In one dimension a probe is exact.
    exact = divergence == "exact" or x1[0].numel() == 1
    signs, twins = _draw(x1, 0 if exact else probes, generator)
    samplers = _coarser(sampler, bind(velocity, cond, sampler.times).edges)

    value, _, nfe = _integrate(samplers[0], velocity, x1, cond, signs)
    half, probe_error, nfe_half = _integrate(samplers[1], velocity, x1, cond, signs, twins)
    quarter, _, nfe_quarter = _integrate(samplers[2], velocity, x1, cond, signs)

    order = ORDER.get(sampler.method, math.log2(10))  # ten times the tolerance, ten times the error
    integration_error = torch.maximum((value - half).abs(), (half - quarter).abs() / 2**order)
    if order == 1:
        integration_error = 2 * integration_error
    if sampler.method in ADAPTIVE:  # they may take the same steps for all tolerances
        floor = sampler.atol + sampler.rtol * value.abs()
        integration_error = torch.maximum(integration_error, floor)
    return LogLikelihood(
        value,
        torch.hypot(probe_error, integration_error),
        -value / (x1[0].numel() * math.log(2)),
        nfe + nfe_half + nfe_quarter,
        probe_error,
        integration_error,
    )


def _draw(x1: Tensor, probes: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw signs: probes ``(P, B, d)``, twins ``(T, B, d)``; twin ``k`` is of probe ``k % P``."""
    shape = (probes, len(x1), x1[0].numel())
    coins = torch.rand(shape, device=x1.device, generator=generator) < 0.5
    signs = coins.to(torch.promote_types(x1.dtype, torch.float32)) * 2 - 1
    # Two for a single probe: to one twin alone, a Jacobian of low rank may show little of itself.
    of_twins = signs.repeat(2, 1, 1) if probes == 1 else signs
    order = torch.rand(of_twins.shape, device=x1.device, generator=generator).argsort(-1)
    return signs, torch.where(order < shape[-1] // 2, -of_twins, of_twins)


def _coarser(sampler: ODESampler, edges: Sequence[float]) -> list[ODESampler]:
    """Return samplers of all, a half and a quarter of the steps between the edges of a velocity."""
    if sampler.method in ADAPTIVE:
        return [
            replace(sampler, rtol=factor * sampler.rtol, atol=factor * sampler.atol)
            for factor in (1, 10, 100)
        ]
    times = with_edges(sampler.times, edges, None)[0].tolist()
    ends = [
        k
        for k, t in enumerate(times)
        if k in (0, len(times) - 1) or any(abs(t - edge) <= CLOSE for edge in edges)
    ]
    blocks = [times[a : b + 1] for a, b in pairwise(ends)]
    blocks = [[a, (a + b) / 2, b] if not between else [a, *between, b] for a, *between, b in blocks]
    grids = []
    for _ in range(3):
        grids.append([*(t for block in blocks for t in block[:-1]), times[-1]])
        blocks = [[*block[:-1:2], block[-1]] for block in blocks]
    return [replace(sampler, grid=torch.tensor(grid, dtype=torch.float64)) for grid in grids]


def _integrate(
    sampler: ODESampler,
    velocity: Velocity,
    x1: Tensor,
    cond: Cond,
    probes: Tensor,
    twins: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Return log-likelihoods, the standard deviation due to the probes (by twins), and the NFE."""
    twins = probes[:0] if twins is None else twins
    d, dtype = x1[0].numel(), widest_float(x1.device)
    state = x1.new_zeros((len(x1), d + 1 + len(twins) * d), dtype=dtype)
    state[:, :d] = x1.reshape(len(x1), d)
    field = _Augmented(velocity, x1, probes, twins)
    with torch.no_grad():
        # With a callback, an adaptive method stops at every time of the grid: its steps stay short
        # enough for the divergence, which the tolerances of the state do not see.
        solution = sampler.invert(field, state, cond, callback=lambda step, t, x: None)
    x0, change, differences = solution.x.tensor_split([d, d + 1], dim=1)
    value = change[:, 0] - 0.5 * (x0.square().sum(1) + d * math.log(2 * math.pi))
    error = differences.square().sum(1)
    if len(twins):
        flips = d // 2
        told_apart = 2 * flips * (d - flips) / (d * (d - 1))
        error = error / (2 * told_apart * len(twins) * len(probes))
    return value, error.sqrt(), solution.nfe


class _Augmented:
    """``d/dt (x, ℓ, D) = (v, div v, differences of the shares in the trace between twins)``.

    Without probes the divergence is exact. The number of differences is that of the twins.
    """

    def __init__(self, velocity: Velocity, x1: Tensor, probes: Tensor, twins: Tensor) -> None:
        self.velocity, self.x1, self.probes, self.twins = velocity, x1, probes, twins

    def bind(self, cond: Cond, grid: Tensor | None = None) -> BoundVelocity:
        bound = bind(self.velocity, cond, grid)
        return bound.wrapped(_Augmented(bound, self.x1, self.probes, self.twins))

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        data = self.x1
        with torch.enable_grad():
            sample = x[:, : data[0].numel()].to(data.dtype).reshape(data.shape)
            sample = sample.detach().requires_grad_()
            v = self.velocity(sample, t.to(torch.promote_types(data.dtype, torch.float32)), cond)
            if not v.requires_grad:
                raise RuntimeError(
                    "velocity must be differentiable in x for its divergence, got a result without "
                    "gradient; let it not run under torch.no_grad()"
                )
            parts = (self._estimate if len(self.probes) else self._exact)(v, sample, x.dtype)
        return torch.cat([v.detach().reshape(len(x), -1).to(x), *parts], dim=1)

    def _exact(self, v: Tensor, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        columns = v.reshape(len(v), -1)
        trace = torch.zeros(len(v), 1, dtype=dtype, device=v.device)
        for i in range(columns.shape[1]):
            (gradient,) = torch.autograd.grad(columns[:, i].sum(), x, retain_graph=True)
            trace += gradient.reshape(len(v), -1)[:, i : i + 1]
        return [trace]

    def _estimate(self, v: Tensor, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        def shares(signs: Tensor) -> Tensor:
            grad_v = signs.reshape(v.shape).to(v.dtype)
            (gradient,) = torch.autograd.grad(v, x, grad_v, retain_graph=True)
            return gradient.reshape(signs.shape).to(dtype) * signs

        found = [shares(signs) for signs in self.probes]
        trace = torch.stack([share.sum(1, keepdim=True) for share in found]).mean(0)
        pairs = zip(cycle(found), self.twins, strict=False)
        return [trace, *(share - shares(signs) for share, signs in pairs)]
