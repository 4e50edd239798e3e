"""FlowOpt: invert and edit by optimizing the start of a flow, without any derivative."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowkit.checks import (
    check_at_least,
    check_between,
    check_finite,
    check_positive,
    expand_like,
)
from flowkit.flowopt.anderson import Anderson
from flowkit.flowopt.objectives import LinearOperator, choose
from flowkit.flowopt.step_size import (
    Flow,
    StepBound,
    inner,
    power_bound,
    require_step,
    rms,
    step_bound,
)
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.types import Cond
from flowkit.velocity import Velocity

__all__ = ["Edit", "FlowOpt", "LinearOperator", "StepBound", "step_bound"]

Callback = Callable[[int, Tensor, Tensor], bool | Tensor | None]
STATUS = ("iterations", "converged", "stopped", "diverged")
RUNNING, CONVERGED, STOPPED, DIVERGED = range(4)
GROW, SHRINK = 1.2, 0.5
DIVERGENCE, PLATEAU = 10.0, 1e-3
ROUNDING = 4000  # a difference of so many times the rounding of f gives its bound to 0.1 %


class Edit(NamedTuple):
    """What `FlowOpt` returns.

    ``x``: the result ``(B, *)``. ``z``: its latent, in float32 at least. ``trace``: the outputs
    ``f(z_k)`` of all iterates ``(num_iters + 1, B, *)``, or of those asked for. ``residuals``:
    ``(num_iters + 1, B)``, their RMSE to the source (of ``A x``, with an operator; outside of the
    mask, with one). A rejected trial repeats the iterate before it, as does every iterate
    after a sample has ended. ``step_size``: each sample's last, ``(B,)``. ``nfe``: velocity
    evaluations of everything, counted. ``status``: per sample ``"converged"``, ``"stopped"`` (by
    distance, patience or callback), ``"diverged"`` or, when none of these, ``"iterations"``.
    """

    x: Tensor
    z: Tensor
    trace: Tensor
    residuals: Tensor
    step_size: Tensor
    nfe: int
    status: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class FlowOpt:
    """Minimize ``½‖f(z; c) − y‖²`` over the latent ``z`` by ``z ← z − η (f(z; c) − y)``.

    ``f`` is the whole solve from the first time of the sampler's grid, ``y`` the given data. The
    start is ``y`` inverted under the source condition (``ODESampler.invert``, corrected for
    Euler). Under the source condition this is *inversion*. Under a target condition it is an
    *edit*: the first iterate follows the target freely, and each further one comes nearer to the
    source, which full convergence reproduces; so the number of iterations, and of noisy steps left
    out of the grid, say how strong the edit is. A sample's result does not depend on its batch.

    Source: Ronai, Kulikov, Michaeli, *FlowOpt: Fast Optimization Through Whole Flow Processes for
    Training-Free Editing*, 2025 (arXiv 2510.22010), algorithms 1 and 2. Backtracking, the measured
    step, Anderson acceleration (Walker & Ni, *Anderson Acceleration for Fixed-Point Iterations*,
    2011), masks and operators are ours.

    Args:
        sampler: Solver and grid; a part of [0, 1] skips the noisiest steps.
        step_size: ``η > 0``, or ``"auto"``: half of the measured bound (see `step_bound`), which
            costs four more solves.
        num_iters: Updates ``N``. With Euler's ``n`` steps ``(n + 1) + (N + 1) n`` evaluations.
        backtrack: Per sample, keep a trial only if the residual does not grow, and multiply ``η``
            by 1.2 after it, by 0.5 otherwise. A rejected trial is an iteration. Without it every
            step is taken, and ``"auto"`` steps are lowered where consecutive iterates ask for it.
        anderson: Differences of iterates to accelerate with, 0 for none; each holds two states.
        tolerance: A residual that ends a sample as converged.
        distance: An RMSE to the source that ends a sample's edit, in the mask too.
        patience: Iterations without an improvement by 0.1 % that end a sample; None for no such
            rule.
        keep: Numbers of the iterates that ``trace`` is to hold; None for all.

    Raises:
        ValueError: If a number is out of range.

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

    def __post_init__(self):
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
        """Edit ``x1`` towards ``target``, or invert it.

        Args:
            velocity: The field, guided or not; it is never differentiated.
            x1: Data ``(B, *)`` at the last time of the grid; its dtype is the network's.
            source: The condition that ``x1`` is inverted under, passed to the velocity.
            target: The condition of the edit; None means ``source``, an inversion.
            mask: Where the sample may change: broadcastable to ``x1``, within [0, 1]. The edit is
                free where it is 1; the residual counts where it is 0, by ``1 − mask`` between.
            operator: ``A`` of the objective ``½‖A f(z) − A x1‖²``, updated by
                ``z ← z − η Aᵀ(A f(z) − A x1)``: ``x1`` is any sample with the measured ``A x1``.
            callback: Called as ``callback(k, x, z)`` with every iterate, from ``k = 0``, to look
                at images or at `flowkit.metrics.gaussianity` of the latents; the tensors are not to
                be changed. True ends all samples, a boolean ``(B,)`` some.

        Raises:
            TypeError: If ``x1`` is not a floating-point tensor.
            ValueError: If ``x1`` is not finite, the mask does not fit, both a mask and an
                operator are given, or ``"auto"`` finds no step size that converges for some sample.

        Warns:
            UserWarning: Once, if without backtracking a residual grows because the given step is
                above the bound of a pair of consecutive iterates. If results of the velocity are
                not finite.
        """
        if not x1.is_floating_point():
            raise TypeError(f"x1 must be a floating-point tensor, got {x1.dtype}")
        check_finite(x1, "x1")
        flow = Flow(self.sampler, velocity, x1.dtype)
        y = x1.to(flow.dtype)
        objective = choose(y, mask, operator)
        cond = source if target is None else target

        def evaluate(z: Tensor) -> _Iterate:
            x = flow(z, cond)
            return _Iterate(z, x, *objective(x))

        now = evaluate(flow.invert(y, source))
        run = _Run(self, x1, y, now, callback)
        run.record(0, now)
        if self.step_size == "auto" and self.num_iters and run.any_running:
            run.step = _measured_step(evaluate, objective, now, run.running, x1.dtype)
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
    z: Tensor
    x: Tensor
    gradient: Tensor  # what an update of size 1 subtracts
    residual: Tensor  # (B,)


