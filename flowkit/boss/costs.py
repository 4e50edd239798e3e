"""Costs of single large steps, computed without stored trajectories."""

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowkit.boss.precision import Precise, precise
from flowkit.checks import as_grid, check_at_least, check_choice, check_integer
from flowkit.sampling import ODESampler
from flowkit.types import Cond, per_sample, take
from flowkit.velocity import Velocity, bind

Field = Callable[..., Tensor]
"""Velocity at one time for the whole batch: ``field(x (B, *), t) -> (B, *)``."""

SLOPES: dict[str, Callable[[Field, Tensor, Tensor, float, float], Tensor]] = {
    # slope(f, x, v, t, h): the step from t to t + h ends at x + h slope, with v = f(x, t).
    "euler": lambda f, x, v, t, h: v,
    "midpoint": lambda f, x, v, t, h: f(x + h / 2 * v, t + h / 2),
    "heun": lambda f, x, v, t, h: (v + f(x + h * v, t + h)) / 2,
    "mean": lambda f, x, v, t, h: f(x, t, t + h),  # Euler's step by a mean velocity
}
METHODS = ("euler", "midpoint", "heun")

# Largest number of velocity elements in a chunk. The values are fast on a CPU and an accelerator.
HELD, HELD_ON_ACCELERATOR = 2**20, 2**27
COLUMNS = 1024  # elements of a sample in one conversion to float64
EPS = torch.finfo(torch.float64).eps


