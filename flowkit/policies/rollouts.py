"""Episodes in a simulator: of scripted experts as demonstrations, of policies as measurements."""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.policies.environments import Environment
from flowkit.policies.metrics import action_change, jerk, success, timing
from flowkit.policies.receding import RecedingHorizon


class Demonstrated(NamedTuple):
    """Successful episodes of an expert, one after another."""

    arrays: dict[str, np.ndarray]
    """``obs (S, O)``, ``action (S, D)`` and ``episode_ends (E,)``, as a npz file holds them."""
    tried: int
    """Episodes tried."""


def demonstrate(
    env: Environment, num: int, style: str, seed: int = 0, tell: Callable[[int], Any] | None = None
) -> Demonstrated:
    """Record episodes of a scripted expert until ``num`` of them succeed.

    Args:
        env: The environment.
        num: Number of successful episodes, at least 1.
        style: Style of the expert.
        seed: The same seed gives the same episodes.
        tell: Called with the number of episodes so far.

    Raises:
        ValueError: If ``num`` is below 1, or fewer than a tenth of the episodes succeed.
    """
    check_at_least(num, 1, "num")
    obs: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    ends: list[int] = []
    tried = 0
    while len(ends) < num:
        if tried >= 10 * num + 10:
            raise ValueError(
                f"style must reach the goal in a tenth of the episodes, got {len(ends)} of {tried}"
            )
        own = seed_of("demonstrate", seed, tried)
        tried += 1
        seen, taken, reached = _episode(env, own, env.expert(style, own))
        if reached:
            obs += seen
            actions += taken
            ends.append(len(actions))
            if tell is not None:
                tell(len(ends))
    arrays = {
        "obs": np.asarray(obs, np.float32),
        "action": np.asarray(actions, np.float32),
        "episode_ends": np.asarray(ends, np.int64),
    }
    return Demonstrated(arrays, tried)


def _episode(
    env: Environment, seed: int, act: Callable[[np.ndarray], np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray], bool]:
    """Return observations, actions and success of an episode."""
    seen, taken, obs, done, reached = [], [], env.reset(seed), False, False
    while not done:
        action = np.asarray(act(obs), np.float32)
        seen.append(obs)
        taken.append(action)
        obs, done, reached = env.step(action)
    return seen, taken, reached


class Rollout(NamedTuple):
    """Episodes of a policy."""

    outcomes: list[bool]
    """Whether each episode succeeded."""
    actions: list[Tensor]
    """Actions ``(T, D)`` of each episode."""
    paths: list[list[dict[str, tuple[float, float]]]]
    """Places of hand, object and goal at each step of each episode."""
    ways: list[str | None]
    """The side each episode went by, for a task with two ways."""
    frames: list[np.ndarray]
    """Pictures of the first episodes, if there is a renderer."""
    solves: list[float]
    """Seconds of each solve."""
    seconds: float
    """Seconds of all episodes, with the environment."""

    def metrics(self) -> dict[str, Any]:
        """Return success, smoothness, rates and, for a task with two ways, their shares.

        Returns:
            ``success`` (value, Wilson's interval, episodes), ``steps`` of a successful episode,
            ``action_change``, ``jerk``, the numbers of `timing`, and ``left``, the share of the
            left among the successful episodes.
        """
        each = list(zip(self.outcomes, self.actions, self.ways, strict=True))
        lengths = [len(taken) for reached, taken, _ in each if reached]
        found: dict[str, Any] = {
            "success": success(self.outcomes),
            "steps": float(np.mean(lengths)) if lengths else None,
            "action_change": float(np.mean([action_change(taken) for taken in self.actions])),
            "jerk": float(np.mean([jerk(taken) for taken in self.actions])),
            **timing(self.solves, sum(map(len, self.actions)), self.seconds),
        }
        ways = [way for reached, _, way in each if reached and way is not None]
        if ways:
            found["left"] = ways.count("left") / len(ways)
        return found


def roll_out(
    env: Environment,
    control: RecedingHorizon,
    episodes: int,
    seed: int = 0,
    shown: int = 0,
    tell: Callable[[Sequence[bool]], Any] | None = None,
) -> Rollout:
    """Run a policy in an environment, from starts that follow from a seed.

    The starts differ from those of demonstrations of any seed.

    Args:
        env: The environment.
        control: The policy.
        episodes: Number of episodes, at least 1.
        seed: The same seed gives the same starts and the same noise.
        shown: Episodes to keep pictures of.
        tell: Called with the outcomes so far.

    Raises:
        ValueError: If there is no episode, or the policy's actions have another size.
    """
    check_at_least(episodes, 1, "episodes")
    outcomes, actions, paths, ways, frames = [], [], [], [], []
    control.reset()
    before, begun = len(control.seconds), time.perf_counter()
    for number in range(episodes):
        own, path = seed_of("rollout", seed, number), []
        control.reset(own)

        def act(obs: np.ndarray, path: list = path, number: int = number) -> np.ndarray:
            path.append(dict(env.points()))
            if number < shown and (frame := env.render()) is not None:
                frames.append(frame)
            action = control(obs).numpy()
            if action.shape != (env.action_size,):
                raise ValueError(
                    f"actions must have size {env.action_size} in {env.name}, got shape "
                    f"{action.shape}"
                )
            return action

        _, taken, reached = _episode(env, own, act)
        path.append(dict(env.points()))
        outcomes.append(reached)
        actions.append(torch.from_numpy(np.stack(taken)))
        paths.append(path)
        ways.append(env.way())
        if tell is not None:
            tell(outcomes)
    seconds = time.perf_counter() - begun
    return Rollout(outcomes, actions, paths, ways, frames, control.seconds[before:], seconds)


def seed_of(kind: str, seed: int, number: int) -> int:
    """Return the seed of an episode, in [0, 2³¹)."""
    digest = hashlib.sha256(f"{kind} {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
