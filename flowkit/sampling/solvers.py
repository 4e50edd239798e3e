"""The loop of fixed steps of `flowkit.sampling.ODESampler`, and how it calls a velocity."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, check_result

CLOSE = 1e-6  # times that differ by less are one time: grids may come in float32

After = Callable[[int, float, Tensor], Tensor]
"""``after(step, t, x) -> x``, called at each time of the grid; the result replaces the state."""


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 for a device that has no float64 (such as Apple's MPS)."""
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype
    except (TypeError, RuntimeError):
        return torch.float32


class Field:
    """The velocity of one solve as a function of a float time, counting its evaluations.

    Args:
        bound: The velocity.
        x: The solver's state, float32 or wider.
        cond: The condition.
        dtype: Type of the states that the velocity receives.
    """

    __slots__ = ("bound", "cond", "in_place", "nfe", "t", "velocity")

    def __init__(self, bound: BoundVelocity, x: Tensor, cond: Cond, dtype: torch.dtype) -> None:
        self.t = torch.empty(len(x), dtype=x.dtype, device=x.device)
        # Called without the bound velocity around it: that call is a tenth of a tiny step.
        self.bound, self.velocity = bound, bound.velocity
        if dtype != x.dtype:
            velocity = bound.velocity
            self.velocity = lambda x, t, cond=None: velocity(x.to(dtype), t, cond)
        self.cond, self.nfe, self.in_place = cond, 0, True

    def at(self, x: Tensor, t: float) -> Tensor:
        v = self.velocity(x, self.t.fill_(t), self.cond)
        if not self.nfe:
            check_result(v, x)
        self.nfe += 1
        if v.requires_grad:
            self.keep()
        return v

    def keep(self) -> None:
        """Leave the state and the times alone from now on: a graph may hold on to them."""
        self.in_place, self.t = False, torch.empty_like(self.t)

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
"""``step(field, x, t, end) -> x`` at time ``end``, before or after ``t``."""


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


# --- what ends an adaptive solve ----------------------------------------------------------------


def check_velocity(v: Tensor, t: float) -> None:
    """Require a finite velocity ``v`` at the time ``t``."""
    if not bool(torch.isfinite(v).all()):
        found = "NaN" if bool(v.isnan().any()) else "infinity"
        raise ValueError(f"velocity must be finite, got {found} at t={t:.6g}")


def refuse_tolerances(t: float, dtype: torch.dtype, rtol: float, atol: float) -> NoReturn:
    """Raise the error of steps that become too small."""
    raise ValueError(
        f"rtol and atol must be within reach of a velocity in {str(dtype)[6:]}, got {rtol} and "
        f"{atol}; steps become too small at t={t:.6g}"
    )


# --- fixed steps -------------------------------------------------------------------------------
#
# A step is a function step(f, x, t, end) -> x from t to end. The state is updated in place unless
# gradients flow, and stages are added to it as they come, so that memory does not grow with the
# number of steps and a velocity may reuse its output buffer. A stage at the end of a step takes the
# time `end` itself: t + (end - t) may round to a time beyond it.


def fixed(field: Field, x: Tensor, times: list[float], after: After | None, step: Step) -> Tensor:
    """Carry ``x (B, *)`` through all times, one step between two."""
    x, begin_step = x.clone(), field.begin_step
    if not (begin_step or after):  # nothing to look up in the steps
        for t, end in pairwise(times):
            x = step(field, x, t, end)
        return x
    for k, (t, end) in enumerate(pairwise(times), 1):
        if begin_step:
            begin_step(t, end)
        x = step(field, x, t, end)
        if after:
            x = after(k, end, x)
    return x


def _stage(x: Tensor, v: Tensor, h: float) -> Tensor:
    return x.add(v, alpha=h).to(x.dtype)


def _euler(f: Field, x: Tensor, t: float, end: float) -> Tensor:
    # f.at and f.add written out: beside a tiny network a call is 2 % to 4 % of a step.
    if not f.nfe:
        v = f.at(x, t)
    else:
        v = f.velocity(x, f.t.fill_(t), f.cond)
        f.nfe += 1
        if v.requires_grad:
            f.keep()
    return x.add_(v, alpha=end - t) if f.in_place else _stage(x, v, end - t)


def _midpoint(f: Field, x: Tensor, t: float, end: float) -> Tensor:
    h = end - t
    return f.add(x, f.at(_stage(x, f.at(x, t), h / 2), t + h / 2), h)


def _heun(f: Field, x: Tensor, t: float, end: float) -> Tensor:
    v, h = f.at(x, t), end - t
    predicted = _stage(x, v, h)
    x = f.add(x, v, h / 2)
    return f.add(x, f.at(predicted, end), h / 2)


def _rk4(f: Field, x: Tensor, t: float, end: float) -> Tensor:
    start, v, h = x.clone(), f.at(x, t), end - t
    middle = t + h / 2
    for weight, reach, time in ((1 / 6, 1 / 2, middle), (1 / 3, 1 / 2, middle), (1 / 3, 1, end)):
        stage = _stage(start, v, h * reach)
        x = f.add(x, v, h * weight)
        v = f.at(stage, time)
    return f.add(x, v, h / 6)


class _AB2:
    """``x + h ((1 + r) v − r v_last)``, ``r = h / (2 h_last)``; one midpoint step to start."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, float] | None = None

    def __call__(self, f: Field, x: Tensor, t: float, end: float) -> Tensor:
        v, h = f.at(x, t).clone(), end - t
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

    def __call__(self, f: Field, x: Tensor, t: float, end: float) -> Tensor:
        v, h = f.at(x, t) if self.carried is None else self.carried, end - t
        for _ in range(self.corrections):
            v = f.at(_stage(x, v, h), end)
        self.carried = v  # a buffer of the velocity perhaps, used before the next evaluation
        return f.add(x, v, h)


ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2}
FIXED = tuple(ORDER)
STEPS: dict[str, Callable[[], Step]] = {  # makers of the step function of one solve
    "euler": lambda: _euler,
    "midpoint": lambda: _midpoint,
    "heun": lambda: _heun,
    "rk4": lambda: _rk4,
    "ab2": _AB2,
}
