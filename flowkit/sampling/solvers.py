"""The loops of `flowkit.sampling.ODESampler`: fixed steps of our own, torchdiffeq's adaptive."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.checks import check_same_shape
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity

CLOSE = 1e-6  # times that differ by less are one time: grids may come in float32

After = Callable[[int, float, Tensor], Tensor]
"""``after(step, t, x) -> x``, called at each time of the grid; the result replaces the state."""


class Field:
    """The velocity of one solve as a function of a float time, counting its evaluations."""

    __slots__ = ("bound", "cond", "in_place", "nfe", "t", "velocity")

    def __init__(self, bound: BoundVelocity, x: Tensor, cond: Cond) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        self.t = torch.empty(len(x), dtype=dtype, device=x.device)
        # Called without the bound velocity around it: that call is a tenth of a tiny step.
        self.bound, self.velocity = bound, bound.velocity
        self.cond, self.nfe, self.in_place = cond, 0, True

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
    def begin_step(self) -> Callable[[float, float], None] | None:
        """Tell the velocity a step, in either direction as its left and its right end."""
        if not self.bound.follows_steps:
            return None
        tell = self.bound.begin_step
        return lambda t, end: tell(min(t, end), max(t, end))


Step = Callable[[Field, Tensor, float, float], Tensor]
"""``step(field, x, t, h) -> x`` at time ``t + h``."""


def with_edges(
    times: Tensor, edges: Sequence[float], after: After | None
) -> tuple[Tensor, After | None]:
    """Add a velocity's edges to the times of the solve; ``after`` is not called at them."""
    if not edges:
        return times, after
    low, high = sorted((float(times[0]), float(times[-1])))
    inside = [edge for edge in edges if low < edge < high]
    missing = [edge for edge in inside if (times - edge).abs().min() > CLOSE]
    if not missing:
        return times, after
    both = torch.cat([times, times.new_tensor(missing)])
    stops, origin = both.sort(descending=bool(times[0] > times[-1]))
    steps = {k: step for k, step in enumerate(origin.tolist()) if step < len(times)}

    if after is None:
        return stops, None

    def seen(k: int, t: float, x: Tensor) -> Tensor:
        return after(steps[k], t, x) if k in steps else x

    return stops, seen


# --- fixed steps -------------------------------------------------------------------------------
#
# A step is a function step(f, x, t, h) -> x from t to t + h. The state is updated in place unless
# gradients flow, and stages are added to it as they come, so that memory does not grow with the
# number of steps and a velocity may reuse its output buffer.


def fixed(field: Field, x: Tensor, times: list[float], after: After | None, step: Step) -> Tensor:
    """Carry ``x (B, *)`` through all times, one step between two."""
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


def _euler(f: Field, x: Tensor, t: float, h: float) -> Tensor:
    v = f.at(x, t)  # f.add written out: beside a tiny network a call is 2 % of a step
    return x.add_(v, alpha=h) if f.in_place else _stage(x, v, h)


def _midpoint(f: Field, x: Tensor, t: float, h: float) -> Tensor:
    return f.add(x, f.at(_stage(x, f.at(x, t), h / 2), t + h / 2), h)


def _heun(f: Field, x: Tensor, t: float, h: float) -> Tensor:
    v = f.at(x, t)
    predicted = _stage(x, v, h)
    x = f.add(x, v, h / 2)
    return f.add(x, f.at(predicted, t + h), h / 2)


def _rk4(f: Field, x: Tensor, t: float, h: float) -> Tensor:
    start, v = x.clone(), f.at(x, t)
    for weight, reach in ((1 / 6, 1 / 2), (1 / 3, 1 / 2), (1 / 3, 1)):
        stage = _stage(start, v, h * reach)
        x = f.add(x, v, h * weight)
        v = f.at(stage, t + h * reach)
    return f.add(x, v, h / 6)


class _AB2:
    """``x + h ((1 + r) v − r v_last)``, ``r = h / (2 h_last)``; one midpoint step to start."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, float] | None = None

    def __call__(self, f: Field, x: Tensor, t: float, h: float) -> Tensor:
        v = f.at(x, t).clone()
        if self.last is None:
            self.last = v, h
            return f.add(x, f.at(_stage(x, v, h / 2), t + h / 2), h)
        (v_last, h_last), self.last = self.last, (v, h)
        r = h / (2 * h_last)
        return f.add(f.add(x, v, h * (1 + r)), v_last, -h * r)


class Corrected:
    """Euler's step with a corrected velocity: predict, evaluate there, step from the start."""

    def __init__(self, corrections: int) -> None:
        self.corrections = corrections
        self.carried: Tensor | None = None

    def __call__(self, f: Field, x: Tensor, t: float, h: float) -> Tensor:
        v = f.at(x, t) if self.carried is None else self.carried
        for _ in range(self.corrections):
            v = f.at(_stage(x, v, h), t + h)
        self.carried = v  # a buffer of the velocity perhaps, used before the next evaluation
        return f.add(x, v, h)


FIXED = ("euler", "midpoint", "heun", "rk4", "ab2")
STEPS: dict[str, Callable[[], Step]] = {  # makers of the step function of one solve
    "euler": lambda: _euler,
    "midpoint": lambda: _midpoint,
    "heun": lambda: _heun,
    "rk4": lambda: _rk4,
    "ab2": _AB2,
}

# --- adaptive steps ----------------------------------------------------------------------------

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def adaptive(field: Field, x: Tensor, times: Tensor, after: After | None, **options: Any) -> Tensor:
    """Carry ``x (B, *)`` through the times by torchdiffeq, whose tolerances choose the steps."""
    from torchdiffeq import odeint

    def f(t: Tensor, x: Tensor) -> Tensor:
        # gradients flow through the sizes of the steps, so the time keeps its graph
        v = field.velocity(x, t.to(field.t).expand_as(field.t), field.cond)
        check_same_shape(v, x, ("velocity(x, t, cond)", "x"))
        field.nfe += 1
        return v

    begin_step = field.begin_step
    if not (after or begin_step):  # the times between have no use
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
