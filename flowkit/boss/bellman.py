"""Bellman grids: the least sum of single-step costs, and the uncertainty of these grids."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.boss.costs import EPS, HELD, check_num_steps, step_costs
from flowkit.checks import (
    as_grid,
    check_at_least,
    check_integer,
    check_positive,
    check_same_shape,
)
from flowkit.sampling import ODESampler
from flowkit.types import Cond
from flowkit.velocity import Velocity


def bellman_grid(costs: Tensor, fine_grid: Tensor | int, num_steps: int) -> Tensor:
    """Return the grid of ``num_steps`` steps with the least sum of costs.

    The grid has the same ends as the fine grid.

    The dynamic program is ``V(j, 1) = c[j, n−1]``, ``V(j, m) = min_{j<i<n−1} c[j, i] + V(i, m−1)``.
    The grid follows the minima from ``j = 0``. The effort is ``O(num_steps n²)``. If several grids
    have the least cost, the result is the most even of them (least sum of squared steps).

    Args:
        costs: ``(n, n)``, see `step_costs`.
        fine_grid: Times ``(n,)`` of the costs, or the number ``n − 1`` of uniform steps.
        num_steps: Steps of the grid, from 1 (both ends only) to ``n − 1`` (the fine grid).

    Returns:
        Times ``(num_steps + 1,)`` in float64.

    Raises:
        TypeError: If ``num_steps`` is not an integer.
        ValueError: If ``num_steps`` is out of range, or a cost above the diagonal is not finite.

    Source: Nguyen et al., 2024 (arXiv 2312.16414), its dynamic program. The rule for ties is an
    addition of flowkit.

    >>> costs = step_costs(lambda x, t, cond: 2 * t[:, None], torch.zeros(1, 1), 100)
    >>> bellman_grid(costs, 100, num_steps=4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    fine = as_grid(fine_grid, "fine_grid")
    check_num_steps(num_steps, fine)
    _check_costs(costs, fine)
    return fine[_bellman(costs.double().cpu(), fine, num_steps)[0]]


def _bellman(costs: Tensor, fine: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the cheapest paths of costs ``(*, n, n)``, and their costs ``(*)``.

    A path is the numbers of its fine times, ``(*, num_steps + 1)``.
    """
    n = len(fine)
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    costs = costs.masked_fill(~above, torch.inf)
    squared_steps = (fine[None, :] - fine[:, None]).square()
    value = costs.new_full(costs.shape[:-1], torch.inf)
    value[..., -1] = 0
    unevenness = value.clone()
    choices: list[Tensor] = []
    for m in range(1, num_steps + 1):
        total = costs + value[..., None, :]
        value = total.amin(-1)
        scale = total.masked_fill(total.isinf(), 0).abs().amax((-2, -1))
        tied = total <= (value + 4 * (m + 1) * EPS * scale[..., None])[..., None]
        rivals = torch.where(tied, squared_steps + unevenness[..., None, :], torch.inf)
        unevenness, choice = rivals.min(-1)
        choices.append(choice)
    knots = [torch.zeros(costs.shape[:-2], dtype=torch.long)]
    for choice in reversed(choices):
        knots.append(choice.gather(-1, knots[-1][..., None])[..., 0])
    return torch.stack(knots, -1), value[..., 0]


class BellmanInterval(NamedTuple):
    """Bellman grid with its uncertainty from the finite number of noise samples.

    ``grid``: times ``(K + 1,)``. ``value``: cost of the grid. ``value_interval``: low and high end
    of the least cost. ``knots_interval``: ``(2, K + 1)``, low and high ends of the times.
    """

    grid: Tensor
    value: float
    value_interval: tuple[float, float]
    knots_interval: Tensor


def bellman_interval(
    costs: Tensor,
    fine_grid: Tensor | int,
    num_steps: int,
    *,
    level: float = 0.95,
    resamples: int = 400,
    generator: torch.Generator | None = None,
) -> BellmanInterval:
    """Compute intervals of the least cost and of the Bellman grid, over groups of noise samples.

    The least of noisy costs is too small on average, so the interval of the least cost ``V``
    reaches further up than down. With ``e`` the standard error of the cost of the found grid, and
    ``V*``, ``e*`` the same values of a bootstrap sample, the ends are

        low = min(V − e t, quantile of V*),    high = max(V + e t, V − e · quantile of (V* − V)/e*),

    with Student's ``t``; the quantiles are at ``(1 − level)/2``. The intervals of the times are
    quantiles of the bootstrap samples' times.

    No interval knows of trajectories that the noise samples do not hold. At level .95, with groups
    of 4 noise samples and 20 fine steps, the share of 400 intervals that held the least cost was
    96.8 % for `flowkit.exact.GaussianFlow` in 2 dimensions (4 steps, 16 groups; in one dimension
    94.3 %); 94.0 % to 97.0 % for a ring of 8 modes of standard deviation .3 (4, 8 and 12 steps, 16
    to 80 groups); and, for modes of .1, whose costs have rare large values, 87.2 % with 16 groups
    and 94.0 % with 128 (6 steps, the least of 4, 6 and 8).

    Args:
        costs: ``(groups, n, n)`` with at least 2 groups, see `step_costs`; use 16 groups or more.
            With 2 or 3 the upper end may be infinite.
        fine_grid: Times ``(n,)`` of the costs, or the number ``n − 1`` of uniform steps.
        num_steps: Steps of the grid, from 1 to ``n − 1``.
        level: Probability that an interval holds its true value, in (0, 1).
        resamples: Number of bootstrap samples, at least ``2 / (1 − level)``.
        generator: Source of the bootstrap samples.

    Raises:
        TypeError: If ``num_steps`` or ``resamples`` is not an integer.
        ValueError: If ``costs`` hold fewer than 2 groups, ``level`` is out of range, there are too
            few ``resamples``, or as for `bellman_grid`.

    Source: Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 12, for the
    bootstrap-t interval.

    >>> costs = step_costs(lambda x, t, cond: x, torch.randn(32, 2), 20, groups=16)
    >>> low, high = bellman_interval(costs, 20, 4).value_interval
    >>> low < high
    True
    """
    from scipy.stats import t as student

    fine = as_grid(fine_grid, "fine_grid")
    check_num_steps(num_steps, fine)
    if costs.ndim != 3 or len(costs) < 2:
        raise ValueError(
            "costs must have shape (groups, n, n) with at least 2 groups, "
            f"got shape {tuple(costs.shape)}"
        )
    _check_level(level, resamples)
    _check_costs(costs.mean(0), fine)
    parts = costs.double().cpu().triu(1)
    ones = torch.ones(resamples, len(parts), dtype=torch.float64)
    knots, value, error = _resampled(parts, ones[:1], fine, num_steps)
    draws = torch.randint(len(parts), ones.shape, generator=generator)
    counts = torch.zeros_like(ones).scatter_add_(1, draws, ones)
    paths, values, errors = _resampled(parts, counts, fine, num_steps)
    reach = float(student.ppf((1 + level) / 2, len(parts) - 1)) * error.item()
    place = int((resamples + 1) * (1 - level) / 2) - 1
    lowest = values.sort().values[place].item()
    # Without any spread, 0/0 appears: the value is then certain.
    moves = (error * (values - value) / errors).nan_to_num(0, torch.inf, -torch.inf)
    drop = moves.sort().values[place].item()
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return BellmanInterval(
        fine[knots[0]],
        value.item(),
        (min(value.item() - reach, lowest), value.item() + max(reach, -drop)),
        fine[paths].quantile(ends, dim=0),
    )


def _resampled(
    costs: Tensor, counts: Tensor, fine: Tensor, num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cheapest paths, their costs, and the standard errors of these, of bootstrap samples.

    Args:
        costs: ``(groups, n, n)``, finite.
        counts: How often each bootstrap sample holds each group, ``(resamples, groups)``.
        fine: Times ``(n,)``.
        num_steps: Steps of the paths.
    """
    groups, n = len(costs), len(fine)
    parts, rows = costs.flatten(1), max(1, HELD // n**2)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for weights in (counts / groups).split(rows):
        paths, values = _bellman((weights @ parts).unflatten(1, (n, n)), fine, num_steps)
        along = parts[:, n * paths[:, :-1] + paths[:, 1:]].sum(2).T
        variances = (weights * (along - values[:, None]).square()).sum(1) / (groups - 1)
        found.append((paths, values, variances.sqrt()))
    paths, values, errors = (torch.cat(kind) for kind in zip(*found, strict=True))
    return paths, values, errors


def _check_level(level: float, resamples: int) -> None:
    """Require a level in (0, 1), and bootstrap samples on both sides of an interval."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    check_integer(resamples, "resamples")
    least = math.ceil(2 / (1 - level) - 1e-9)
    if resamples < least:
        raise ValueError(
            f"resamples must be at least {least} for an interval of level {level}, got {resamples}"
        )


def converged_costs(
    velocity: Velocity,
    draw: Callable[[int, int], tuple[Tensor, Cond]],
    fine_grid: Tensor | int,
    num_steps: int,
    *,
    method: str = "euler",
    reference: ODESampler | None = None,
    tolerance: float = 0.05,
    start: int = 64,
    limit: int = 1024,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, BellmanInterval]:
    """Return step costs of enough noise samples for a stable Bellman grid.

    The number of noise samples doubles until two conditions hold, or until ``limit``. First, the
    interval of the value is at most ``2 tolerance`` times the value wide. Second, the intervals of
    the times are on average at most ``tolerance`` times the length of the grid wide.

    Args:
        velocity: The velocity, with guidance if the sampler uses guidance.
        draw: Function ``draw(first, count) -> (x0, cond)`` that returns noise samples number
            ``first`` to ``first + count − 1`` and their conditions.
        fine_grid: Times ``(n,)``, or a number of uniform steps.
        num_steps: Steps of the grid, from 1 to ``n − 1``.
        method: Solver, as for `step_costs`.
        reference: Reference solver, as for `step_costs`.
        tolerance: Largest relative uncertainty, see above.
        start: First number of noise samples, a multiple of 16.
        limit: Largest number of noise samples.
        generator: Source of the bootstrap samples.

    Returns:
        Costs ``(groups, n, n)``, each group with ``start/16`` noise samples, and their interval.

    Raises:
        ValueError: If ``start`` is not a positive multiple of 16, ``limit`` is below ``start``,
            ``tolerance`` is not positive, or as for `step_costs` and `bellman_grid`.

    >>> from flowkit.exact import GaussianFlow
    >>> def draw(first, count):
    ...     return torch.randn(count, 2, generator=torch.Generator().manual_seed(first)), None
    >>> costs, found = converged_costs(GaussianFlow(2.0, 0.5), draw, 20, num_steps=4, limit=128)
    >>> found.grid.shape, costs.shape[1:]
    (torch.Size([5]), torch.Size([21, 21]))
    """
    fine = as_grid(fine_grid, "fine_grid")
    check_num_steps(num_steps, fine)
    check_positive(tolerance, "tolerance")
    check_at_least(start, 16, "start")
    check_at_least(limit, start, "limit")
    if start % 16:
        raise ValueError(f"start must be a multiple of 16, got {start}")
    size = start // 16
    costs, groups = torch.empty(0, len(fine), len(fine), dtype=torch.float64), 16
    while True:
        first, count = size * len(costs), size * (groups - len(costs))
        x0, cond = draw(first, count)
        more = step_costs(
            velocity, x0, fine, cond, method=method, reference=reference, groups=count // size
        )
        costs = torch.cat([costs, more])
        found = bellman_interval(costs, fine, num_steps, generator=generator)
        low, high = found.value_interval
        tight = high - low <= 2 * tolerance * found.value
        width = found.knots_interval.diff(dim=0).mean()
        if (tight and width <= tolerance * (fine[-1] - fine[0])) or 2 * groups * size > limit:
            return costs, found
        groups *= 2


def _check_costs(costs: Tensor, fine: Tensor) -> None:
    """Require costs ``(n, n)`` that are finite above the diagonal."""
    n = len(fine)
    check_same_shape(costs, torch.empty(n, n), ("costs", "fine_grid, squared"))
    bad = (~costs.isfinite()).triu(1).nonzero()
    if len(bad):
        j, k = bad[0].tolist()
        raise ValueError(
            f"costs must be finite above the diagonal, got {costs[j, k].item()} for the step from "
            f"t = {fine[j]:.6g} to {fine[k]:.6g} (costs[{j}, {k}])"
        )
