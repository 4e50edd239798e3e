"""A stochastic sampler: the same marginals as the flow, with fresh noise on the way.

For any ``g(t) >= 0`` the stochastic differential equation

    dx = [v(x, t) + ½ g(t)² ∇ log p_t(x)] dt + g(t) dW

has the marginals ``p_t`` of the flow ``dx = v dt``. The score ``∇ log p_t`` follows from the
velocity by the path. Sources: Song et al., *Score-Based Generative Modeling through Stochastic
Differential Equations*, 2020 (arXiv 2011.13456), appendix D.1; Ma et al., *SiT*, 2024 (arXiv
2401.08740), equation 5.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from flowkit.checks import (
    as_grid,
    as_seeds,
    check_at_least,
    check_choice,
    check_number,
    check_state,
)
from flowkit.paths import Interpolant, Linear
from flowkit.sampling.ode import ODESampler, Solution
from flowkit.sampling.solvers import STEPS, After, Field, widest_float, with_edges
from flowkit.types import Cond
from flowkit.velocity import Velocity, bind


def _sigma(path: Interpolant, t: float) -> float:
    """``sqrt(b(t) / b(0))``, with the coefficient ``b`` of the noise."""
    b = path.coefficients(torch.tensor([t, 0.0], dtype=torch.float64)).b
    return (b[0] / b[1]).sqrt().item()


DIFFUSIONS: dict[str, Callable[[Interpolant, float], float]] = {  # in units of their maximum
    "constant": lambda path, t: 1.0,
    "sine": lambda path, t: math.sin(math.pi * t),
    "sigma": _sigma,
    "sde-rl": lambda path, t: 1.0 if t <= 0.5 else math.sqrt((1 - t) / t),
}
METHODS = ("euler", "heun")


@dataclass(frozen=True, eq=False)
class SDESampler:
    """A solver of the stochastic differential equation of a flow, and its grid.

    ``dx = [v + ½ g(t)² ∇ log p_t] dt + g(t) dW``, where the path gives the score from ``v``. This
    holds for flows from standard normal noise that is independent of the data, ``Independent()``
    coupling in training; not for flows of other couplings, straightened or of given sources.

    Args:
        grid: Times ``(n + 1,)``, strictly increasing within [0, 1], or a number of uniform steps.
        diffusion: ``g`` as a function of the time, or one of the names ``"constant"``:
            ``g = scale``; ``"sine"``: ``g = scale sin(πt)``; ``"sigma"``:
            ``g = scale √(b(t) / b(0))``, where ``b`` is the path's coefficient of the noise;
            ``"sde-rl"``: ``g = scale min(1, √((1 − t) / t))`` (Liu et al., *Flow-GRPO*, 2025,
            arXiv 2505.05470, clipped at ``t < ½``).
        scale: The maximum of a named ``g``, at least 0; it has no meaning for a function.
        method: ``"euler"`` (Euler-Maruyama, weak order 1, an evaluation a step) or ``"heun"``
            (Heun's step with the noise in both of its stages, weak order 2, two evaluations).
            These are the observed orders of the variance of Gaussian data.
        path: The path of the flow.

    The last step is one of the ODE, so that no noise is left in the result, and the score at
    ``t = 1`` is not needed. Where ``g`` is 0 on the whole grid, all is as in `ODESampler`.

    **Stability.** If data are (nearly) points, the equation pulls a state to them at the rate
    ``1 / (1 − t) + g² / (2 (1 − t)²)``, and a step times this rate must stay below 2. The step
    before the last of ``n`` uniform ones is the first to fail: a constant ``g`` needs ``g² < 12 /
    n`` (Euler) or ``6 / n`` (Heun). On the linear path ``"sigma"`` and ``"sde-rl"`` only need
    ``scale² < 6`` (Euler) or ``4`` (Heun), for any ``n``.

    Raises:
        TypeError: If the grid, the diffusion or the path is of a wrong kind.
        ValueError: If the grid is not increasing within [0, 1], a name is unknown, or ``g`` is
            negative or not finite at a time of the grid before its end.

    >>> from flowkit.exact import GaussianFlow
    >>> sampler = SDESampler(grid=50, diffusion="sigma")
    >>> x = sampler(GaussianFlow(2.0, 0.5), torch.randn(1, 20_000))
    >>> bool((x.mean() - 2).abs() < 0.02), bool((x.std() - 0.5).abs() < 0.02)
    (True, True)
    """

    grid: Tensor | Sequence[float] | int
    diffusion: str | Callable[[float], float] = "constant"
    scale: float = 1.0
    method: str = "euler"
    path: Interpolant = field(default_factory=Linear)

    def __post_init__(self) -> None:
        check_choice(self.method, METHODS, "method")
        check_number(self.scale, "scale")
        check_at_least(self.scale, 0, "scale")
        if not isinstance(self.path, Interpolant):
            raise TypeError(
                "path must be one whose velocity gives a score, such as Linear, got "
                f"{type(self.path).__name__}"
            )
        if isinstance(self.diffusion, str):
            check_choice(self.diffusion, tuple(DIFFUSIONS), "diffusion")
        elif not callable(self.diffusion):
            raise TypeError(
                "diffusion must be a name or a function of the time, got "
                f"{type(self.diffusion).__name__}"
            )
        self._widths(self.times)

    @cached_property
    def times(self) -> Tensor:
        """The grid as a 1-D float64 tensor; a frozen value like the sampler itself."""
        return as_grid(self.grid)

    def __call__(self, velocity: Velocity, x: Tensor, cond: Cond = None) -> Tensor:
        """Return the state at the end of the grid; see `solve`."""
        return self.solve(velocity, x, cond).x

    def solve(
        self,
        velocity: Velocity,
        x: Tensor,
        cond: Cond = None,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        return_path: bool = False,
        return_log_prob: bool = False,
    ) -> Solution:
        """Solve from the first to the last time of the grid.

        Args:
            velocity: The field, guided or not, as for `ODESampler.solve`.
            x: State ``(B, *)`` at the first time. It is not changed.
            cond: Passed to the velocity.
            seeds: One seed per sample, for its noise. Its first draw is the sample's start as
                `seeded_noise` makes it, step ``k`` takes draw ``k`` after it. None derives the seed
                of a sample from the bytes of its start (in float32): the same start takes the same
                way, in any batch and on any number of processes.
            return_path: Keep the states at all times of the grid.
            return_log_prob: Return the log density ``(n, B)`` of each step taken given its start,
                in float64: ``log N(x_new; x + h f, g² h I)``; 0 for steps without noise. A step
                that ends at an edge of the velocity counts as one. States are then taken as given,
                so that gradients of the log densities are those of policy gradients.

        Raises:
            TypeError: As in `ODESampler.solve`; if ``seeds`` holds other things than integers, or
                ``diffusion`` returns no number.
            ValueError: As in `ODESampler.solve`; if the number of seeds is not ``B``; if ``g`` is
                negative or not finite at an edge; or if log densities are asked of Heun's method,
                whose steps are not Gaussian.
        """
        check_state(x)
        if return_log_prob and self.method != "euler":
            raise ValueError(
                f"method must be 'euler' for log densities, got {self.method!r}; only its steps "
                "are Gaussian"
            )
        starts = _seeds_of(x) if seeds is None else as_seeds(seeds, len(x))
        bound = bind(velocity, cond, self.times)
        path = x.new_empty((len(self.times), *x.shape)) if return_path else None
        times, after = with_edges(self.times, bound.edges, _keep(path, x))
        widths = self._widths(times)
        state = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        calls, rows = Field(bound, state, cond, x.dtype), bound.rows
        noise = _Noise(starts, state)
        step = _Step(self, calls, noise, [] if return_log_prob else None)
        begin_step = calls.begin_step
        try:
            for k, (t, end) in enumerate(pairwise(times.tolist()), 1):
                if begin_step:
                    begin_step(t, end)
                state = step(k, state, t, end, *widths[k - 1])
                if after:
                    state = after(k, end, state)
        finally:  # a solve that fails has called the velocity, too
            bound.count(calls.nfe, calls.nfe * len(x))
        log_prob = torch.stack(step.log_probs) if step.log_probs else None
        return Solution(state.to(x.dtype), calls.nfe, bound.rows - rows, path, log_prob)

    def _widths(self, times: Tensor) -> list[tuple[float, float]]:
        """Return ``g`` at both ends of every step; those of the last step are 0."""
        widths = []
        for t in times[:-1].tolist():
            if isinstance(self.diffusion, str):
                g = self.scale * DIFFUSIONS[self.diffusion](self.path, t)
            else:
                g = _as_number(self.diffusion(t), t)
            if not 0 <= g < math.inf:
                raise ValueError(
                    f"diffusion must be finite and at least 0 before the end of the grid, got {g} "
                    f"at t={t:.6g}"
                )
            widths.append(g)
        return [*pairwise(widths), (0.0, 0.0)]


Sampler = ODESampler | SDESampler


class _Step:
    """The steps of one solve; keeps their log densities in ``log_probs``, unless that is None."""

    def __init__(
        self, sampler: SDESampler, field: Field, noise: "_Noise", log_probs: list[Tensor] | None
    ) -> None:
        self.field, self.noise, self.log_probs = field, noise, log_probs
        self.method, self.path = sampler.method, sampler.path
        self.without_noise = STEPS[self.method]()

    def __call__(self, k: int, x: Tensor, t: float, end: float, g: float, g_end: float) -> Tensor:
        """Return the state at ``end``, from ``x`` at ``t``, where ``g`` is as given."""
        h, variance, mean = end - t, 0.0, x
        if g == 0 and (self.method == "euler" or g_end == 0):
            x = self.without_noise(self.field, x, t, end)
        elif self.method == "euler":
            variance, mean = h * g * g, x + h * self._drift(x, t, g)
            x = mean + math.sqrt(variance) * self.noise(k)
        else:
            # The variance is the integral of g² by the trapezoid rule, and the noise enters both
            # velocities: so the step is of weak order 2.
            drift = self._drift(x, t, g)
            moved = x + math.sqrt(h * (g * g + g_end * g_end) / 2) * self.noise(k)
            x = moved + h / 2 * (drift + self._drift(moved + h * drift, end, g_end))
        if self.log_probs is not None:
            x = x.detach()
            self.log_probs.append(_log_density(x, mean, variance))
        return x

    def _drift(self, x: Tensor, t: float, g: float) -> Tensor:
        """``v + ½ g² ∇ log p_t``, a new tensor."""
        v = self.field.at(x, t).to(x.dtype, copy=True)
        if g == 0:
            return v
        return v + 0.5 * g * g * self.path.to_score(x, x.new_full((len(x),), t), v)


class _Noise:
    """Standard normal noise of each step, from one generator per sample."""

    def __init__(self, seeds: Sequence[int], x: Tensor) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.like, self.noise = x, torch.empty(x.shape)
        self.draws = -1  # of steps; the draw before the first is the start of a sample

    def __call__(self, step: int) -> Tensor:
        """Return the noise ``(B, *)`` of a step; steps come in order, some are left out."""
        while self.draws < step:
            for row, generator in zip(self.noise, self.generators, strict=True):
                row.normal_(generator=generator)
            self.draws += 1
        return self.noise.to(self.like)


def _seeds_of(x: Tensor) -> list[int]:
    """Return a seed of each start: a hash of its bytes, as long as a seed of the generator."""
    rows = x.detach().to("cpu", torch.float32).contiguous()
    digests = (hashlib.blake2b(row.numpy().tobytes(), digest_size=4).digest() for row in rows)
    return [int.from_bytes(digest, "little") for digest in digests]


def _log_density(x: Tensor, mean: Tensor, variance: float) -> Tensor:
    """``log N(x; mean, variance I)`` per sample ``(B,)``; 0 without noise."""
    z = (x - mean).to(widest_float(x.device)).flatten(1)
    if variance == 0:
        return z.new_zeros(len(z))
    return -0.5 * (z.square().sum(1) / variance + z.shape[1] * math.log(2 * math.pi * variance))


def _as_number(g: object, t: float) -> float:
    """Return what a function gave as the amount of noise at a time."""
    try:
        return float(cast(float, g))
    except (TypeError, ValueError):
        raise TypeError(f"diffusion must return one number, got {g!r} at t={t:.6g}") from None


def _keep(path: Tensor | None, x: Tensor) -> After | None:
    """Return the function that keeps the states at the times of the grid."""
    if path is None:
        return None
    path[0] = x

    def after(step: int, t: float, x: Tensor) -> Tensor:
        path[step] = x
        return x

    return after