def _select(where: Tensor, a: _Iterate, b: _Iterate) -> _Iterate:
    """Per sample, one of two iterates."""
    return _Iterate(*(torch.where(expand_like(where, u), u, v) for u, v in zip(a, b, strict=True)))


class _Run:
    """Every sample's step, state and record in one run.

    Beside a small network every tensor operation shows: iterations that bring every sample nearer,
    as most do, are told by one comparison, and nothing else is asked of them.
    """

    def __init__(self, settings: FlowOpt, x1: Tensor, y: Tensor, first: _Iterate, callback):
        self.settings, self.y, self.callback = settings, y, callback
        self.auto, self.warned = settings.step_size == "auto", False
        self.step = y.new_full((len(y),), torch.nan if self.auto else float(settings.step_size))
        self.status = torch.zeros(len(y), dtype=torch.long, device=y.device)
        self.running, self.any_running = self.status == RUNNING, True
        self.best, self.steady = first, False
        self.tried = self.reference = first.residual
        self.stale = torch.zeros_like(self.status)
        # Rounding about an exact start is no divergence.
        self.eps = torch.finfo(x1.dtype).eps
        self.limit = DIVERGENCE * first.residual.clamp_min(self.eps**0.5)
        count = settings.num_iters + 1
        self.rows = sorted(set(range(count) if settings.keep is None else settings.keep))
        self.trace = x1.new_empty((len(self.rows), *x1.shape))
        self.residuals: list[Tensor] = []

    def judge(self, now: _Iterate, trial: _Iterate) -> tuple[_Iterate, Tensor]:
        """The next iterates, and whose are the trial's; adapts the steps."""
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
        """Lower an automatic step, or warn of a given one, above the bound of the last pair."""
        if self.warned:
            return
        dg = trial.gradient - now.gradient
        product, squared = inner(trial.z - now.z, dg), inner(dg, dg)
        # An automatic step is half of its bound, a given one may be all of it.
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
        """Keep what is to be kept of an iterate, and end samples."""
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
        if bool(where.any()):
            where = self.running & where.to(self.status.device)
            self.status = torch.where(where, status, self.status)
            self.running = self.status == RUNNING
            self.any_running = bool(self.running.any())

    def result(self, now: _Iterate) -> _Iterate:
        """Where a sample diverged its best iterate, otherwise its last."""
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


def _measured_step(evaluate, objective, now: _Iterate, running: Tensor, dtype) -> Tensor:
    """Half of the bound around the start: ``1 / L`` for symmetric flows."""
    # The same direction for every sample, so that none depends on its batch.
    noise = seeded_noise(now.z.shape[1:], [0], now.z.device).to(now.z).expand_as(now.z)
    bound, cosine = power_bound(
        lambda z: evaluate(z).gradient, now.z, now.gradient, objective.normal(noise), 4, dtype
    )
    require_step(cosine.where(running, 1), now.z, dtype)
    return bound / 2
