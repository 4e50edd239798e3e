"""BOSS: which times a solver of few steps should stop at, and segments to straighten between.

Source: Nguyen et al., *Bellman Optimal Step-size Straightening of Flow-Matching Models*, 2024
(arXiv 2312.16414). Its grid minimizes the sum of single steps' errors, each from the reference's
own state. That is not the error at the end: where trajectories contract, early errors heal, and
where they part, early errors grow. So a second grid is sought by the error at the end itself, and
`optimize_grid` lets both compete with the uniform grid on noise that neither has seen.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.boss.bellman import BellmanInterval, bellman_grid, bellman_interval, converged_costs
from flowkit.boss.costs import SLOPES, anchors, check_num_steps, round_off, step_costs
from flowkit.boss.endpoint import PROGRAM_NOISES, SEARCH_WALKS, endpoint_grid
from flowkit.checks import as_grid, check_at_least, check_choice
from flowkit.sampling import ODESampler
from flowkit.types import Batch, Cond, take
from flowkit.velocity import Velocity

__all__ = [
    "BellmanInterval",
    "OptimizedGrid",
    "bellman_grid",
    "bellman_interval",
    "converged_costs",
    "endpoint_grid",
    "optimize_grid",
    "score_grids",
    "search_rows",
    "segments",
    "step_costs",
]


class OptimizedGrid(NamedTuple):
    """What `optimize_grid` returns.

    ``grid``: the winner's times. ``winner``: ``"uniform"``, ``"bellman"`` or ``"endpoint"``.
    ``scores``: the error of each on held-out noise. ``grids``: all three.
    """

    grid: Tensor
    winner: str
    scores: dict[str, float]
    grids: dict[str, Tensor]


@torch.no_grad()
def score_grids(
    velocity: Velocity,
    x0: Tensor,
    grids: Mapping[str, Tensor],
    cond: Cond = None,
    *,
    method: str = "euler",
    reference: ODESampler | None = None,
) -> dict[str, float]:
    """Return each grid's error at the end: root mean square per element to the reference.

    Use noise that the grids were not made with.

    Args:
        velocity: The field.
        x0: States ``(B, *)`` at the grids' first time.
        grids: Grids by name, with common ends.
        cond: Conditions of the states.
        method: The solver that runs on the grids.
        reference: What it is compared with; None takes 100 uniform steps of the same method.

    Raises:
        ValueError: If there are no grids, or their ends or the reference's differ.

    >>> from flowkit.exact import GaussianFlow
    >>> from flowkit.grids import uniform
    >>> flow, x0 = GaussianFlow(2.0, 0.5), torch.randn(64, 1)
    >>> scores = score_grids(flow, x0, {"4": uniform(4), "8": uniform(8)})
    >>> scores["8"] < scores["4"]
    True
    """
    errors = _end_errors(velocity, x0, grids, cond, method, reference)
    return {name: error.mean().sqrt().item() for name, error in errors.items()}


def _end_errors(
    velocity: Velocity,
    x0: Tensor,
    grids: Mapping[str, Tensor],
    cond: Cond,
    method: str,
    reference: ODESampler | None,
) -> dict[str, Tensor]:
    """Mean squares ``(B,)`` of each grid's errors at the end."""
    if not grids:
        raise ValueError("grids must hold at least one grid, got none")
    samplers = {name: ODESampler(grid, method) for name, grid in grids.items()}
    first, last = next(iter(samplers.values())).times[[0, -1]]
    if reference is None:
        reference = ODESampler(torch.linspace(first, last, 101, dtype=torch.float64), method)
    for name, sampler in {**samplers, "reference": reference}.items():
        if not torch.allclose(
            sampler.times[[0, -1]], torch.stack([first, last]), rtol=0, atol=1e-9
        ):
            raise ValueError(
                f"grids must run from {first:.6g} to {last:.6g} like the first, got "
                f"{sampler.times[0]:.6g} to {sampler.times[-1]:.6g} for {name!r}"
            )
    target = reference(velocity, x0, cond)
    errors = {
        name: (sampler(velocity, x0, cond) - target).double().square().flatten(1).mean(1).cpu()
        for name, sampler in samplers.items()
    }
    floor = round_off(target)
    return {name: torch.where(e.mean() <= floor, 0.0, e) for name, e in errors.items()}


