"""Adaptive methods: Dormand and Prince's of our own, others by torchdiffeq."""

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from flowkit.sampling.dormand_prince import DormandPrince
from flowkit.sampling.solvers import (
    After,
    Field,
    check_velocity,
    refuse_tolerances,
    widest_float,
)
from flowkit.velocity import check_result

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


def adaptive(
    field: Field,
    x: Tensor,
    times: Tensor,
    after: After | None,
    method: str,
    rtol: float,
    atol: float,
) -> Tensor:
    """Carry ``x (B, *)`` through the times in steps that the tolerances choose.

    Every step ends within the interval between two of the times, and so does every evaluation.
    """
    begin_step = field.begin_step
    if method == "dopri5":
        carry: Callable[[Tensor, float, float], Tensor] = DormandPrince(field, x, rtol, atol)
    else:
        carry = _Torchdiffeq(field, method, rtol, atol)
    for k, (t, end) in enumerate(pairwise(times.tolist()), 1):
        if begin_step:
            begin_step(t, end)
        x = carry(x, t, end)
        if after:
            x = after(k, end, x)
    return x


class _Torchdiffeq:
    """Carries a state over intervals by a method of torchdiffeq."""

    def __init__(self, field: Field, method: str, rtol: float, atol: float) -> None:
        self.field, self.method, self.rtol, self.atol = field, method, rtol, atol

    def __call__(self, x: Tensor, t: float, end: float) -> Tensor:
        from torchdiffeq import odeint

        dtype = widest_float(x.device)
        interval = torch.tensor([t, end], dtype=dtype, device=x.device)
        velocity = _Between(self.field, t, end)
        # a step ends at `end`: left alone, torchdiffeq steps past it and interpolates
        options = {"step_t": interval[1:], "dtype": dtype}
        given = {"method": self.method, "rtol": self.rtol, "atol": self.atol, "options": options}
        try:
            return cast(Tensor, odeint(velocity, x, interval, **given))[-1]
        except AssertionError:  # torchdiffeq's only way to say that a step fails
            if velocity.last is None:  # an assertion of the velocity itself
                raise
            time, v = velocity.last
            check_velocity(v, time.item())
            refuse_tolerances(time.item(), v.dtype, self.rtol, self.atol)


class _Between:
    """The velocity as torchdiffeq calls it, at times between the ends of a solve alone."""

    def __init__(self, field: Field, t: float, end: float) -> None:
        self.field, self.low, self.high = field, min(t, end), max(t, end)
        self.before = field.nfe
        self.last: tuple[Tensor, Tensor] | None = None  # time and result; None during a call

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        field, self.last = self.field, None
        # To choose its first step, torchdiffeq moves the state by a hundredth along the velocity,
        # whatever the time that takes; and its times are rounded. Gradients flow through the sizes
        # of the steps, so the time keeps its graph.
        t = t.to(field.t).clamp(self.low, self.high)
        v = field.velocity(x, t.expand_as(field.t), field.cond)
        check_result(v, x)
        if field.nfe == self.before:  # the size of the first step depends on it
            check_velocity(v, t.item())
        field.nfe += 1
        self.last = t, v
        return v.to(x.dtype, copy=True)  # torchdiffeq keeps it; the velocity may reuse it
