"""Episodes in a simulator: of scripted experts as demonstrations, of policies as measurements."""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.policies.environments import Environment, Expert, picture
from flowkit.policies.metrics import action_change, jerk, success, timing
from flowkit.policies.receding import RecedingHorizon


class Demonstrated(NamedTuple):
    """Successful episodes of an expert, one after another."""

    arrays: dict[str, np.ndarray]
    """``obs (S, O)``, ``action (S, D)``, ``episode_ends (E,)`` and possibly ``image (S, H, W, 3)``,
    as a npz file holds them."""
    tried: int
    """Episodes tried."""


def demonstrate(
    env: Environment, num: int, style: str, seed: int = 0, image_size: int | None = None
) -> Demonstrated:
    """Record episodes of a scripted expert until ``num`` of them succeed.

    With pictures, ``obs`` holds only the robot's own place, the ``proprio`` of the environment: the
    rest is to be seen.

    Args:
        env: The environment.
        num: Number of successful episodes, at least 1.
        style: Style of the expert.
        seed: The same seed gives the same episodes.
        image_size: Side in pixels of a picture of each step; None for no pictures.

    Raises:
        ValueError: If ``num`` is below 1, or fewer than a tenth of the episodes succeed.
        RuntimeError: If pictures are asked for and there is no renderer.
    """
    check_at_least(num, 1, "num")
    obs: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    images: list[np.ndarray] = []
    ends: list[int] = []
    tried = 0
    while len(ends) < num:
        if tried >= 10 * num + 10:
            raise ValueError(
                f"style must reach the goal in a tenth of the episodes, got {len(ends)} of {tried}"
            )
        own = seed_of("demonstrate", seed, tried)
        tried += 1
        expert, shown = env.expert(style, own), []

        def act(obs: np.ndarray, expert: Expert = expert, shown: list = shown) -> np.ndarray:
            if image_size is not None:
                shown.append(picture(env, image_size))
            return expert(obs)

        seen, taken, reached = _episode(env, own, act)
        if reached:
            obs += seen
            actions += taken
            images += shown
            ends.append(len(actions))
    arrays = {
        "obs": np.asarray(obs, np.float32),
        "action": np.asarray(actions, np.float32),
        "episode_ends": np.asarray(ends, np.int64),
    }
    if image_size is not None:
        arrays |= {"obs": arrays["obs"][:, env.proprio], "image": np.stack(images)}
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
    radii: Mapping[str, float] = {}
    """Radii of hand, object and goal, for those that are round."""

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
    image_size: int | None = None,
) -> Rollout:
    """Run a policy in an environment, from starts that follow from a seed.

    The starts differ from those of demonstrations of any seed.

    Args:
        env: The environment.
        control: The policy.
        episodes: Number of episodes, at least 1.
        seed: The same seed gives the same starts and the same noise.
        shown: Episodes to keep pictures of.
        image_size: Side in pixels of the picture that the policy gets at each decoding, beside the
            robot's own place; None for a policy of the environment's observations.

    Raises:
        ValueError: If there is no episode, or the policy's actions have another size.
        RuntimeError: If the policy needs pictures and there is no renderer.
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
            seen: Any = obs
            if image_size is not None:
                seen = _with_picture(env, obs, image_size) if control.decodes else None
            action = control(seen).numpy()
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
    seconds, solves = time.perf_counter() - begun, control.seconds[before:]
    return Rollout(outcomes, actions, paths, ways, frames, solves, seconds, env.radii)


def _with_picture(env: Environment, obs: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Return what a policy with a camera knows: the robot's place, and a picture ``(3, H, W)``."""
    return {"vector": obs[list(env.proprio)], "image": picture(env, size).transpose(2, 0, 1)}


def seed_of(kind: str, seed: int, number: int) -> int:
    """Return the seed of an episode, in [0, 2³¹)."""
    digest = hashlib.sha256(f"{kind} {seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