@torch.no_grad()
def optimize_grid(
    velocity: Velocity,
    x0: Tensor,
    num_steps: int,
    cond: Cond = None,
    *,
    method: str = "euler",
    fine_steps: Tensor | int = 100,
    reference: ODESampler | None = None,
    costs: Tensor | None = None,
) -> OptimizedGrid:
    """Make the uniform, the Bellman and the end-point grid, and return the best of them.

    Two thirds of the noises make the grids, the last third scores them. Another grid than the
    uniform one wins only if it is better by more than the standard error of the difference.
    See `search_rows` for what it costs.

    The error at the end says how close samples are to the reference's, which is not how good they
    look: where that matters compare distributions on all ``grids``, as ``flowkit boss
    metric=classifier`` does.

    Args:
        velocity: The field; guide it first if it is to be sampled with guidance.
        x0: States ``(B, *)`` at the first time, 6 or more; hundreds make a steady choice.
        num_steps: Steps of the grid.
        cond: Conditions of the states.
        method: The solver: ``"euler"``, ``"midpoint"`` or ``"heun"``.
        fine_steps: A number of uniform steps from 0 to 1, or another fine grid, of a part too.
        reference: The solver to be close to; its grid must hold all times of the fine grid. None
            takes the method itself on the fine grid.
        costs: The costs of single steps where they are known already.

    Raises:
        ValueError: If ``num_steps`` is out of range or there are fewer than 6 noises.

    >>> from flowkit.exact import GaussianFlow
    >>> optimize_grid(GaussianFlow(2.0, 0.1), torch.randn(96, 2), num_steps=4).winner
    'endpoint'
    """
    fine = as_grid(fine_steps, "fine_steps")
    check_num_steps(num_steps, fine)
    check_at_least(len(x0), 6, "the number of noises in x0")
    made, kept = slice(0, len(x0) * 2 // 3), slice(len(x0) * 2 // 3, len(x0))
    options = {"method": method, "reference": reference}
    x, c = x0[made], take(cond, made)
    if costs is None:
        costs = step_costs(velocity, x, fine, c, **options)
    grids = {
        "uniform": torch.linspace(fine[0], fine[-1], num_steps + 1, dtype=torch.float64),
        "bellman": bellman_grid(costs, fine, num_steps),
        "endpoint": endpoint_grid(velocity, x, fine, num_steps, c, **options),
    }
    goal = reference or ODESampler(fine, method)
    errors = _end_errors(velocity, x0[kept], grids, take(cond, kept), method, goal)
    gains = {name: errors["uniform"] - error for name, error in errors.items()}
    better = {n: g.mean().item() for n, g in gains.items() if g.mean() > g.std() / len(g) ** 0.5}
    winner = max(better, key=lambda name: better[name], default="uniform")
    scores = {name: error.mean().sqrt().item() for name, error in errors.items()}
    return OptimizedGrid(grids[winner], winner, scores, grids)


def search_rows(
    num_noises: int, num_steps: int, *, method: str = "euler", fine_steps: int = 100
) -> dict[str, int]:
    """Return how many velocity rows `optimize_grid` takes at most, by part.

    Args:
        num_noises: Samples in ``x0``.
        num_steps: Steps of the grid.
        method: As for `optimize_grid`.
        fine_steps: Steps of the fine grid, which is also the reference.

    Returns:
        ``costs`` (exactly), ``endpoint`` (at most) and ``scores``. A guided velocity takes twice
        as many network rows.

    >>> search_rows(96, num_steps=8)
    {'costs': 6400, 'endpoint': 107776, 'scores': 3968}
    """
    check_choice(method, SLOPES, "method")
    n, per_step, made = fine_steps, 1 if method == "euler" else 2, num_noises * 2 // 3
    costs, program, search = n, 0, 0
    if method != "euler":
        costs += 2 * n + n * (n + 1) // 2
    if 1 < num_steps < n:
        # The program holds this many states at a time; a slope that knows both ends is taken
        # for every pair of them.
        width = n - num_steps + 1
        program = per_step * n + 1 + (num_steps - 1) * width
        if method != "euler":
            program += 2 * width + (num_steps - 2) * width * (width + 1) // 2
        # The reference, the starts, and the search that may end within a solve.
        search = per_step * (n + 4 * num_steps + min(num_steps, SEARCH_WALKS) * n)
    scores = per_step * (3 * num_steps + n)
    return {
        "costs": made * costs,
        "endpoint": min(made, PROGRAM_NOISES) * program + made * search,
        "scores": (num_noises - made) * scores,
    }


@torch.no_grad()
def segments(
    velocity: Velocity,
    x0: Tensor,
    fine_grid: Tensor | int,
    grid: Tensor | int,
    cond: Cond = None,
    *,
    method: str = "euler",
) -> Batch:
    """Return the chords of the teacher's trajectories between the times of a grid.

    The teacher solves on the fine grid together with the grid's own times. A student trained on
    the chords (see `flowkit.modules.Straightening`) reaches the teacher's end in the grid's few
    Euler steps.

    Source: Nguyen et al. 2024 (arXiv 2312.16414), its straightening.

    Args:
        velocity: The teacher.
        x0: States ``(B, *)`` at the grid's first time.
        fine_grid: The teacher's times, or a number of uniform steps.
        grid: The student's times ``(K + 1,)``, or a number of uniform steps.
        cond: Conditions of the states.
        method: The teacher's solver.

    Returns:
        ``x0``, ``x1`` ``(B·K, *)`` and ``t0``, ``t1`` ``(B·K,)``, and ``cond``; the ``K`` segments
        of a trajectory follow each other.

    >>> from flowkit.exact import GaussianFlow
    >>> batch = segments(GaussianFlow(2.0, 0.5), torch.randn(3, 1), 100, grid=4)
    >>> batch["x0"].shape, batch["t1"][:4]
    (torch.Size([12, 1]), tensor([0.2500, 0.5000, 0.7500, 1.0000]))
    """
    fine, knots = as_grid(fine_grid, "fine_grid"), as_grid(grid)
    inside = fine[(fine > knots[0]) & (fine < knots[-1])]
    teacher = ODESampler(torch.cat([knots, inside]).unique(), method)
    states = anchors(velocity, x0, knots, cond, teacher).transpose(0, 1)
    count, times = len(knots) - 1, knots.to(torch.promote_types(x0.dtype, torch.float32))
    batch = Batch(
        x0=states[:, :-1].flatten(0, 1),
        x1=states[:, 1:].flatten(0, 1),
        t0=times[:-1].to(x0.device).repeat(len(x0)),
        t1=times[1:].to(x0.device).repeat(len(x0)),
    )
    if isinstance(cond, Mapping):
        batch["cond"] = {k: v.repeat_interleave(count, 0) for k, v in cond.items()}
    elif cond is not None:
        batch["cond"] = cond.repeat_interleave(count, 0)
    return batch
