"""Choice among grids, and segments of trajectories for straightening.

Source: Nguyen et al., *Bellman Optimal Step-size Straightening of Flow-Matching Models*, 2024
(arXiv 2312.16414). The Bellman grid of the paper minimizes the sum of single-step errors, each step
from the reference's own state. This sum is not the error at the last time: trajectories that
converge reduce early errors, and trajectories that diverge increase early errors. So a second grid
minimizes the error at the last time. `optimize_grid` compares both grids and the uniform grid on
noise samples that made neither grid.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.boss.bellman import bellman_grid
from flowkit.boss.costs import (
    SLOPES,
    anchors,
    check_num_steps,
    chunks,
    round_off,
    rows_per_step,
    step_costs,
)
from flowkit.boss.endpoint import PROGRAM_NOISES, SEARCH_WALKS, endpoint_grid
from flowkit.boss.guard import LEVEL, is_gain, is_noise
from flowkit.boss.precision import precise
from flowkit.checks import as_grid, check_at_least, check_choice, check_finite, check_integer
from flowkit.sampling import ODESampler
from flowkit.types import Batch, Cond, per_sample, take
from flowkit.velocity import Velocity

EXTRA_NOISES = 2048  # a loss in 1 % of samples is then seen 20 times
SEED = 2_312_164_140  # of the extra noises: no seed that the noises in x0 are likely to have


class OptimizedGrid(NamedTuple):
    """Result of `optimize_grid`.

    ``grid``: times of the best grid. ``winner``: ``"uniform"``, ``"bellman"`` or ``"endpoint"``.
    ``scores``: error of each grid on held-out noise samples. ``grids``: all three grids.
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
    """Return the error of each grid at the last time: RMSE per element to the reference.

    Use noise samples that did not make the grids.

    Args:
        velocity: The velocity.
        x0: States ``(B, *)`` at the first time of the grids.
        grids: Grids by name, with common ends.
        cond: Conditions of the states; one row serves all states.
        method: Solver of the grids.
        reference: Reference solver. ``None`` means 100 uniform steps of the same method.

    Returns:
        The root mean square error of each grid, by name. Errors below round-off are 0.

    Raises:
        ValueError: If there are no grids, or the ends of a grid or of the reference differ.

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
    """Return the mean squared errors ``(B,)`` of each grid at the last time."""
    if not grids:
        raise ValueError("grids must hold at least one grid, got an empty mapping")
    samplers = {name: ODESampler(grid, method) for name, grid in grids.items()}
    first, last = next(iter(samplers.values())).times[[0, -1]]
    if reference is None:
        reference = ODESampler(torch.linspace(first, last, 101, dtype=torch.float64), method)
    for name, sampler in {**samplers, "reference": reference}.items():
        if not torch.allclose(
            sampler.times[[0, -1]], torch.stack([first, last]), rtol=0, atol=1e-9
        ):
            raise ValueError(
                f"grids must run from {first:.6g} to {last:.6g} like the first grid, got "
                f"{sampler.times[0]:.6g} to {sampler.times[-1]:.6g} for {name!r}"
            )
    velocity, x0 = precise(velocity, x0)
    cond = per_sample(cond, len(x0))
    target = reference(velocity, x0, cond)
    check_finite(target, "the solution on the reference grid")
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
    baseline: Tensor | None = None,
    extra_noises: int | None = None,
    generator: torch.Generator | None = None,
) -> OptimizedGrid:
    """Make the uniform, the Bellman and the end-point grid, and return the best of them.

    Two thirds of the noise samples make the grids. The last third and ``extra_noises`` new samples
    are held out; they give the scores. A grid other than the uniform grid wins only if a one-sided
    bootstrap-t test finds that its mean squared error on them is less. The level of the test is
    5 %, half for each of the two grids, so about 5 % of searches, or fewer, return a grid that is
    worse than the uniform grid. No test knows of losses in samples so rare that the ``n``
    held-out samples may lack them: fewer than ``3 / n`` of all.

    Each held-out sample costs one solve of the reference and three of ``num_steps`` steps; see
    `search_rows`.

    The error at the last time measures the distance between samples and the reference's samples. It
    does not measure the quality of images. To choose by quality, compare distributions on all
    ``grids``, as the command ``flowkit boss metric=classifier`` does.

    Args:
        velocity: The velocity, with guidance if the sampler uses guidance.
        x0: States ``(B, *)`` at the first time, at least 6; hundreds give a stable choice.
        num_steps: Steps of the grid, from 1 to the number of fine steps.
        cond: Conditions of the states; one row serves all states.
        method: The solver: ``"euler"``, ``"midpoint"`` or ``"heun"``.
        fine_steps: A number of uniform steps from 0 to 1, or another fine grid; the fine grid may
            cover a part of [0, 1].
        reference: Reference solver. Its grid must contain all times of the fine grid. ``None``
            means the same method on the fine grid.
        costs: Costs ``(n, n)`` of single steps, if they are already known; see `step_costs`.
        baseline: Another grid of ``num_steps`` steps in the place of the uniform grid, with the
            same ends; its name is ``"baseline"``. Give the grid that you sample with today.
        extra_noises: Number of standard normal noise samples that are drawn for the scores, in
            batches of at most two thirds of ``x0``, each row with the condition of the row of
            ``x0``. Use 0 if ``x0`` has another distribution; then only its last third can give the
            scores. ``None`` means 2048 if the grid starts at 0 and ``x0`` passes for standard
            normal noise, and 0 otherwise.
        generator: Source of these samples and of the test. ``None`` means a fixed seed, so that
            equal arguments give equal results.

    Returns:
        The best grid, its name, and the scores and times of all three grids.

    Raises:
        TypeError: If ``num_steps`` or ``extra_noises`` is not an integer.
        ValueError: If ``num_steps`` is out of range, ``x0`` holds fewer than 6 noise samples,
            ``baseline`` has another number of steps, or ``extra_noises`` is negative, or positive
            for a grid that does not start at 0.

    >>> from flowkit.exact import GaussianFlow
    >>> optimize_grid(GaussianFlow(2.0, 0.1), torch.randn(96, 2), num_steps=4).winner
    'endpoint'
    """
    fine = as_grid(fine_steps, "fine_steps")
    check_num_steps(num_steps, fine)
    check_at_least(len(x0), 6, "the number of noises in x0")
    extra = _check_extra(extra_noises, x0, fine)
    first, first_grid = _first_grid(baseline, fine, num_steps)
    generator = generator or torch.Generator().manual_seed(SEED)
    cond = per_sample(cond, len(x0))
    made, kept = slice(0, len(x0) * 2 // 3), slice(len(x0) * 2 // 3, len(x0))
    options = {"method": method, "reference": reference}
    x, c = x0[made], take(cond, made)
    if costs is None:
        costs = step_costs(velocity, x, fine, c, **options)
    grids = {
        first: first_grid,
        "bellman": bellman_grid(costs, fine, num_steps),
        "endpoint": endpoint_grid(velocity, x, fine, num_steps, c, **options),
    }
    goal = reference or ODESampler(fine, method)
    held_out = [(x0[kept], take(cond, kept)), *_extra_noises(x0, cond, extra, generator)]
    parts = [_end_errors(velocity, x, grids, c, method, goal) for x, c in held_out]
    errors = {name: torch.cat([part[name] for part in parts]) for name in grids}
    gains = {other: errors[first] - errors[other] for other in ("bellman", "endpoint")}
    sure = {n: g.mean().item() for n, g in gains.items() if is_gain(g, LEVEL / 2, generator)}
    winner = max(sure, key=lambda name: sure[name], default=first)
    scores = {name: error.mean().sqrt().item() for name, error in errors.items()}
    return OptimizedGrid(grids[winner], winner, scores, grids)


def _first_grid(baseline: Tensor | None, fine: Tensor, num_steps: int) -> tuple[str, Tensor]:
    """Return the name and the times of the grid that another grid must beat."""
    if baseline is None:
        return "uniform", torch.linspace(fine[0], fine[-1], num_steps + 1, dtype=torch.float64)
    grid = as_grid(baseline, "baseline")
    if len(grid) != num_steps + 1:
        raise ValueError(f"baseline must have {num_steps} steps, got {len(grid) - 1}")
    return "baseline", grid


def _extra_noises(
    x0: Tensor, cond: Cond, count: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Cond]]:
    """Yield ``count`` noise samples like ``x0 (B, *)``, with the conditions of its rows in turn."""
    for first in range(0, count, len(x0)):
        noise = torch.randn(x0.shape, generator=generator, device=generator.device).to(x0)
        for rows in chunks(0, min(len(x0), count - first), len(x0) * 2 // 3):
            yield noise[rows], take(cond, rows)


def _check_extra(extra_noises: int | None, x0: Tensor, fine: Tensor) -> int:
    """Return the number of extra noises; require that they have the distribution of ``x0``."""
    starts_at_noise = fine[0].item() == 0
    if extra_noises is None:
        return EXTRA_NOISES if starts_at_noise and is_noise(x0) else 0
    check_integer(extra_noises, "extra_noises", 0)
    if extra_noises and not starts_at_noise:
        raise ValueError(
            f"extra_noises must be 0 for a grid that starts at t = {fine[0].item():.6g}, "
            f"got {extra_noises}; its states are not noise"
        )
    return extra_noises


def search_rows(
    num_noises: int,
    num_steps: int,
    *,
    method: str = "euler",
    fine_steps: int = 100,
    extra_noises: int = EXTRA_NOISES,
) -> dict[str, int]:
    """Return the number of velocity rows of `optimize_grid`, by part.

    Args:
        num_noises: Number of samples in ``x0``.
        num_steps: Steps of the grid.
        method: Solver, as for `optimize_grid`, or ``"mean"`` for Euler steps by a mean velocity.
        fine_steps: Steps of the fine grid, which is also the reference.
        extra_noises: Number of noise samples that `optimize_grid` draws.

    Returns:
        ``costs`` (exact), ``endpoint`` (upper bound) and ``scores`` (exact). A guided velocity
        computes twice as many network rows.

    Raises:
        ValueError: If the method is unknown.

    >>> search_rows(96, num_steps=8)
    {'costs': 6400, 'endpoint': 108224, 'scores': 257920}
    """
    check_choice(method, tuple(SLOPES), "method")
    n, made, per_step = fine_steps, num_noises * 2 // 3, rows_per_step(method)
    costs, program, search = n, 0, 0
    if method != "euler":
        costs += per_step * n + n * (n + 1) // 2
    if 1 < num_steps < n:
        # The dynamic program holds `width` states at a time. A slope that depends on both ends is
        # evaluated for every pair of times.
        width = n - num_steps + 1
        program = per_step * n + 1 + (num_steps - 1) * width
        if method != "euler":
            program += 2 * width + (num_steps - 2) * width * (width + 1) // 2
        # The reference, the first grids, and a search that may exceed its budget by a solve.
        search = per_step * (n + 5 * num_steps - 1 + min(num_steps, SEARCH_WALKS) * n)
    scores = per_step * (3 * num_steps + n)
    return {
        "costs": made * costs,
        "endpoint": min(made, PROGRAM_NOISES) * program + made * search,
        "scores": (num_noises - made + extra_noises) * scores,
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
    """Return the chords of a teacher's trajectories between the times of a grid.

    The teacher solves on the joint times of the fine grid and the grid. A student trained on the
    chords (see `flowkit.modules.Straightening`) reaches the teacher's last state in the few Euler
    steps of the grid.

    Args:
        velocity: The teacher.
        x0: States ``(B, *)`` at the first time of the grid.
        fine_grid: Times of the teacher, or a number of uniform steps.
        grid: Times ``(K + 1,)`` of the student, or a number of uniform steps.
        cond: Conditions of the states; one row serves all states.
        method: Solver of the teacher.

    Returns:
        A batch with ``x0``, ``x1`` ``(B·K, *)``, ``t0``, ``t1`` ``(B·K,)`` and ``cond``. The ``K``
        segments of one trajectory are in succession. States are in float32 at least.

    Raises:
        ValueError: If a grid does not increase within [0, 1], or a state is not finite.

    Source: Nguyen et al., 2024 (arXiv 2312.16414), its straightening.

    >>> from flowkit.exact import GaussianFlow
    >>> batch = segments(GaussianFlow(2.0, 0.5), torch.randn(3, 1), 100, grid=4)
    >>> batch["x0"].shape, batch["t1"][:4]
    (torch.Size([12, 1]), tensor([0.2500, 0.5000, 0.7500, 1.0000]))
    """
    fine, knots = as_grid(fine_grid, "fine_grid"), as_grid(grid)
    velocity, x0 = precise(velocity, x0)
    cond = per_sample(cond, len(x0))
    inside = fine[(fine > knots[0]) & (fine < knots[-1])]
    teacher = ODESampler(torch.cat([knots, inside]).unique(), method)
    states = anchors(velocity, x0, knots, cond, teacher).transpose(0, 1)
    count, times = len(knots) - 1, knots.to(x0.dtype)
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