@torch.no_grad()
def step_costs(
    velocity: Velocity,
    x0: Tensor,
    fine_grid: Tensor | int,
    cond: Cond = None,
    *,
    method: str = "euler",
    reference: ODESampler | None = None,
    groups: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return the squared errors of all single steps between the times of a fine grid.

    Let ``x_j`` be the states of the reference at the fine times ``t_j``. The costs are

        c[j, k] = mean over noise samples of ‖x_k − x_j − (t_k − t_j) s_jk‖²,    j < k,

    summed over elements. Here ``s_jk`` is the slope of the method's step from ``x_j``; for Euler,
    it is the velocity ``v_j``. Let ``d_a = x_{a+1} − x_a`` be the steps of the reference (by
    default ``h_a v_a``). Then Euler's costs are sums of inner products over ``a, b ∈ [j, k)``,

        c[j, k] = Σ_ab ⟨d_a, d_b⟩ − 2 (t_k − t_j) Σ_a ⟨d_a, v_j⟩ + (t_k − t_j)² ⟨v_j, v_j⟩.

    For Euler, prefix sums of Gram matrices in float64 give all costs. The memory is ``O(n²)`` plus
    one chunk of noise samples, with one evaluation per noise sample and fine step. The slopes of
    midpoint and Heun, and mean velocities, depend on both ends of a step, so their costs need about
    ``n²/2`` evaluations per noise sample.

    States are in float32 at least, and outputs in half precision are converted; the velocity itself
    gets states in the type of ``x0``. If all costs are below the round-off of such outputs, a
    warning says so: the costs then tell nothing about the grid.

    Args:
        velocity: The velocity, with guidance if the sampler uses guidance.
        x0: States ``(B, *)`` at the first time.
        fine_grid: Times ``(n,)``, or the number ``n − 1`` of uniform steps.
        cond: Conditions of the states; one row serves all states.
        method: Solver of the judged steps: ``"euler"``, ``"midpoint"`` or ``"heun"``.
        reference: Solver of the reference. Its grid must contain all times of the fine grid.
            ``None`` means the same method on the fine grid; the single steps of the fine grid then
            have cost 0.
        groups: Number of equal parts of the noise samples. The result is then ``(groups, n, n)``,
            the mean within each part, for `flowkit.boss.bellman_interval`.
        chunk_size: Number of noise samples per chunk; ``None`` chooses by memory.

    Returns:
        Costs ``(n, n)`` in float64 on the CPU, ``+inf`` on and below the diagonal. Costs below the
        round-off of the states (relative to the largest ``‖v‖²``) are 0. If all are below the
        round-off of a velocity in half precision, all are 0.

    Raises:
        ValueError: If a velocity or a state is not finite, the reference misses a time, the method
            is unknown, or ``groups`` does not divide the number of noise samples.

    Source: Nguyen et al., *Bellman Optimal Step-size Straightening of Flow-Matching Models*, 2024
    (arXiv 2312.16414), its cost of a step. The Gram form, other solvers and references are
    additions of flowkit.

    >>> costs = step_costs(lambda x, t, cond: 2 * t[:, None], torch.zeros(1, 1), 4)
    >>> costs[0, 2].item()  # h⁴ m² (m − 1)² with h = 1/4, m = 2
    0.015625
    """
    fine = as_grid(fine_grid, "fine_grid")
    check_choice(method, METHODS, "method")
    check_at_least(len(x0), 1, "the number of noises in x0")
    parts = 1 if groups is None else groups
    check_at_least(parts, 1, "groups")
    if len(x0) % parts:
        raise ValueError(f"groups must divide the {len(x0)} noises into equal parts, got {parts}")
    method = kind_of_step(velocity, cond, method)
    n, size = len(fine), len(x0) // parts
    if chunk_size is None:
        held = HELD if x0.device.type == "cpu" else HELD_ON_ACCELERATOR
        per_noise = x0[0].numel() if method == "euler" else max(n, x0[0].numel())
        chunk_size = max(1, held // (n * per_noise))
    check_at_least(chunk_size, 1, "chunk_size")
    velocity, x0 = precise(velocity, x0)
    cond = per_sample(cond, len(x0))
    costs = torch.zeros(parts, n, n, dtype=torch.float64)
    energy = torch.zeros(parts, n, dtype=torch.float64)
    walk = _gram_walk if method == "euler" else _direct_walk
    for rows in chunks(0, len(x0), chunk_size):
        sums = walk(velocity, x0[rows], fine, take(cond, rows), method, reference)
        for part in range(rows.start // size, (rows.stop - 1) // size + 1):
            first, last = max(rows.start, part * size), min(rows.stop, (part + 1) * size)
            some_costs, some_energy = sums(slice(first - rows.start, last - rows.start))
            costs[part] += some_costs
            energy[part] += some_energy
    costs = _above_round_off(costs, energy, fine, torch.finfo(x0.dtype).eps, velocity)
    means = (costs / size).masked_fill(fine[None, :] <= fine[:, None], torch.inf)
    return means[0] if groups is None else means


def _above_round_off(
    costs: Tensor, energy: Tensor, fine: Tensor, eps: float, velocity: Precise
) -> Tensor:
    """Return the costs ``(groups, n, n)``, with 0 for costs below round-off.

    Args:
        costs: Sums of costs; values on and below the diagonal are meaningless.
        energy: Sums of ``‖v_j‖²``, ``(groups, n)``.
        fine: Times ``(n,)``.
        eps: Relative spacing of the states.
        velocity: The velocity after all evaluations.
    """
    span, largest = fine[None, :] - fine[:, None], energy.amax(1)[:, None, None]
    # Round-off has two parts: that of the states in one step, and that of the float64 sums.
    share = (8 * eps * span).square().clamp(min=64 * EPS * span[0, -1].item() ** 2)
    known = torch.where(costs <= largest * share, 0.0, costs)
    # Single costs below the round-off of half precision are kept: they are means of many values.
    above = span > 0
    below = (costs <= largest * (velocity.eps * span).square())[:, above].all()
    if below and (velocity.returns_half or known[:, above].any()):
        warnings.warn(
            "all costs are below the round-off of a velocity in half precision: all grids cost the "
            "same, and the Bellman grid is the uniform one; for another grid, compute the velocity "
            "in float32",
            stacklevel=3,
        )
        return torch.zeros_like(costs)
    return known


Sums = Callable[[slice], tuple[Tensor, Tensor]]
"""Function from some noise samples of a chunk to the sums of their costs ``(n, n)`` and of their
energies ``‖v_j‖² (n,)``."""


def _gram_walk(
    velocity: Velocity,
    x0: Tensor,
    fine: Tensor,
    cond: Cond,
    method: str,
    reference: ODESampler | None,
) -> Sums:
    """Return Euler's costs, from Gram matrices of the velocities and of the reference's steps."""
    field = make_field(velocity, x0, cond, fine)
    v = x0.new_empty(len(fine) - 1, *x0.shape)
    states = None if reference is None else anchors(velocity, x0, fine, cond, reference)
    moves, x = None if states is None else states.diff(dim=0), x0.clone()
    for j, (t, end) in enumerate(pairwise(fine.tolist())):
        v[j] = field(x if states is None else states[j], t)
        _check_velocity(v[j], j, fine)
        if states is None:
            x.add_(v[j], alpha=end - t)

    def sums(part: slice) -> tuple[Tensor, Tensor]:
        """Return costs and energies of some noise samples of the chunk."""
        steps, n = fine.diff()[:, None], len(fine) - 1
        dd, dv = torch.zeros(2, n, n, dtype=torch.float64)
        vv, energy = torch.zeros(2, n + 1, dtype=torch.float64)
        for columns in chunks(0, v[0, part].numel(), COLUMNS):
            b = v[:, part].flatten(1)[:, columns].to("cpu", torch.float64, copy=True)
            d = steps * b
            if moves is not None:
                d = moves[:, part].flatten(1)[:, columns].to("cpu", torch.float64, copy=True)
            energy[:-1] += b.square().sum(1)
            # Subtracting the mean velocity keeps the costs and reduces cancellation.
            mean = d.sum(0) / (fine[-1] - fine[0])
            b -= mean
            d -= steps * mean
            products = d @ b.T
            dd += products * steps.T if moves is None else d @ d.T
            dv += products
            vv[:-1] += b.square().sum(1)
        return _costs_of_grams(fine, dd, dv, vv), energy

    return sums


def _costs_of_grams(fine: Tensor, dd: Tensor, dv: Tensor, vv: Tensor) -> Tensor:
    """Apply the equation of `step_costs`; values on and below the diagonal are meaningless.

    Args:
        fine: Times ``(n,)``.
        dd: Inner products ``⟨d_a, d_b⟩ (n − 1, n − 1)``.
        dv: Inner products ``⟨d_a, v_j⟩ (n − 1, n − 1)``.
        vv: Inner products ``⟨v_j, v_j⟩ (n,)``.
    """
    span = fine[None, :] - fine[:, None]
    prefix = pad(dd, (1, 0, 1, 0)).cumsum(0).cumsum(1)
    ends = prefix.diagonal()
    squares = ends[None, :] + ends[:, None] - prefix - prefix.T
    along = pad(dv, (0, 1, 1, 0)).cumsum(0)  # along[k, j] is the sum over a < k
    products = (along - along.diagonal()[None, :]).T
    return squares - 2 * span * products + span.square() * vv[:, None]


def _direct_walk(
    velocity: Velocity,
    x0: Tensor,
    fine: Tensor,
    cond: Cond,
    method: str,
    reference: ODESampler | None,
) -> Sums:
    """Return the costs of slopes that depend on both ends, one step at a time."""
    means = method == "mean"
    reference = reference or ODESampler(fine, "euler" if means else method)
    states = anchors(velocity, x0, fine, cond, reference)
    field, slope = make_field(velocity, x0, cond, fine, means), SLOPES[method]
    times = fine.tolist()
    costs = torch.zeros(len(x0), len(fine), len(fine), dtype=torch.float64)
    energy = torch.zeros(len(x0), len(fine), dtype=torch.float64)
    for j, t in enumerate(times[:-1]):
        # The reference has evaluated this velocity, and its next state is finite.
        v = field(states[j], t).clone()  # a velocity may reuse its buffer
        energy[:, j] = _squares(v)
        for k in range(j + 1, len(times)):
            h = times[k] - t
            costs[:, j, k] = _squares(states[k] - states[j] - h * slope(field, states[j], v, t, h))
    return lambda part: (costs[part].sum(0), energy[part].sum(0))


def _squares(x: Tensor) -> Tensor:
    """Return the squared norm ``(B,)`` of each sample, in float64 on the CPU."""
    return x.flatten(1).double().square().sum(1).cpu()


def anchors(
    velocity: Velocity, x0: Tensor, fine: Tensor, cond: Cond, reference: ODESampler
) -> Tensor:
    """Return the reference's states ``(n, B, *)`` at the times of the fine grid.

    Raises:
        ValueError: If the reference's grid misses a fine time, or a state is not finite.
    """
    times = reference.times
    places = (times[None, :] - fine[:, None]).abs().argmin(1)
    gaps = (times[places] - fine).abs()
    gaps[[0, -1]] = (times[[0, -1]] - fine[[0, -1]]).abs()
    if bool((gaps > 1e-9).any()):
        raise ValueError(
            "reference.grid must have the ends of fine_grid and contain all its times, "
            f"got no time at t = {fine[gaps.argmax()].item():.6g}"
        )
    rows = {int(place): row for row, place in enumerate(places)}
    states = x0.new_empty(len(fine), *x0.shape)
    states[0] = x0

    def keep(step: int, t: float, x: Tensor) -> None:
        """Store the state of a fine time."""
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"states of the reference must be finite, got NaN or infinite values at t = {t:.6g}"
            )
        if step in rows:
            states[rows[step]] = x

    reference.solve(velocity, x0, cond, callback=keep)
    return states


def kind_of_step(velocity: Velocity, cond: Cond, method: str) -> str:
    """Return the key of `SLOPES`: the method, or ``"mean"`` for Euler's steps by means."""
    return "mean" if method == "euler" and bind(velocity, cond).has_means else method


def rows_per_step(method: str) -> int:
    """Return the evaluations of the velocity in one step of a sampler."""
    return 1 if method in ("euler", "mean") else 2


def make_field(
    velocity: Velocity, x: Tensor, cond: Cond, grid: Tensor, means: bool = False
) -> Field:
    """Bind a velocity for a walk along the grid, as a function of a state and a float time.

    With ``means`` it is a mean velocity, a function of the end of a step, too.
    """
    bound = bind(velocity, cond, grid)
    bound.average_steps(means)
    dtype = torch.promote_types(x.dtype, torch.float32)

    def field(x: Tensor, t: float, end: float | None = None) -> Tensor:
        if means:
            bound.begin_step(t, t if end is None else end)
        return bound(x, torch.full((len(x),), t, dtype=dtype, device=x.device), cond)

    return field


def round_off(states: Tensor) -> float:
    """Return the mean square of the rounding errors in states after a hundred steps."""
    scale = states.double().square().mean().item()
    return (32 * torch.finfo(states.dtype).eps) ** 2 * scale


def check_num_steps(num_steps: int, fine: Tensor) -> None:
    """Require a number of steps in ``[1, n − 1]`` for a fine grid of ``n`` times."""
    check_integer(num_steps, "num_steps")
    most = len(fine) - 1
    if not 1 <= num_steps <= most:
        raise ValueError(
            f"num_steps must lie in [1, {most}] for a grid of {len(fine)} times, got {num_steps}"
        )


def _check_velocity(v: Tensor, j: int, fine: Tensor) -> None:
    """Require a finite velocity at the fine time number ``j``."""
    if not bool(torch.isfinite(v).all()):
        raise ValueError(
            f"velocity must be finite, got NaN or infinite values at t = {fine[j].item():.6g}, "
            f"step {j} of {len(fine) - 1}"
        )


def chunks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Yield slices of at most ``size`` numbers between ``start`` and ``stop``."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
