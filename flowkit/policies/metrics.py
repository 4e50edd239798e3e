"""Measures of rollouts: success, smoothness and time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowkit.metrics.intervals import wilson


def success(outcomes: Sequence[bool]) -> dict[str, Any]:
    """Return the share of successful episodes with Wilson's interval of 95 %.

    Raises:
        ValueError: If there is no episode.

    >>> success([True] * 8 + [False] * 2)
    {'value': 0.8, 'interval': [0.49..., 0.94...], 'episodes': 10}
    """
    if not outcomes:
        raise ValueError("outcomes must hold at least one episode, got none")
    share = sum(outcomes) / len(outcomes)
    return {
        "value": share,
        "interval": list(wilson(share, len(outcomes))),
        "episodes": len(outcomes),
    }


def action_change(actions: Tensor) -> float:
    """Return the mean length of ``a_{n+1} − a_n`` of actions ``(T, D)``; 0 for a single one.

    >>> action_change(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    5.0
    """
    return _mean_length(actions.diff(dim=0))


def jerk(actions: Tensor) -> float:
    """Return the mean length of the second difference of actions ``(T, D)``; 0 below three.

    For actions that are velocities, as those of most robots, it is the jerk in units of the step.

    >>> jerk(torch.tensor([[0.0], [1.0], [0.0]]))
    2.0
    """
    return _mean_length(actions.diff(dim=0).diff(dim=0))


def _mean_length(rows: Tensor) -> float:
    return rows.norm(dim=1).mean().item() if len(rows) else 0.0


def timing(solves: Sequence[float], steps: int, seconds: float) -> dict[str, float]:
    """Return rates and latencies of a rollout.

    Args:
        solves: Seconds of each solve.
        steps: Control steps.
        seconds: Seconds of the whole rollout, with the environment.

    Returns:
        ``control_hz`` and ``policy_hz``, control steps a second with and without the environment;
        ``chunks_hz``, chunks a second without it; ``latency_ms_50``, ``_95`` and ``_99``, the
        percentiles of the time of a solve.

    Raises:
        ValueError: If there is no solve.

    >>> timing([0.1, 0.1], steps=14, seconds=0.4)["policy_hz"]
    70.0
    """
    if not solves:
        raise ValueError("solves must hold at least one time, got none")
    times = torch.tensor(solves, dtype=torch.float64)
    total = times.sum().item()
    found = {
        "control_hz": steps / seconds,
        "policy_hz": steps / total,
        "chunks_hz": len(solves) / total,
    }
    for share in (50, 95, 99):
        found[f"latency_ms_{share}"] = 1e3 * times.quantile(share / 100).item()
    return found
