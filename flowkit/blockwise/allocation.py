"""How many steps each segment of a blockwise flow should get."""

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


class Allocation(NamedTuple):
    """``grid``: times with all edges. ``steps``: per segment. ``error`` and ``price``: in all."""

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
    """Return the Euler grid of least error that costs no more than the budget.

    The error of ``n`` steps in a segment is that of their Bellman grid, the sum of single steps'
    errors (see `flowkit.boss`); their price is that of a first step, which runs the trunk, and
    ``n − 1`` later ones. Which segment gets how many is then found exactly.

    Args:
        flow: Its full features are judged, whatever its mode.
        x0: Noise ``(B, *)``.
        prices: For each segment that of its first and of a later step, in any unit; see
            `flowkit.blockwise.step_prices`.
        budget: In the same unit.
        cond: Conditions of the noise.
        fine_steps: Steps of the reference in each segment, and the most that one can get.
        costs: What `flowkit.boss.step_costs` found on ``grids.blockwise(flow.edges, fine_steps)``,
            of the flow under guidance or to be used for several budgets; None finds them.

    Raises:
        ValueError: If prices are not one pair for each segment, the budget does not pay one step
            in each, or costs are of another grid.

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
            f"costs must be of the {len(fine)} times of grids.blockwise(edges, {fine_steps}), "
            f"got shape {tuple(costs.shape)}"
        )
    frontier = [(0.0, 0.0, ())]  # (price, error, grids) of the segments so far, none dominated
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
        raise ValueError(f"budget must pay a step in each segment, {least}, got {budget}")
    price, error, parts = frontier[-1]
    grid = torch.cat([fine[:1], *(times[1:] for times in parts)])
    return Allocation(grid, [len(times) - 1 for times in parts], error, price)


def _choices(costs: Tensor, fine: Tensor) -> list[tuple[float, Tensor]]:
    """Error and times of 1, 2, … steps."""
    found = []
    for n in range(1, len(fine)):
        times = bellman_grid(costs, fine, n)
        knots = torch.searchsorted(fine, times).tolist()
        found.append((sum(costs[i, j].item() for i, j in pairwise(knots)), times))
    return found


def _undominated(states: list, budget: float) -> list:
    """Those within the budget that no cheaper one beats, by rising price and falling error."""
    kept = []
    for state in sorted(states, key=lambda s: s[:2]):
        if state[0] <= budget * (1 + 1e-12) and (not kept or state[1] < kept[-1][1]):
            kept.append(state)
    return kept
