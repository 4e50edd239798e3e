"""Chunks of actions: windows of episodes, masked behind the end."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.types import Batch

Episode = Mapping[str, Tensor]
"""An episode: ``obs (T, O)``, ``action (T, D)``, and possibly ``image (T, C, H, W)`` in bytes."""


def chunks(episode: Episode, horizon: int = 14, future: bool = False) -> Batch:
    """Cut an episode into a chunk of actions for each of its steps.

    Chunk ``n`` holds the actions ``a_n, …, a_{n+H−1}``. What would lie behind the end of the
    episode is 0 and masked: it is neither in the loss nor seen by the network.

    Args:
        episode: ``obs (T, O)`` and ``action (T, D)``, and possibly ``image (T, C, H, W)``.
        horizon: Actions ``H`` of a chunk, at least 1. Episodes may be shorter.
        future: Whether the condition also holds the observation after the chunk.

    Returns:
        ``x1 (T, D, H)``, ``mask (T, 1, H)`` for the loss, and the conditions: ``vector (T, O)``,
        the observation; ``frame_mask (T, H)``; with images ``image``; with ``future`` also
        ``future (T, O)``, the observation ``H`` steps later, or the last one of the episode.

    Raises:
        ValueError: If the horizon is below 1, or the parts differ in length.

    >>> episode = {"obs": torch.zeros(3, 2), "action": torch.tensor([[1.0], [2.0], [3.0]])}
    >>> batch = chunks(episode, horizon=2)
    >>> batch["x1"].tolist(), batch["mask"].int().tolist()
    ([[[1.0, 2.0]], [[2.0, 3.0]], [[3.0, 0.0]]], [[[1, 1]], [[1, 1]], [[1, 0]]])
    """
    check_at_least(horizon, 1, "horizon")
    count = len(episode["obs"])
    for name, part in episode.items():
        if len(part) != count:
            raise ValueError(
                f"{name} of an episode must have {count} steps like obs, got {len(part)}"
            )
    return windows(episode, torch.full((count,), count), torch.arange(count), horizon, future)


def windows(
    steps: Episode, ends: Tensor, rows: Tensor, horizon: int, future: bool = False
) -> Batch:
    """Return the chunks that begin at some steps of episodes that follow one another.

    Args:
        steps: The parts of all episodes, with one row per step.
        ends: For each step, the position behind the last step of its episode.
        rows: The steps ``(N,)``.
        horizon: Actions of a chunk.
        future: As in `chunks`.
    """
    end = ends[rows][:, None]
    places = rows[:, None] + torch.arange(horizon)
    inside = places < end
    last = torch.minimum(places, end - 1)
    actions = steps["action"][last].masked_fill(~inside[..., None], 0).transpose(1, 2)
    cond = {"vector": steps["obs"][rows], "frame_mask": inside}
    if "image" in steps:
        cond["image"] = steps["image"][rows]
    if future:
        cond["future"] = steps["obs"][torch.minimum(rows + horizon, ends[rows] - 1)]
    return cast(Batch, {"x1": actions, "mask": inside[:, None].float(), "cond": cond})
