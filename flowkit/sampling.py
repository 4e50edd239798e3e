"""One ODE sampler for every velocity, grid and direction.

``dx/dt = v(x, t)`` is solved from noise at ``t = 0`` to data at ``t = 1``, or the other way by
`ODESampler.invert`. The fixed-step methods are the short loops below; they hold a fixed number
of states whatever the number of steps. Adaptive methods are torchdiffeq's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flowkit.checks import as_grid, check_choice, check_positive, check_same_shape
from flowkit.types import Cond, Velocity

Callback = Callable[[int, float, Tensor], Tensor | None]


class Solution(NamedTuple):
    """What a solve returns.

    ``x``: the final state. ``nfe``: velocity evaluations, counted. ``rows``: rows that went
    through the network in all of them (a guided velocity needs up to two per sample and
    evaluation). ``path``: the states ``(n + 1, B, *)`` at the grid's times, in the order of the
    solve, if asked for.
    """

    x: Tensor
    nfe: int
    rows: int
    path: Tensor | None


@dataclass(frozen=True, eq=False)
class ODESampler:
    """A solver and its grid.

    Args:
        grid: Times ``(n + 1,)``, strictly increasing within [0, 1] (a part of it is a partial
            solve), or a number of uniform steps. Adaptive methods choose their own steps and
            only stop at the grid's times.
        method: ``"euler"`` (order 1), ``"midpoint"``, ``"heun"``, ``"ab2"`` (order 2; ab2 needs
            one evaluation a step: Adams-Bashforth with variable steps, started by a midpoint
            step), ``"rk4"`` (order 4); or by torchdiffeq ``"dopri5"``, ``"dopri8"``, ``"bosh3"``,
            ``"fehlberg2"``, ``"adaptive_heun"``.
        rtol: Relative tolerance of the adaptive methods.
        atol: Absolute tolerance of the adaptive methods.

    Times are computed in float64. The state keeps its dtype, and the velocity receives times in
    it too (float32 when the state is in half precision). Gradients flow if the velocity's result
    requires them; sample under ``torch.no_grad()`` otherwise. An adaptive method's steps are
    chosen for the whole batch, so its samples depend on the batch within the tolerances.

    Raises:
        ValueError: If the grid is none, the method unknown or a tolerance not positive.

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

    def __post_init__(self):
        as_grid(self.grid)
        check_choice(self.method, (*FIXED, *ADAPTIVE), "method")
        check_positive(self.rtol, "rtol")
        check_positive(self.atol, "atol")

    @property
    def times(self) -> Tensor:
        """The grid as a 1-D float64 tensor."""
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
            TypeError: If ``x`` is not a floating-point tensor.
            ValueError: If the velocity's shape is not the state's.
        """
        return self._run(self.times, self.method, velocity, x, cond, return_path, callback)

    def invert(
        self,
        velocity: Velocity,
        x: Tensor,
        cond: Cond = None,
        *,
        correct: bool = False,
        return_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve from the last to the first time of the grid: data to noise.

        Args:
            velocity: As in `solve`.
            x: State ``(B, *)`` at the grid's last time. It is not changed.
            cond: Passed to the velocity.
            correct: Undo Euler's own steps to second order instead of taking Euler steps
                backwards: predict with the carried velocity, evaluate there, step from the old
                point with the new velocity, and carry it (``n + 1`` evaluations). Source: Jiao et
                al., *Uni-Inv*, 2025, as used by Ronai et al., *FlowOpt*, 2025 (arXiv 2510.22010).
            return_path: Keep the states, from the last time to the first.
            callback: As in `solve`.

        Raises:
            ValueError: If ``correct`` is asked of another method than Euler.
        """
        if correct and self.method != "euler":
            raise ValueError(
                f"correct must be False for method {self.method!r}, got True; it undoes Euler steps"
            )
        method = "corrected" if correct else self.method
        return self._run(self.times.flip(0), method, velocity, x, cond, return_path, callback)

    def _run(self, times, method, velocity, x, cond, return_path, callback) -> Solution:
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        bind = getattr(velocity, "bind", None)
        field = _Field(velocity if bind is None else bind(cond, self.times), x, cond)
        path = x.new_empty((len(times), *x.shape)) if return_path else None
        after = _after_step(path, x, callback)
        if method in ADAPTIVE:
            x = _adaptive(field, x, times, after, method=method, rtol=self.rtol, atol=self.atol)
        else:
            x = _fixed(field, x, times.tolist(), after, STEPS[method]())
        return Solution(x, field.nfe, field.rows, path)


def seeded_noise(
    shape: Sequence[int], seeds: Sequence[int] | Tensor, device: torch.device | str | None = None
) -> Tensor:
    """Standard normal noise ``(len(seeds), *shape)``, each sample from its own seed.

    A seed gives the same float32 noise on every device, in every batch and on any rank.

    Args:
        shape: Shape of one sample.
        seeds: One integer per sample.
        device: Where to put the result.

    >>> a, b = seeded_noise((2,), [3, 4]), seeded_noise((2,), [4])
    >>> bool((a[1] == b[0]).all())
    True
    """
    seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    generator = torch.Generator()
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(int(seed)))
    return noise.to(device)


