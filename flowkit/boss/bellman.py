"""The grid whose single steps cost least, and how sure of it one can be."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.boss.costs import EPS, check_num_steps, step_costs
from flowkit.checks import as_grid, check_at_least, check_same_shape
from flowkit.sampling import ODESampler
from flowkit.types import Cond
from flowkit.velocity import Velocity


def bellman_grid(costs: Tensor, fine_grid: Tensor | int, num_steps: int) -> Tensor:
    """Return the cheapest grid of ``num_steps`` steps between the ends of the fine grid.

    ``V(j, 1) = c[j, n]``, ``V(j, m) = min_{j<i<n} c[j, i] + V(i, m−1)``; the grid is the path of
    the minima from ``j = 0``, in ``O(num_steps n²)``. Of several cheapest grids it is the most
    even one (the least sum of squared steps).

    Source: Nguyen et al. 2024 (arXiv 2312.16414), its dynamic program; the rule for ties is ours.

    Args:
        costs: ``(n, n)``, see `step_costs`.
        fine_grid: The times ``(n,)`` that the costs are about.
        num_steps: Steps of the grid, from 1 (the ends) to ``n − 1`` (the fine grid).

    Returns:
        Times ``(num_steps + 1,)`` in float64.

    Raises:
        ValueError: If ``num_steps`` is out of range, or a cost above the diagonal is not finite.

    >>> costs = step_costs(lambda x, t, cond: 2 * t[:, None], torch.zeros(1, 1), 100)
    >>> bellman_grid(costs, 100, num_steps=4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    fine = as_grid(fine_grid, "fine_grid")
    check_num_steps(num_steps, fine)
    _check_costs(costs, fine)
    return fine[_bellman(costs.double().cpu(), fine, num_steps)[0]]


def _bellman(costs: Tensor, fine: Tensor, num_steps: int) -> tuple[Tensor, float]:
    """The knots of the cheapest path, and its cost."""
    n = len(fine)
    above = torch.ones(n, n, dtype=torch.bool).triu(1)
    costs = costs.masked_fill(~above, torch.inf)
    squared_steps = (fine[None, :] - fine[:, None]).square()
    value, unevenness = torch.full((2, n), torch.inf, dtype=torch.float64)
    value[-1] = unevenness[-1] = 0
    choices: list[Tensor] = []
    for m in range(1, num_steps + 1):
        total = costs + value
        value = total.amin(1)
        finite = total[total.isfinite()]
        tie = 4 * (m + 1) * EPS * finite.abs().max()
        rivals = torch.where(total <= value[:, None] + tie, squared_steps + unevenness, torch.inf)
        unevenness, choice = rivals.min(1)
        choices.append(choice)
    knots = [0]
    for choice in reversed(choices):
        knots.append(int(choice[knots[-1]]))
    return torch.tensor(knots), value[0].item()


class BellmanInterval(NamedTuple):
    """A Bellman grid with the uncertainty that comes from the number of noises.

    ``grid``: times ``(K + 1,)``. ``value``: its cost. ``value_interval``: of the least cost.
    ``knots_interval``: ``(2, K + 1)``, the low and the high ends of the times.
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
    resamples: int = 200,
    generator: torch.Generator | None = None,
) -> BellmanInterval:
    """Bootstrap the Bellman grid over groups of noises.

    Args:
        costs: ``(groups, n, n)``, see `step_costs`; 16 groups or more make sense.
        fine_grid: The times ``(n,)`` that the costs are about.
        num_steps: Steps of the grid.
        level: Of the percentile intervals.
        resamples: How often groups are drawn anew.
        generator: Draws them.

    Raises:
        ValueError: If ``costs`` are not of 2 groups at least, or as for `bellman_grid`.

    >>> costs = step_costs(lambda x, t, cond: x, torch.randn(32, 2), 20, groups=16)
    >>> low, high = bellman_interval(costs, 20, 4).value_interval
    >>> low < high
    True
    """
    fine = as_grid(fine_grid, "fine_grid")
    check_num_steps(num_steps, fine)
    if costs.ndim != 3 or len(costs) < 2:
        raise ValueError(
            f"costs must be of at least 2 groups, (groups, n, n), got shape {tuple(costs.shape)}"
        )
    groups, mean = len(costs), costs.mean(0)
    _check_costs(mean, fine)
    knots, value = _bellman(mean, fine, num_steps)
    draws = torch.randint(groups, (resamples, groups), generator=generator)
    paths = [_bellman(costs[draw].mean(0), fine, num_steps) for draw in draws]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor([v for _, v in paths], dtype=torch.float64).quantile(ends).tolist()
    moved = torch.stack([fine[k] for k, _ in paths]).quantile(ends, dim=0)
    return BellmanInterval(fine[knots], value, (low, high), moved)


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
    """Return the costs of as many noises as a steady Bellman grid needs.

    The number of noises is doubled until the interval of the value is within ``± tolerance`` of
    it and the times' intervals are on average no wider than ``tolerance`` of the whole, or until
    the limit.

    Args:
        velocity: The field.
        draw: ``draw(first, count) -> (x0, cond)``, the states ``first`` to ``first + count``.
        fine_grid: Times ``(n,)``, or a number of uniform steps.
        num_steps: Steps of the grid.
        method: As for `step_costs`.
        reference: As for `step_costs`.
        tolerance: See above.
        start: Noises to begin with, a multiple of 16.
        limit: Noises at most.
        generator: Draws the bootstrap.

    Returns:
        Costs ``(groups, n, n)`` of ``start/16`` noises each, and their interval.

    Raises:
        ValueError: If ``start`` is no multiple of 16, or as for `step_costs` and `bellman_grid`.
    """
    fine = as_grid(fine_grid, "fine_grid")
    check_num_steps(num_steps, fine)
    check_at_least(start, 16, "start")
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
    n = len(fine)
    check_same_shape(costs, torch.empty(n, n), ("costs", "fine_grid, squared"))
    bad = (~costs.isfinite()).triu(1).nonzero()
    if len(bad):
        j, k = bad[0].tolist()
        raise ValueError(
            f"costs must be finite above the diagonal, got {costs[j, k].item()} for the step from "
            f"t = {fine[j]:.6g} to {fine[k]:.6g} (costs[{j}, {k}])"
        )
