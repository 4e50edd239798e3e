"""FlowOpt: inversion and editing by optimizing the latent of a flow, without any derivative."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowkit.checks import (
    check_at_least,
    check_between,
    check_cond,
    check_positive,
    check_state,
    expand_like,
)
from flowkit.flowopt.anderson import Anderson
from flowkit.flowopt.objectives import LinearOperator, Objective, choose
from flowkit.flowopt.step_size import (
    Flow,
    inner,
    power_bound,
    require_step,
    rms,
)
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.types import Cond
from flowkit.velocity import Velocity

Callback = Callable[[int, Tensor, Tensor], bool | Tensor | None]
STATUS = ("iterations", "converged", "stopped", "diverged")
RUNNING, CONVERGED, STOPPED, DIVERGED = range(4)
GROW, SHRINK = 1.2, 0.5
DIVERGENCE, PLATEAU = 10.0, 1e-3
ROUNDING = 4000  # a difference of 4000 roundings of f determines the bound of its pair to 0.1 %


class Edit(NamedTuple):
    """The result of `FlowOpt`: the samples, their latents, and a record of the iterations.

    In the record, a rejected trial repeats the iterate before it. So does every iteration after a
    sample has ended.
    """

    x: Tensor
    """The edited or regenerated samples ``(B, *)``."""
    z: Tensor
    """Their latents ``(B, *)``, in float32 or wider."""
    trace: Tensor
    """Outputs ``f(z_k)`` of all iterates ``(num_iters + 1, B, *)``, or of those in ``keep``."""
    residuals: Tensor
    """RMSE of all iterates to the source, ``(num_iters + 1, B)``.

    With an operator it is that of ``A x``, with a mask that of the part outside of the mask.
    """
    step_size: Tensor
    """The last step size of every sample, ``(B,)``."""
    nfe: int
    """Number of velocity evaluations in total."""
    status: tuple[str, ...]
    """The end of every sample: ``"converged"``, ``"stopped"``, ``"diverged"`` or ``"iterations"``.

    A sample is stopped by ``distance``, ``patience`` or the callback, and diverged if its residual
    exceeds 10 times the first one or is not finite. Otherwise its iterations are used up.
    """


@dataclass(frozen=True, eq=False)
class FlowOpt:
    """Minimize ``½‖f(z; c) − y‖²`` over the latent ``z`` by ``z ← z − η (f(z; c) − y)``.

    ``f`` is the whole solve from the first time of the sampler's grid, and ``y`` is the given data.
    The first latent is ``y`` inverted under the source condition (``ODESampler.invert``, corrected
    for Euler). If ``c`` is the source condition, the optimization is an *inversion*. If ``c`` is
    another condition, the target, it is an *edit*. The first iterate of an edit follows the target
    freely. Every further iterate comes nearer to the source, and full convergence reproduces the
    source. An edit is thus stronger with fewer iterations, and weaker if the grid leaves out the
    noisiest steps. The result of a sample does not depend on its batch.

    Source: Ronai, Kulikov, Michaeli, *FlowOpt: Fast Optimization Through Whole Flow Processes for
    Training-Free Editing*, 2025 (arXiv 2510.22010), algorithms 1 and 2. The paper has no
    backtracking, measured step, mask, operator or Anderson acceleration (Walker & Ni, *Anderson
    Acceleration for Fixed-Point Iterations*, 2011).

    Args:
        sampler: Solver and grid. A grid of a part of [0, 1] leaves out the noisiest steps.
        step_size: ``η > 0``, or ``"auto"``: half of the measured bound (see `step_bound`). The
            measurement costs four more solves.
        num_iters: Number ``N ≥ 0`` of updates. With ``n`` Euler steps per solve there are
            ``(n + 1) + (N + 1) n`` velocity evaluations.
        backtrack: If True, a sample accepts a trial only if its residual does not grow. An accepted
            trial multiplies ``η`` by 1.2, a rejected one by 0.5. A rejected trial counts as an
            iteration. If False, every trial is accepted, and steps of ``"auto"`` are lowered
            to half of the bound of consecutive iterates if they exceed it.
        anderson: Number of differences of iterates for Anderson acceleration; 0 turns it off. Each
            difference holds two states in memory.
        tolerance: Residual, at least 0, at which a sample ends as converged.
        distance: RMSE to the source, at least 0, at which the edit of a sample ends; None for no
            such rule. It counts all elements, also those in the mask.
        patience: Number of iterations, at least 1, without an improvement by 0.1 % after which a
            sample ends; None for no such rule.
        keep: Numbers, in [0, N], of the iterates that ``trace`` holds; None for all.

    Raises:
        TypeError: If a number is a string or None.
        ValueError: If a number is out of range, or ``step_size`` is a string other than ``"auto"``.

    >>> from flowkit.exact import GaussianFlow
    >>> invert = FlowOpt(ODESampler(10), step_size=1.0, num_iters=20)
    >>> edit = invert(GaussianFlow(0.0, 0.5), torch.tensor([[0.3, -0.7]]))
    >>> bool(edit.residuals[-1] < 1e-6), edit.nfe
    (True, 221)
    """

    sampler: ODESampler
    step_size: float | Literal["auto"] = "auto"
    num_iters: int = 8
    backtrack: bool = True
    anderson: int = 0
    tolerance: float = 0.0
    distance: float | None = None
    patience: int | None = None
    keep: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.step_size != "auto":
            if isinstance(self.step_size, str):
                raise ValueError(f"step_size must be a number or 'auto', got {self.step_size!r}")
            check_positive(self.step_size, "step_size")
        for name, least in (("num_iters", 0), ("anderson", 0), ("tolerance", 0)):
            check_at_least(getattr(self, name), least, name)
        if self.patience is not None:
            check_at_least(self.patience, 1, "patience")
        if self.distance is not None:
            check_at_least(self.distance, 0, "distance")
        for k in self.keep or ():
            check_between(k, 0, self.num_iters, "keep")

    @torch.no_grad()
    def __call__(
        self,
        velocity: Velocity,
        x1: Tensor,
        source: Cond = None,
        target: Cond = None,
        *,
        mask: Tensor | None = None,
        operator: LinearOperator | None = None,
        callback: Callback | None = None,
    ) -> Edit:
        """Edit ``x1`` towards the condition ``target``, or invert ``x1``.

        Args:
            velocity: The velocity, guided or not. It is never differentiated.
            x1: Data ``(B, *)`` at the last time of the grid. The network computes in its type.
            source: The condition under which ``x1`` is inverted.
            target: The condition of the edit; None stands for ``source``, an inversion.
            mask: The part of a sample that may change: broadcastable to ``x1``, within [0, 1].
                Where it is 1 the edit is free. Elsewhere the objective counts an element with the
                weight ``1 − mask``.
            operator: ``A`` of the objective ``½‖A f(z) − A x1‖²``, whose update is
                ``z ← z − η Aᵀ(A f(z) − A x1)``. ``x1`` is any sample with the measured ``A x1``.
            callback: Called as ``callback(k, x, z)`` with every iterate, from ``k = 0``, to look
                at images or at `flowkit.metrics.gaussianity` of the latents. It must not change the
                tensors. If it returns True, all samples end; booleans ``(B,)`` end some of them.

        Returns:
            Samples, latents, and the record of the iterations.

        Raises:
            TypeError: If ``x1`` is not a floating-point tensor, a condition or the mask is of
                another kind.
            ValueError: If ``x1`` is empty or not finite, the mask or the operator does not fit,
                both are given, or ``"auto"`` finds no step size that converges for some sample.

        Warns:
            UserWarning: If results of the velocity are not finite. Also, once, if without
                backtracking a residual grows because the given step is above the bound of
                consecutive iterates.
        """
        check_state(x1, "x1")
        check_cond(source, "source")
        check_cond(target, "target")
        flow = Flow(self.sampler, velocity, x1.dtype)
        y = x1.to(flow.dtype)
        objective = choose(y, mask, operator)
        cond = source if target is None else target

        def evaluate(z: Tensor) -> _Iterate:
            x = flow(z, cond)
            return _Iterate(z, x, *objective(x))

        now = evaluate(flow.invert(y, source))
        run = _Run(self, x1, y, now, flow.eps, callback)
        run.record(0, now)
        if self.step_size == "auto" and self.num_iters and run.any_running:
            run.step = _measured_step(evaluate, objective, now, run.running, flow.eps)
        history = Anderson(self.anderson)

        def advance(now: _Iterate) -> _Iterate:
            trial = evaluate(now.z - history.update(now.gradient, run.step))
            chosen, accepted = run.judge(now, trial)
            if history.memory:
                history.remember(trial.z - now.z, trial.gradient - now.gradient, accepted)
            return chosen

        for k in range(1, self.num_iters + 1):
            if run.any_running:
                now = advance(now)
            run.record(k, now)
        end = run.result(now)
        status = tuple(STATUS[code] for code in run.status.tolist())
        x = end.x.to(x1.dtype)
        return Edit(x, end.z, run.trace, torch.stack(run.residuals), run.step, flow.nfe, status)


class _Iterate(NamedTuple):
    """Latents and outputs ``(B, *)`` of one iteration, with gradients and residuals."""

    z: Tensor
    x: Tensor
    gradient: Tensor
    """The update ``(B, *)`` of step size 1, which is subtracted from ``z``."""
    residual: Tensor
    """RMSE ``(B,)`` of ``x`` to the source."""


def _select(where: Tensor, a: _Iterate, b: _Iterate) -> _Iterate:
    """Return ``a`` for samples where ``where (B,)`` is True, and ``b`` for the others."""
    return _Iterate(*(torch.where(expand_like(where, u), u, v) for u, v in zip(a, b, strict=True)))


class _Run:
    """The step size, state and record of every sample in one run.

    With a small network the time of every tensor operation counts. Most iterations improve every
    sample. One comparison recognizes such an iteration, and it needs no other operation.

    Args:
        settings: Options of the run.
        x1: The source ``(B, *)`` in the network's type.
        y: The source in the type of the latents.
        first: The iterate of the inverted source.
        eps: Rounding of the network.
        callback: See `FlowOpt`.
    """

    def __init__(
        self,
        settings: FlowOpt,
        x1: Tensor,
        y: Tensor,
        first: _Iterate,
        eps: float,
        callback: Callback | None,
    ) -> None:
        self.settings, self.y, self.callback = settings, y, callback
        self.auto, self.warned = settings.step_size == "auto", False
        self.step = y.new_full((len(y),), torch.nan if self.auto else float(settings.step_size))
        self.status = torch.zeros(len(y), dtype=torch.long, device=y.device)
        self.running, self.any_running = self.status == RUNNING, True
        self.best, self.steady = first, False
        self.tried = self.reference = first.residual
        self.stale = torch.zeros_like(self.status)
        # Where the start is exact, residuals are rounding errors, which may grow tenfold.
        self.eps = eps
        self.limit = DIVERGENCE * first.residual.clamp_min(self.eps**0.5)
        count = settings.num_iters + 1
        self.rows = sorted(set(range(count) if settings.keep is None else settings.keep))
        self.trace = x1.new_empty((len(self.rows), *x1.shape))
        self.residuals: list[Tensor] = []

    def judge(self, now: _Iterate, trial: _Iterate) -> tuple[_Iterate, Tensor]:
        """Choose the next iterates, and adapt the step sizes.

        Returns:
            The chosen iterates, and booleans ``(B,)``: True for a sample that takes its trial.
        """
        self.tried = trial.residual
        better = self.running & (trial.residual <= self.best.residual)
        self.steady = bool(better.all())
        self.best = trial if self.steady else _select(better, trial, self.best)
        if self.settings.backtrack:
            if self.steady:
                self.step = GROW * self.step
            else:
                shrunk = torch.where(self.running, SHRINK * self.step, self.step)
                self.step = torch.where(better, GROW * self.step, shrunk)
            return self.best, better
        if self.auto or not self.steady:
            self._compare_bound(now, trial)
        return trial if self.steady else _select(self.running, trial, now), self.running

    def _compare_bound(self, now: _Iterate, trial: _Iterate) -> None:
        """Compare the steps with the bound of the last two iterates.

        An automatic step above its bound is lowered. A given step above its bound is warned of.
        """
        if self.warned:
            return
        dg = trial.gradient - now.gradient
        product, squared = inner(trial.z - now.z, dg), inner(dg, dg)
        # An automatic step is half of its bound. A given step may reach the whole bound.
        exceeds = self.step * squared > (1 if self.auto else 2.01) * product
        exceeds &= self.running & (squared > (ROUNDING * self.eps) ** 2 * inner(trial.x, trial.x))
        if not bool(exceeds.any()):
            return
        bound = 2 * product / squared
        if self.auto:
            self.step = torch.where(exceeds & (bound > 0), bound / 2, self.step)
        else:
            self.warned = True
            warnings.warn(
                f"step_size must lie below {bound[exceeds].min().item():.4g} for consecutive "
                f"iterates to come closer, got {self.settings.step_size}; use backtrack=True or "
                "step_size='auto'",
                stacklevel=6,
            )

    def record(self, k: int, now: _Iterate) -> None:
        """Record iterate ``k``, call the callback, and end the samples that meet a rule."""
        if k in self.rows:
            self.trace[self.rows.index(k)] = now.x
        self.residuals.append(now.residual)
        if not self.any_running:
            return
        settings = self.settings
        if not self.steady:
            self._end(DIVERGED, ~(now.residual <= self.limit))
        self._end(CONVERGED, now.residual <= settings.tolerance)
        if settings.distance is not None:
            self._end(STOPPED, rms(now.x - self.y) <= settings.distance)
        if settings.patience is not None:
            improved = now.residual < (1 - PLATEAU) * self.reference
            self.reference = torch.where(improved, now.residual, self.reference)
            self.stale = torch.where(improved, 0, self.stale + (k > 0))
            self._end(STOPPED, self.stale >= settings.patience)
        if self.callback is not None:
            stops = self.callback(k, now.x.to(self.trace.dtype), now.z)
            self._end(STOPPED, torch.as_tensor(bool(stops) if stops is None else stops))

    def _end(self, status: int, where: Tensor) -> None:
        """Give running samples at ``where``, ``(B,)`` or a scalar, their final status."""
        if bool(where.any()):
            where = self.running & where.to(self.status.device)
            self.status = torch.where(where, status, self.status)
            self.running = self.status == RUNNING
            self.any_running = bool(self.running.any())

    def result(self, now: _Iterate) -> _Iterate:
        """Return the best iterate of a diverged sample, and the last iterate of any other."""
        if self.steady:
            return now
        broken = ~self.tried.isfinite()
        self._end(DIVERGED, broken)
        diverged = self.status == DIVERGED
        if rows := (broken & diverged).nonzero().flatten().tolist():
            warnings.warn(
                f"velocity must be finite, got NaN or infinite results for samples {rows[:10]}; "
                "the best iterate of each is returned",
                stacklevel=4,
            )
        return _select(diverged, self.best, now)


def _measured_step(
    evaluate: Callable[[Tensor], _Iterate],
    objective: Objective,
    now: _Iterate,
    running: Tensor,
    eps: float,
) -> Tensor:
    """Measure half of the bound ``(B,)`` around the first iterate: ``1 / L`` for symmetric flows.

    Raises:
        ValueError: If no step size converges for a sample that is running.
    """
    # All samples have the same direction, so that no result depends on the batch.
    noise = seeded_noise(now.z.shape[1:], [0], now.z.device).to(now.z).expand_as(now.z)
    bound, cosine = power_bound(
        lambda z: evaluate(z).gradient, now.z, now.gradient, objective.normal(noise), 4, eps
    )
    require_step(cosine.where(running, 1), now.z, eps)
    return bound / 2