class _Field:
    """The velocity of one solve as a function of a float time, counting its evaluations."""

    __slots__ = ("cond", "in_place", "nfe", "t", "velocity")

    def __init__(self, velocity: Velocity, x: Tensor, cond: Cond):
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.t = torch.empty(len(x), dtype=dtype, device=x.device)
        self.velocity, self.cond, self.nfe, self.in_place = velocity, cond, 0, True

    def at(self, x: Tensor, t: float) -> Tensor:
        v = self.velocity(x, self.t.fill_(t), self.cond)
        if not self.nfe:
            check_same_shape(v, x, ("velocity(x, t, cond)", "x"))
        self.nfe += 1
        if v.requires_grad:  # the graph may hold on to the state and to the times
            self.in_place, self.t = False, torch.empty_like(self.t)
        return v

    def add(self, x: Tensor, v: Tensor, h: float) -> Tensor:
        """``x + h v``, in place unless gradients flow."""
        return x.add_(v, alpha=h) if self.in_place else _stage(x, v, h)

    @property
    def rows(self) -> int:
        return getattr(self.velocity, "rows", self.nfe * len(self.t))

    @property
    def begin_step(self) -> Callable[[float, float], None] | None:
        """Tells the velocity the step, in either direction as its left and its right end."""
        tell = getattr(self.velocity, "begin_step", None)
        return tell and (lambda t, end: tell(min(t, end), max(t, end)))


def _after_step(path: Tensor | None, x: Tensor, callback: Callback | None):
    """What to do with the state after each step, or None if there is nothing to do."""
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


# --- fixed steps -------------------------------------------------------------------------------
#
# A step is a function step(f, x, t, h) -> x from t to t + h. The state is updated in place unless
# gradients flow, and stages are added to it as they come, so that memory does not grow with the
# number of steps and a velocity may reuse its output buffer.


def _fixed(field: _Field, x: Tensor, times: list[float], after, step) -> Tensor:
    x, begin_step = x.clone(), field.begin_step
    for k, (t, end) in enumerate(pairwise(times), 1):
        if begin_step:
            begin_step(t, end)
        x = step(field, x, t, end - t)
        if after:
            x = after(k, end, x)
    return x


def _stage(x: Tensor, v: Tensor, h: float) -> Tensor:
    return x.add(v, alpha=h).to(x.dtype)


def _euler(f, x, t, h):
    v = f.at(x, t)  # f.add written out: beside a tiny network a call is 2 % of a step
    return x.add_(v, alpha=h) if f.in_place else _stage(x, v, h)


def _midpoint(f, x, t, h):
    return f.add(x, f.at(_stage(x, f.at(x, t), h / 2), t + h / 2), h)


def _heun(f, x, t, h):
    v = f.at(x, t)
    predicted = _stage(x, v, h)
    x = f.add(x, v, h / 2)
    return f.add(x, f.at(predicted, t + h), h / 2)


def _rk4(f, x, t, h):
    start, v = x.clone(), f.at(x, t)
    for weight, reach in ((1 / 6, 1 / 2), (1 / 3, 1 / 2), (1 / 3, 1)):
        stage = _stage(start, v, h * reach)
        x = f.add(x, v, h * weight)
        v = f.at(stage, t + h * reach)
    return f.add(x, v, h / 6)


class _AB2:
    """``x + h ((1 + r) v − r v_last)``, ``r = h / (2 h_last)``; one midpoint step to start."""

    def __init__(self):
        self.last: tuple[Tensor, float] | None = None

    def __call__(self, f, x, t, h):
        v = f.at(x, t).clone()
        if self.last is None:
            self.last = v, h
            return f.add(x, f.at(_stage(x, v, h / 2), t + h / 2), h)
        (v_last, h_last), self.last = self.last, (v, h)
        r = h / (2 * h_last)
        return f.add(f.add(x, v, h * (1 + r)), v_last, -h * r)


class _Corrected:
    """Predict with the carried velocity, evaluate there, step from the old point."""

    def __init__(self):
        self.carried: Tensor | None = None

    def __call__(self, f, x, t, h):
        v = f.at(x, t) if self.carried is None else self.carried
        v = f.at(_stage(x, v, h), t + h)
        self.carried = v.clone()
        return f.add(x, v, h)


FIXED = ("euler", "midpoint", "heun", "rk4", "ab2")
STEPS = {  # what makes the step function of one solve
    "euler": lambda: _euler,
    "midpoint": lambda: _midpoint,
    "heun": lambda: _heun,
    "rk4": lambda: _rk4,
    "ab2": _AB2,
    "corrected": _Corrected,
}

# --- adaptive steps ----------------------------------------------------------------------------

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def _adaptive(field: _Field, x: Tensor, times: Tensor, after, **options: Any) -> Tensor:
    from torchdiffeq import odeint

    def f(t: Tensor, x: Tensor) -> Tensor:
        # gradients flow through the sizes of the steps, so the time keeps its graph
        v = field.velocity(x, t.to(field.t).expand_as(field.t), field.cond)
        check_same_shape(v, x, ("velocity(x, t, cond)", "x"))
        field.nfe += 1
        return v

    begin_step = field.begin_step
    if not (after or begin_step):  # nobody minds the times between
        times = times[[0, -1]]
    for k, (t, end) in enumerate(pairwise(times), 1):
        if begin_step:
            begin_step(t.item(), end.item())
        interval = torch.stack([t, end]).to(x.device)
        # a step ends at `end`: left alone, torchdiffeq steps past it and interpolates
        options["options"] = {"step_t": interval[1:]}
        x = cast(Tensor, odeint(f, x, interval, **options))[-1]
        if after:
            x = after(k, end.item(), x)
    return x
