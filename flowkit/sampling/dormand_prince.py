"""The adaptive method of Dormand and Prince: order 5, with an error estimate by order 4.

Sources: Dormand & Prince, *A family of embedded Runge-Kutta formulae*, 1980, table 2. First step
and control of steps: Hairer, Nørsett & Wanner, *Solving Ordinary Differential Equations I*, 1993,
section II.4, with the constants of torchdiffeq, so that both take the same steps.
"""

import math

import torch
from torch import Tensor

from flowkit.sampling.solvers import Field, check_velocity, refuse_tolerances

ORDER = 5
NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = len(NODES)
WEIGHTS = (  # of the velocities before, in the states of stages 2 to 7, and in the error
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    # two thirds of the difference of orders 5 and 4 in the paper, as torchdiffeq takes it
    (71 / 86400, 0, -142 / 50085, 71 / 2880, -5751 / 169600, 44 / 1575, -1 / 60),
)
SAFETY, SHORTEN, LENGTHEN = 0.9, 0.2, 10.0
SMALL = 1e-6  # a first step where the sizes of state and velocity say nothing


class DormandPrince:
    """Carries a state over intervals, in steps that the tolerances choose for the whole batch.

    A step is taken if the root mean square over all numbers of the batch of
    ``error / (atol + rtol max(|x|, |x_new|))`` is at most 1. The velocities of a step lie in one
    buffer, so that a stage is one product of a matrix and a vector. Where gradients flow, nothing
    is written twice; they do not flow through the sizes of the steps.

    Args:
        field: The velocity of the solve.
        x: A state ``(B, *)``; all have its shape and type.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """

    def __init__(self, field: Field, x: Tensor, rtol: float, atol: float) -> None:
        self.field, self.rtol, self.atol, self.graph = field, rtol, atol, False
        buffers = x.new_empty((STAGES + 4, *x.shape))
        *self.stages, self.next, self.error, self.size, self.other = buffers
        self.times = [0.0] * STAGES
        self.weights = x.new_tensor([weight for row in WEIGHTS for weight in row])
        self.scaled = torch.empty_like(self.weights)  # times the step
        columns = buffers[:STAGES].view(STAGES, -1).t()
        self.products = [
            (columns.narrow(1, 0, len(row)), row)
            for row in self.scaled.split([len(row) for row in WEIGHTS])
        ]

    def __call__(self, x: Tensor, t: float, end: float) -> Tensor:
        """Carry ``x`` from ``t`` to ``end``, before or after it, without a look beyond either."""
        x = x.clone(memory_format=torch.contiguous_format)
        self.graph |= x.requires_grad and torch.is_grad_enabled()
        ends = torch.tensor([end, t], dtype=self.field.t.dtype)
        before_end = torch.nextafter(*ends).item()  # at the end itself a velocity may jump
        self._evaluate(0, x, t)
        size = self._first_size(x, t, end, before_end)
        while t != end:
            left = end - t
            is_last = size >= abs(left)
            h = left if is_last else math.copysign(size, left)
            if t + h == t:
                refuse_tolerances(t, self.velocity_dtype, self.rtol, self.atol)
            new = self._step(x, t, h, before_end if is_last else t + h)
            ratio = self._error(x, new, h)
            if ratio <= 1:
                t = end if is_last else t + h
                x, self.next = new, x
                self._store(0, self.stages[-1])  # the first velocity of the next step
            size = abs(h) * _factor(ratio)
        return x if self.graph else x.clone()  # not a part of all buffers

    def _first_size(self, x: Tensor, t: float, end: float, before_end: float) -> float:
        """The size of the first step, by the velocity and its change along a very small one."""
        v = self.stages[0].detach()
        scale = x.detach().abs().mul_(self.rtol).add_(self.atol)
        d0, d1 = _rms(x.detach() / scale), _rms(v / scale)
        if not math.isfinite(d1):
            self._require_finite(0)
        size = 0.01 * d0 / d1 if min(d0, d1) >= 1e-5 else SMALL
        is_whole = size >= abs(end - t)
        h = end - t if is_whole else math.copysign(size, end - t)
        self._evaluate(1, x.add(self.stages[0], alpha=h), before_end if is_whole else t + h)
        change = _rms((self.stages[1].detach() - v).div_(scale))
        if not math.isfinite(change):
            self._require_finite(1)
        if h == 0:  # the velocity is too large for the tolerances
            return 0.0
        steepest = max(d1, change / abs(h))
        tried = (0.01 / steepest) ** (1 / ORDER) if steepest > 1e-15 else max(SMALL, abs(h) / 1000)
        return min(100 * abs(h), tried)

    def _step(self, x: Tensor, t: float, h: float, end: float) -> Tensor:
        """Evaluate the stages 2 to 7 of a step; the state of the last is the new state."""
        torch.mul(self.weights, h, out=self.scaled)
        new, flat, out = self.next, x.view(-1), self.next.view(-1)
        for stage in range(1, STAGES):
            if self.graph:
                new = self._sum(x, stage - 1, h)
            else:
                torch.addmv(flat, *self.products[stage - 1], out=out)
            self._evaluate(stage, new, end if NODES[stage] == 1 else t + NODES[stage] * h)
        return new

    def _sum(self, x: Tensor, row: int, h: float) -> Tensor:
        """``x + h Σ_j weight_j v_j`` as a new tensor."""
        for weight, v in zip(WEIGHTS[row], self.stages, strict=False):
            x = x.add(v, alpha=h * weight)
        return x

    def _error(self, x: Tensor, new: Tensor, h: float) -> float:
        """The error of the step in units of the tolerances."""
        error, size = self.error, self.size
        if self.graph:
            x, new = x.detach(), new.detach()
            error = self._sum(torch.zeros_like(x), -1, h).detach()
        else:
            torch.mv(*self.products[-1], out=error.view(-1))
        torch.maximum(torch.abs(x, out=size), torch.abs(new, out=self.other), out=size)
        ratio = _rms(error.div_(size.mul_(self.rtol).add_(self.atol)))
        if not math.isnan(ratio):
            return ratio
        for stage in range(STAGES):
            self._require_finite(stage)
        return math.inf  # the new state is too large for its type

    def _evaluate(self, stage: int, x: Tensor, t: float) -> None:
        v = self.field.at(x, t)
        self.times[stage], self.velocity_dtype = t, v.dtype
        if v.requires_grad:
            self.graph = True
        self._store(stage, v)

    def _store(self, stage: int, v: Tensor) -> None:
        """Keep a copy of a velocity: the next call may write over it."""
        if self.graph:
            self.stages[stage] = v.to(self.weights.dtype, copy=True)
        else:
            self.stages[stage].copy_(v)

    def _require_finite(self, stage: int) -> None:
        check_velocity(self.stages[stage], self.times[stage])


def _rms(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item() / math.sqrt(x.numel())


def _factor(ratio: float) -> float:
    """The next step in units of this one, whose error is ``ratio`` times what it may be."""
    if ratio == 0:
        return LENGTHEN
    return min(LENGTHEN, max(SAFETY / ratio ** (1 / ORDER), 1.0 if ratio < 1 else SHORTEN))
