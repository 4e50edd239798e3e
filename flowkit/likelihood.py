"""Log-likelihoods of data under a flow, each with its own error."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_choice, check_whole
from flowkit.sampling import ADAPTIVE, ODESampler
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, Velocity, bind


class LogLikelihood(NamedTuple):
    """``value``, ``stderr`` and ``bits_per_dim`` per sample ``(B,)``; ``nfe`` of all solves.

    ``value`` is in nats; ``stderr`` combines the estimated errors of the probes and of the
    integration; ``bits_per_dim = −value / (d ln 2)``, without a quantization offset.
    """

    value: Tensor
    stderr: Tensor
    bits_per_dim: Tensor
    nfe: int


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
    ``εᵀ (∂v/∂x) ε`` with Rademacher probes ``ε``, fixed during the solve. The integration error is
    the difference to a solve with half the steps (adaptive methods: ten times the tolerances);
    the error of the probes is bounded from the same backward passes by
    ``Var ≤ 2 ‖J‖² = 2 E‖Jᵀε‖²``, integrated as if the errors were fully correlated in time. The
    bound is far above the error where the Jacobian is nearly diagonal. With few steps the value
    means nothing, and the reported error is large.

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
        ValueError: If the grid is partial or too short, or ``probes`` is not positive.
        RuntimeError: If the velocity cannot be differentiated by its state.

    >>> from flowkit.exact import GaussianFlow
    >>> flow, x1 = GaussianFlow(2.0, 0.5), torch.full((1, 3), 2.0)
    >>> result = log_likelihood(ODESampler(50, "rk4"), flow, x1)
    >>> bool((result.value - flow.log_prob(x1)).abs() < 1e-4)
    True
    """
    check_choice(divergence, ("hutchinson", "exact"), "divergence")
    check_at_least(probes, 1, "probes")
    times = sampler.times
    check_whole(times)
    if sampler.method in ADAPTIVE:
        coarse = replace(sampler, rtol=10 * sampler.rtol, atol=10 * sampler.atol)
    else:
        check_at_least(len(times) - 1, 2, "the number of steps of sampler.grid")
        coarse = replace(sampler, grid=torch.cat([times[:-1:2], times[-1:]]))
    shape = (1 if divergence == "exact" else probes, *x1.shape)
    coins = torch.rand(shape, device=x1.device, generator=generator) < 0.5
    exact = divergence == "exact" or x1[0].numel() == 1  # in one dimension a probe is exact
    field = _Augmented(velocity, coins.to(x1.dtype) * 2 - 1, exact)

    value, probe_error, nfe = _integrate(sampler, field, x1, cond)
    coarse_value, _, coarse_nfe = _integrate(coarse, field, x1, cond)
    stderr = torch.hypot(probe_error, value - coarse_value)
    bits_per_dim = -value / (x1[0].numel() * math.log(2))
    return LogLikelihood(value, stderr, bits_per_dim, nfe + coarse_nfe)


def _integrate(
    sampler: ODESampler, field: "_Augmented", x1: Tensor, cond: Cond
) -> tuple[Tensor, Tensor, int]:
    state = torch.cat([x1.flatten(1), x1.new_zeros(len(x1), 2)], dim=1)
    with torch.no_grad():
        # With a callback, an adaptive method stops at every time of the grid: its steps stay short
        # enough for the divergence, which the tolerances of the state do not see.
        solution = sampler.invert(field, state, cond, callback=lambda step, t, x: None)
    x0, change, error = solution.x[:, :-2], solution.x[:, -2], solution.x[:, -1]
    log_noise = -0.5 * (x0.square().sum(1) + x0.shape[1] * math.log(2 * math.pi))
    return log_noise + change, error.abs(), solution.nfe


class _Augmented:
    """``d/dt (x, ℓ, e) = (v, div v, bound on the standard deviation of the estimate)``."""

    def __init__(self, velocity: Velocity, probes: Tensor, exact: bool) -> None:
        self.velocity, self.probes, self.exact = velocity, probes, exact

    def bind(self, cond: Cond, grid: Tensor | None = None) -> BoundVelocity:
        bound = bind(self.velocity, cond, grid)
        return bound.wrapped(_Augmented(bound, self.probes, self.exact))

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        with torch.enable_grad():
            sample = x[:, :-2].reshape(self.probes.shape[1:]).detach().requires_grad_()
            v = self.velocity(sample, t, cond)
            if not v.requires_grad:
                raise RuntimeError(
                    "velocity must be differentiable in x for its divergence, got a result without "
                    "gradient; let it not run under torch.no_grad()"
                )
            trace, spread = (self._exact if self.exact else self._estimate)(v, sample)
        return torch.cat([v.detach().flatten(1), trace[:, None], spread[:, None]], dim=1)

    def _exact(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        columns, trace = v.flatten(1), x.new_zeros(len(x))
        for i in range(columns.shape[1]):
            (gradient,) = torch.autograd.grad(columns[:, i].sum(), x, retain_graph=True)
            trace = trace + gradient.flatten(1)[:, i]
        return trace, torch.zeros_like(trace)

    def _estimate(self, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        traces, variances = [], []
        for probe in self.probes:
            (gradient,) = torch.autograd.grad(v, x, probe, retain_graph=True)
            traces.append((gradient * probe).flatten(1).sum(1))
            variances.append(2 * gradient.square().flatten(1).sum(1))
        count = len(self.probes)
        return sum(traces) / count, (sum(variances) / count**2).sqrt()  # type: ignore[return-value]
