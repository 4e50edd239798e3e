"""One ODE sampler for every velocity, grid and direction.

``dx/dt = v(x, t)`` is solved from noise at ``t = 0`` to data at ``t = 1``, or the other way by
`ODESampler.invert`. The fixed-step methods are the short loops of `flowkit.sampling.solvers`; they
hold a fixed number of states whatever the number of steps. Of the adaptive methods,
`flowkit.sampling.dormand_prince` is our own, the others are torchdiffeq's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import (
    as_grid,
    as_seeds,
    check_at_least,
    check_choice,
    check_integer,
    check_positive,
    check_same_shape,
    check_state,
)
from flowkit.sampling.adaptive import ADAPTIVE, adaptive
from flowkit.sampling.solvers import (
    FIXED,
    STEPS,
    After,
    Corrected,
    Field,
    Step,
    fixed,
    with_edges,
)
from flowkit.types import Cond
from flowkit.velocity import Velocity, bind

Callback = Callable[[int, float, Tensor], Tensor | None]

# The odd number next to 2³¹ / φ, φ the golden ratio: multiples of it modulo 2³¹ keep the largest
# distance from one another.
SEED_STRIDE = 1_327_217_885


class Solution(NamedTuple):
    """Result of a solve.

    ``x``: the final state. ``nfe``: velocity evaluations, counted. ``rows``: rows that went
    through the network in all of them (a guided velocity needs up to two per sample and
    evaluation). ``path``: the states ``(n + 1, B, *)`` at the grid's times, in the order of the
    solve, if asked for. ``log_prob``: log densities ``(n, B)`` of the steps of an
    `SDESampler`, if asked for.
    """

    x: Tensor
    nfe: int
    rows: int
    path: Tensor | None
    log_prob: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ODESampler:
    """A solver and its grid.

    Args:
        grid: Times ``(n + 1,)``, strictly increasing within [0, 1] (a part of it is a partial
            solve), or a number of uniform steps. Adaptive methods choose their own steps and
            only stop at the grid's times.
        method: ``"euler"`` (order 1), ``"midpoint"``, ``"heun"``, ``"ab2"`` (order 2; ab2 needs
            one evaluation a step: Adams-Bashforth with variable steps, started by a midpoint
            step), ``"rk4"`` (order 4); adaptive ``"dopri5"``, and by torchdiffeq ``"dopri8"``,
            ``"bosh3"``, ``"fehlberg2"``, ``"adaptive_heun"``.
        rtol: Relative tolerance of the adaptive methods.
        atol: Absolute tolerance of the adaptive methods.

    Times are computed in float64. The velocity receives states in the dtype of ``x``, and times in
    it too, but at least in float32; every evaluation lies between the ends of the solve. A state in
    half precision (float16, bfloat16) is kept in float32 during the solve, as short steps would be
    lost to rounding: callbacks see float32, the solution and its path have the dtype of ``x``.

    Gradients flow if the velocity's result requires them; sample under ``torch.no_grad()``
    otherwise. An adaptive method's steps are chosen for the whole batch, so its samples depend on
    the batch within the tolerances.

    Raises:
        TypeError: If the grid is neither a whole number nor times.
        ValueError: If the grid is not increasing within [0, 1], the method is unknown or a
            tolerance is not positive.

    >>> from flowkit.exact import GaussianFlow
    >>> sampler = ODESampler(grid=4, method="heun")
    >>> solution = sampler.solve(GaussianFlow(2.0, 0.5), torch.zeros(1, 2))
    >>> solution.nfe
    8
    """

    grid: Tensor | Sequence[float] | int
    method: str = "euler"
    rtol: float = 1e-5
    atol: float = 1e-5

    def __post_init__(self) -> None:
        _ = self.times  # refuses a wrong grid
        check_choice(self.method, (*FIXED, *ADAPTIVE), "method")
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")

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
        return_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve from the first to the last time of the grid.

        Args:
            velocity: The field; if it offers ``bind(cond, grid)``, what that returns is used.
            x: State ``(B, *)`` at the first time. It is not changed.
            cond: Passed to the velocity.
            return_path: Keep the states at all times of the grid.
            callback: Called as ``callback(step, t, x)`` after every step (``step`` from 1, ``t``
                the time reached, ``x`` the solver's own buffer: clone it to keep it). A tensor
                that it returns replaces the state.

        Raises:
            TypeError: If ``x`` is not a floating-point tensor with data, ``cond`` is not None, a
                tensor or tensors by name, or the velocity cannot be called.
            ValueError: If ``x`` has no sample or is not finite, if the velocity's shape is not the
                state's, or if it is not finite in an adaptive solve.
        """
        return self._run(self.times, velocity, x, cond, return_path, callback)

    def invert(
        self,
        velocity: Velocity,
        x: Tensor,
        cond: Cond = None,
        *,
        correct: bool | int = False,
        return_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve from the last to the first time of the grid: data to noise.

        Args:
            velocity: As in `solve`.
            x: State ``(B, *)`` at the grid's last time. It is not changed.
            cond: Passed to the velocity.
            correct: Undo Euler's own steps instead of taking Euler steps backwards. A corrected
                step predicts with the last velocity, evaluates the velocity there, and steps again
                from the old point with the new velocity (Uni-Inv, second order). A number ``k``
                repeats the evaluation and the step ``k`` times, which is fixed-point inversion: it
                converges to the state that Euler's step started from where ``h ‖∂v/∂x‖ < 1``.
                ``n`` steps cost ``1 + n · correct`` evaluations. A mean velocity is inverted by its
                instantaneous velocity, so its own steps are not undone. Sources: Jiao et al.,
                *UniEdit-Flow*, 2025 (arXiv 2504.13109); Pan et al., *Effective Real Image Editing
                with Accelerated Iterative Diffusion Inversion*, 2023 (arXiv 2309.04907).
            return_path: Keep the states, from the last time to the first.
            callback: As in `solve`.

        Raises:
            TypeError: If ``correct`` is not an integer; and as in `solve`.
            ValueError: If ``correct`` is negative, or if it is set for a method other than Euler;
                and as in `solve`.
        """
        corrections = int(correct) if isinstance(correct, bool) else correct
        check_integer(corrections, "correct", 0)
        if corrections and self.method != "euler":
            raise ValueError(
                f"correct must be False for method {self.method!r}, got {correct}; "
                "it undoes Euler steps"
            )
        step = Corrected(corrections) if corrections else None
        return self._run(self.times.flip(0), velocity, x, cond, return_path, callback, step)

    def _run(
        self,
        times: Tensor,
        velocity: Velocity,
        x: Tensor,
        cond: Cond,
        return_path: bool,
        callback: Callback | None,
        step: Step | None = None,
    ) -> Solution:
        check_state(x)
        bound = bind(velocity, cond, self.times)
        bound.average_steps(self.method == "euler" and times is self.times)
        path = x.new_empty((len(times), *x.shape)) if return_path else None
        state = x.to(torch.promote_types(x.dtype, torch.float32))
        field, rows = Field(bound, state, cond, x.dtype), bound.rows
        after = _after_step(path, x, callback)
        if self.method in ADAPTIVE and not (after or bound.follows_steps):
            times = times[[0, -1]]  # the times between have no use
        times, after = with_edges(times, bound.edges, after)
        try:
            if self.method in ADAPTIVE:
                state = adaptive(field, state, times, after, self.method, self.rtol, self.atol)
            else:
                state = fixed(field, state, times.tolist(), after, step or STEPS[self.method]())
        finally:  # a solve that fails has called the velocity, too
            bound.count(field.nfe, field.nfe * len(x))
        return Solution(state.to(x.dtype), field.nfe, bound.rows - rows, path)


def seeded_noise(
    shape: Sequence[int], seeds: Sequence[int] | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Standard normal noise ``(len(seeds), *shape)``, each sample from its own seed.

    A seed gives the same float32 noise on every device, in every batch and on any rank.

    Args:
        shape: Shape of one sample.
        seeds: One integer per sample; torch's generator on the CPU takes them modulo 2³².
        device: Where to put the result.

    Raises:
        TypeError: If ``seeds`` is no sequence of integers.

    >>> a, b = seeded_noise((2,), [3, 4]), seeded_noise((2,), [4])
    >>> bool((a[1] == b[0]).all())
    True
    """
    seeds, generator = as_seeds(seeds), torch.Generator()
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise.to(device)


def sample_seeds(seed: int, first: int, count: int, seeding: int = 2) -> range:
    """Seeds of samples ``first, …, first + count − 1`` of a run's ``seed``, for `seeded_noise`.

    Sample ``k`` has the seed ``(seed · 1327217885 mod 2³¹) + k``, in any batch and on any rank. So
    two runs share no noise: their seeds ``s`` and ``s′`` begin at least ``0.38 · 2³¹ / |s − s′|``
    apart for ``|s − s′| ≤ 10,000``. For ten runs with the seeds 0 to 9 that is 90 million samples,
    for a thousand 970 thousand. Samples of one run have different seeds, always. (A hash of
    ``seed`` and ``k`` would not do: torch's generator takes 32 bits of it, and among 50,000 of
    those two are equal in one run of four.)

    Args:
        seed: The seed of the run, any integer.
        first: Number of the first sample, at least 0.
        count: Number of samples, at least 0.
        seeding: The version of this rule. 1 is the rule of records that name none: sample ``k``
            has the seed ``seed + k``, so that neighboring seeds share noise. For seed 0 both
            versions are the same.

    Raises:
        ValueError: If ``first`` or ``count`` is negative, or the version is unknown.

    >>> sample_seeds(0, 5, 3), sample_seeds(1, 0, 3), sample_seeds(1, 0, 3, seeding=1)
    (range(5, 8), range(1327217885, 1327217888), range(1, 4))
    """
    check_at_least(first, 0, "first")
    check_at_least(count, 0, "count")
    if seeding not in (1, 2):
        raise ValueError(f"seeding must be 1 or 2, got {seeding}")
    start = first + (seed if seeding == 1 else seed * SEED_STRIDE % 2**31)
    return range(start, start + count)


def _after_step(path: Tensor | None, x: Tensor, callback: Callback | None) -> After | None:
    """Return the function that keeps the path and calls the callback; None if there is neither."""
    if path is not None:
        path[0] = x
    elif callback is None:
        return None

    def after(step: int, t: float, x: Tensor) -> Tensor:
        if callback is not None and (replaced := callback(step, t, x)) is not None:
            check_same_shape(replaced, x, ("the callback's result", "x"))
            x = replaced.to(x, copy=True)  # the next step is made in place
        if path is not None:
            path[step] = x
        return x

    return after
