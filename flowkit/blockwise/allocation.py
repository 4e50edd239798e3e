"""Allocation of a budget of steps to the segments of a blockwise flow."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit import grids
from flowkit.blockwise.flow import Blockwise
from flowkit.boss import bellman_grid, step_costs
from flowkit.checks import check_at_least
from flowkit.types import Cond

_State = tuple[float, float, tuple[Tensor, ...]]
"""Price, error and grids of some segments."""


class Allocation(NamedTuple):
    """Result of `allocate_steps`.

    ``grid``: times, with all edges. ``steps``: number of steps per segment. ``error`` and
    ``price``: sums over all segments.
    """

    grid: Tensor
    steps: list[int]
    error: float
    price: float


def allocate_steps(
    flow: Blockwise,
    x0: Tensor,
    prices: Sequence[tuple[float, float]],
    budget: float,
    cond: Cond = None,
    *,
    fine_steps: int = 16,
    costs: Tensor | None = None,
) -> Allocation:
    """Return the Euler grid with the least error within a budget.

    The error of ``n`` steps in a segment is the error of their Bellman grid: the sum of the
    single-step errors (see `flowkit.boss`). The price of ``n`` steps is the price of one first
    step, which runs the trunk, plus ``n − 1`` times the price of a later step. The allocation is
    exact: no other choice of Bellman grids has a smaller error within the budget.

    Args:
        flow: The blockwise flow. Errors are those of full features, for any ``feature_mode``.
        x0: Noise ``(B, *)``.
        prices: For each segment, the price of its first step and the price of a later step, in any
            unit; see `flowkit.blockwise.step_prices`.
        budget: Largest sum of prices, in the same unit.
        cond: Conditions of the noise.
        fine_steps: Steps of the reference in each segment, and the largest number of steps of a
            segment.
        costs: Result of `flowkit.boss.step_costs` on ``grids.blockwise(flow.edges, fine_steps)``.
            Pass these costs for a flow with guidance, or to allocate several budgets. With
            ``None``, the function computes them.

    Returns:
        The grid, the steps per segment, the error and the price.

    Raises:
        ValueError: If ``prices`` do not hold one pair per segment, the budget is too small for one
            step in each segment, or ``costs`` belong to another grid.

    >>> from flowkit.blockwise.mlp import BlockwiseMLP
    >>> flow = BlockwiseMLP((2,), edges=2, width=16)
    >>> allocate_steps(flow, torch.randn(8, 2), [(3.0, 1.0), (3.0, 2.0)], budget=9.0).price <= 9.0
    True
    """
    check_at_least(fine_steps, 1, "fine_steps")
    fine = grids.blockwise(flow.edges, fine_steps)
    if len(prices) != len(flow.edges) - 1:
        raise ValueError(
            f"prices must hold one pair per segment, {len(flow.edges) - 1}, got {len(prices)}"
        )
    if costs is None:
        costs = step_costs(flow, x0, fine, cond)
    elif costs.shape != (len(fine), len(fine)):
        raise ValueError(
            f"costs must belong to the {len(fine)} times of grids.blockwise(edges, {fine_steps}), "
            f"got shape {tuple(costs.shape)}"
        )
    frontier: list[_State] = [(0.0, 0.0, ())]  # (price, error, grids) of the first segments
    for m, (first, later) in enumerate(prices):
        part = slice(m * fine_steps, (m + 1) * fine_steps + 1)
        choices = _choices(costs[part, part], fine[part])
        frontier = _undominated(
            [
                (price + first + n * later, error + more, (*grid, times))
                for price, error, grid in frontier
                for n, (more, times) in enumerate(choices)
            ],
            budget,
        )
    if not frontier:
        least = sum(first for first, _ in prices)
        raise ValueError(f"budget must pay one step in each segment, {least}, got {budget}")
    price, error, parts = frontier[-1]
    grid = torch.cat([fine[:1], *(times[1:] for times in parts)])
    return Allocation(grid, [len(times) - 1 for times in parts], error, price)


def _choices(costs: Tensor, fine: Tensor) -> list[tuple[float, Tensor]]:
    """Return the error and the times of 1, 2, … steps in one segment."""
    found = []
    for n in range(1, len(fine)):
        times = bellman_grid(costs, fine, n)
        knots = torch.searchsorted(fine, times).tolist()
        found.append((sum(costs[i, j].item() for i, j in pairwise(knots)), times))
    return found


def _undominated(states: list[_State], budget: float) -> list[_State]:
    """Return the states within the budget that no cheaper state beats in error, sorted by price."""
    kept = []
    for state in sorted(states, key=lambda s: s[:2]):
        if state[0] <= budget * (1 + 1e-12) and (not kept or state[1] < kept[-1][1]):
            kept.append(state)
    return kept
