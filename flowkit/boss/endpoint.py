"""End-point grids: the least error of the sampler at the last time."""

import math
from itertools import product
from typing import cast

import torch
from torch import Tensor

from flowkit.boss.costs import (
    METHODS,
    SLOPES,
    anchors,
    check_num_steps,
    kind_of_step,
    make_field,
    round_off,
)
from flowkit.boss.precision import precise
from flowkit.checks import as_grid, check_choice
from flowkit.sampling import ODESampler
from flowkit.types import Cond, per_sample, take
from flowkit.velocity import Velocity

PROGRAM_NOISES = 64  # for the dynamic program; in experiments, more noises gave the same grids
SEARCH_WALKS = 8  # budget of the search, in solves on the whole fine grid


@torch.no_grad()
def endpoint_grid(
    velocity: Velocity,
    x0: Tensor,
    fine_grid: Tensor | int,
    num_steps: int,
    cond: Cond = None,
    *,
    method: str = "euler",
    reference: ODESampler | None = None,
) -> Tensor:
    """Return a grid of ``num_steps`` steps with a small error at the last time.

    The search has two parts. A dynamic program works on the sampler's *own* states. For every
    number of steps and every fine time, it keeps the sampler's state with the least distance to the
    reference's state at that time. From each kept state, one step goes to every later time. The
    second part starts from the better of this grid and the uniform grid. It moves one time after
    the other, over smaller and smaller distances, and keeps a move if the mean squared error at the
    last time falls.

    Args:
        velocity: The velocity, with guidance if the sampler uses guidance.
        x0: States ``(B, *)`` at the first time. The dynamic program uses the first 64 of them and
            holds their states at all fine times. The second part uses all of them.
        fine_grid: Times ``(n,)``, or the number ``n − 1`` of uniform steps.
        num_steps: Steps of the grid, from 1 to ``n − 1``.
        cond: Conditions of the states; one row serves all states.
        method: The solver: ``"euler"``, ``"midpoint"`` or ``"heun"``.
        reference: Reference solver. Its grid must contain all times of the fine grid. ``None``
            means the same method on the fine grid.

    Returns:
        Times ``(num_steps + 1,)`` in float64, a part of the fine grid.

    Raises:
        TypeError: If ``num_steps`` is not an integer.
        ValueError: If ``num_steps`` is out of range, the method is unknown, or a state of the
            reference is not finite.

    Source: Pei et al., *Optimal Stepsize for Diffusion Sampling*, 2025 (arXiv 2503.21774), for the
    dynamic program. The second part is an addition of flowkit.

    >>> from flowkit.exact import GaussianFlow
    >>> grid = endpoint_grid(GaussianFlow(2.0, 0.1), torch.randn(64, 1), 50, num_steps=4)
    >>> bool(grid[1] > 0.25)
    True
    """
    fine = as_grid(fine_grid, "fine_grid")
    check_num_steps(num_steps, fine)
    check_choice(method, METHODS, "method")
    last = len(fine) - 1
    if num_steps in (1, last):  # there is only one such grid
        return fine[:: last // num_steps]
    velocity, x0 = precise(velocity, x0)
    cond = per_sample(cond, len(x0))
    reference = reference or ODESampler(fine, method)
    target = anchors(velocity, x0, fine[[0, -1]], cond, reference)[-1]
    search = _Search(velocity, x0, cond, fine, method, target)
    even = [round(k * last / num_steps) for k in range(num_steps + 1)]
    if search.error(even) <= round_off(target):
        return fine[even]
    some = slice(0, PROGRAM_NOISES)
    found = _program(velocity, x0[some], take(cond, some), fine, method, reference, num_steps)
    return fine[search.improve(min(even, found, key=search.error))]


def _program(
    velocity: Velocity,
    x0: Tensor,
    cond: Cond,
    fine: Tensor,
    method: str,
    reference: ODESampler,
    num_steps: int,
) -> list[int]:
    """Return the grid of the dynamic program, as numbers of fine times."""
    teacher = anchors(velocity, x0, fine, cond, reference)
    kind = kind_of_step(velocity, cond, method)
    field, slope = make_field(velocity, x0, cond, fine, kind == "mean"), SLOPES[kind]
    times, last = fine.tolist(), len(fine) - 1
    states, parents = {0: x0}, []
    for step in range(1, num_steps + 1):
        first_end = last if step == num_steps else step
        last_end = last - (num_steps - step)
        errors, arrivals, parent = {}, {}, {}
        for k, x in states.items():
            t = times[k]
            v = field(x, t).clone()
            for j in range(max(first_end, k + 1), last_end + 1):
                h = times[j] - t
                y = x + h * slope(field, x, v, t, h)
                error = _mean_square(y - teacher[j])
                if j not in errors or error < errors[j]:
                    errors[j], arrivals[j], parent[j] = error, y, k
        states = arrivals
        parents.append(parent)
    knots = [last]
    for parent in reversed(parents):
        knots.append(parent[knots[-1]])
    return knots[::-1]


class _Search:
    """Coordinate search over grids by the error at the last time.

    A grid is a list ``knots`` of numbers of fine times.
    """

    def __init__(
        self,
        velocity: Velocity,
        x0: Tensor,
        cond: Cond,
        fine: Tensor,
        method: str,
        target: Tensor,
    ) -> None:
        self.velocity, self.x0, self.cond = velocity, x0, cond
        self.fine, self.method, self.target = fine, method, target

    def path(self, knots: list[int], x: Tensor) -> Tensor:
        """Return the sampler's states at the times of a grid, from ``x`` at its first time."""
        sampler = ODESampler(self.fine[knots], self.method)
        path = sampler.solve(self.velocity, x, self.cond, return_path=True).path
        return cast(Tensor, path)

    def error(self, knots: list[int]) -> float:
        """Return the mean squared error of a grid at the last time."""
        return _mean_square(self.path(knots, self.x0)[-1] - self.target)

    def improve(self, knots: list[int]) -> list[int]:
        """Move one time after the other while the error falls and steps remain in the budget."""
        num_steps, last = len(knots) - 1, len(self.fine) - 1
        path, left = self.path(knots, self.x0), min(num_steps, SEARCH_WALKS) * last
        best, reach = _mean_square(path[-1] - self.target), max(1, last // (2 * num_steps))
        improved = True
        while left > 0 and (improved or reach > 1):
            if not improved:
                reach //= 2
            improved = False
            for i, move in product(range(1, num_steps), (-reach, reach)):
                if left <= 0 or not knots[i - 1] < knots[i] + move < knots[i + 1]:
                    continue
                trial = [*knots[:i], knots[i] + move, *knots[i + 1 :]]
                rest = self.path(trial[i - 1 :], path[i - 1])  # earlier states do not change
                left -= len(rest) - 1
                error = _mean_square(rest[-1] - self.target)
                if error < best:
                    knots, best, improved = trial, error, True
                    path = torch.cat([path[: i - 1], rest])
        return knots


def _mean_square(x: Tensor) -> float:
    """Return the mean square; a state that is not finite has the value ``inf``."""
    found = torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2 / x.numel()
    return found if math.isfinite(found) else math.inf
