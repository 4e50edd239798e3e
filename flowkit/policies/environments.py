"""Simulated robots with scripted experts: the tasks of MetaWorld, and a reach around an obstacle.

Both need the extra ``robots``. All physics are MuJoCo's.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from flowkit.checks import check_choice

Expert = Callable[[np.ndarray], np.ndarray]
ENVIRONMENTS = ("metaworld", "obstacle")
STYLES = ("straight", "left", "right", "both")


class Environment(Protocol):
    """A task of a simulated robot, with states as observations."""

    name: str
    obs_size: int
    action_size: int
    max_steps: int

    def reset(self, seed: int) -> np.ndarray:
        """Begin an episode whose start follows from a seed; return its observation ``(O,)``."""
        ...

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool, bool]:
        """Take an action ``(D,)`` in [-1, 1]; return observation, whether it ends, and success."""
        ...

    def points(self) -> Mapping[str, tuple[float, float]]:
        """Return the places of hand, object and goal as seen from above."""
        ...

    def way(self) -> str | None:
        """Return the side that the episode went by, for a task with two ways."""
        ...

    def expert(self, style: str, seed: int) -> Expert:
        """Return a scripted expert of one episode, called as ``expert(obs) -> action``."""
        ...

    def render(self) -> np.ndarray | None:
        """Return a picture ``(H, W, 3)`` in bytes; None without a renderer."""
        ...


def environment(env: str, task: str | None = None) -> Environment:
    """Make an environment.

    Args:
        env: ``"metaworld"`` or ``"obstacle"``.
        task: Name of a task of MetaWorld, such as ``"push-v3"``; None for ``obstacle``.

    Raises:
        ValueError: If there is no such environment or task.
        ImportError: If its packages are not installed.
    """
    check_choice(env, ENVIRONMENTS, "env")
    try:
        if env == "metaworld":
            return MetaWorld(task)
        if task is not None:
            raise ValueError(f"task must be null for env=obstacle, which has one, got {task}")
        return Obstacle()
    except ImportError as error:
        raise ImportError(
            f"env={env} needs packages that are not installed ({error.name}); "
            "pip install 'flowkit-fm[robots]'"
        ) from error


class MetaWorld:
    """A task of MetaWorld: a Sawyer arm, four actions (motion of the hand, grip), 39 numbers seen.

    Object and goal are placed at random. The styles of its scripted experts are ways to the object:
    ``straight`` as MetaWorld's own, ``left`` and ``right`` by a point beside it, ``both`` one of
    these at random.

    Args:
        task: Name of the task, such as ``"push-v3"``.

    Raises:
        ValueError: If there is no such task.
    """

    obs_size, action_size, max_steps = 39, 4, 200
    BESIDE = 0.15  # meters from the object to the point beside it

    def __init__(self, task: str | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages that it imports
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as TASKS
            from metaworld.policies import ENV_POLICY_MAP

            names = sorted(name.removesuffix("-goal-observable") for name in TASKS)
            check_choice(task, names, "task")
            make: Any = TASKS[f"{task}-goal-observable"]
            self.robot: Any = make(seed=0)
        self.robot._freeze_rand_vec, self.robot.seeded_rand_vec = False, True
        self.name, self._scripted = f"metaworld {task}", ENV_POLICY_MAP[str(task)]
        self._renderer = _Renderer("corner2")

    def reset(self, seed: int) -> np.ndarray:
        """Begin an episode."""
        self.robot.seed(seed)
        self._steps, self._obs = 0, self.robot.reset()[0]
        return self._obs

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool, bool]:
        """Take an action; an episode ends with success, or after 200 steps."""
        self._obs, *_, info = self.robot.step(np.clip(action, -1, 1).astype(np.float32))
        self._steps += 1
        success = bool(info["success"])
        return self._obs, success or self._steps >= self.max_steps, success

    def points(self) -> dict[str, tuple[float, float]]:
        """Return the places of hand, object and goal, without height."""
        obs = self._obs
        parts = {"hand": obs[:2], "object": obs[4:6], "goal": obs[-3:-1]}
        return {name: (float(x), float(y)) for name, (x, y) in parts.items()}

    def way(self) -> None:
        """There is no side to go by."""
        return

    def expert(self, style: str, seed: int) -> Expert:
        """Return MetaWorld's expert, by a point beside the object if the style says so."""
        side, scripted = _side(style, seed), self._scripted()
        beside = side == 0

        def act(obs: np.ndarray) -> np.ndarray:
            nonlocal beside
            point = obs[4:7] + np.array([side * self.BESIDE, 0, 0.15])
            away = point - obs[:3]
            beside = beside or np.linalg.norm(away) < 0.03
            if beside:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of actions beyond the limits, clipped here
                    return np.clip(scripted.get_action(obs), -1, 1)
            return np.append(np.clip(10 * away, -1, 1), -1)

        return act

    def render(self) -> np.ndarray | None:
        """Return the picture of a camera."""
        return self._renderer(self.robot.model, self.robot.data)


OBSTACLE = """
<mujoco>
  <option timestep="0.005" gravity="0 0 0"/>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="above" pos="0 0 1.6"/>
    <geom type="plane" size="1 1 .1" pos="0 0 -.05" contype="0" conaffinity="0"/>
    <geom name="obstacle" type="cylinder" size=".18 .05" rgba=".4 .4 .4 1"/>
    <body name="hand">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <geom name="hand" type="sphere" size=".04" mass="1" rgba=".2 .4 .9 1"/>
    </body>
    <site name="goal" size=".05" rgba=".2 .8 .3 1"/>
  </worldbody>
  <actuator>
    <velocity joint="x" kv="20"/>
    <velocity joint="y" kv="20"/>
  </actuator>
</mujoco>
"""


class Obstacle:
    """A hand in a plane reaches a goal behind a round obstacle, on either side of it.

    An action is a velocity ``(2,)`` in units of 0.6 m/s, at 20 Hz; an observation is the hand's
    place and velocity, and the goal's place. Touching the obstacle ends the episode, so both ways
    are right and their mean is wrong. The expert goes left or right, or at random (``both``).
    """

    name, obs_size, action_size, max_steps = "obstacle", 6, 2, 80
    SPEED, SUBSTEPS = 0.6, 10

    def __init__(self) -> None:
        import mujoco

        self._mujoco: Any = mujoco
        self.model: Any = self._mujoco.MjModel.from_xml_string(OBSTACLE)
        self.data: Any = self._mujoco.MjData(self.model)
        self._renderer = _Renderer("above")

    def reset(self, seed: int) -> np.ndarray:
        """Begin an episode: the hand on the left, the goal on the right, near the middle line."""
        rng = np.random.default_rng(seed)
        self._mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = [-0.5, rng.uniform(-0.05, 0.05)]
        self.goal = np.array([0.5, rng.uniform(-0.05, 0.05)])
        self.model.site_pos[0, :2] = self.goal
        self._mujoco.mj_forward(self.model, self.data)
        self._steps, self._way = 0, None
        return self._observed()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool, bool]:
        """Take an action; an episode ends at the goal, at the obstacle, or after 80 steps."""
        self.data.ctrl[:] = self.SPEED * np.clip(action, -1, 1)
        before, touched = float(self.data.qpos[0]), False
        for _ in range(self.SUBSTEPS):
            self._mujoco.mj_step(self.model, self.data)
            touched = touched or bool(self.data.ncon)
        self._steps += 1
        if before < 0 <= self.data.qpos[0]:
            self._way = "left" if self.data.qpos[1] > 0 else "right"
        success = not touched and float(np.linalg.norm(self.goal - self.data.qpos)) < 0.05
        return self._observed(), touched or success or self._steps >= self.max_steps, success

    def points(self) -> dict[str, tuple[float, float]]:
        """Return the places of hand, obstacle and goal."""
        x, y = self.data.qpos
        return {"hand": (float(x), float(y)), "object": (0.0, 0.0), "goal": tuple(self.goal)}

    def way(self) -> str | None:
        """Return the side that the hand passed the obstacle by, as seen from the start."""
        return self._way

    def expert(self, style: str, seed: int) -> Expert:
        """Return an expert that goes by a point beside the obstacle."""
        if style == "straight":
            raise ValueError("style must be left, right or both for env=obstacle, got straight")
        side, rng = _side(style, seed), np.random.default_rng(seed)
        point = np.array([0.05, side * rng.uniform(0.3, 0.36)])

        def act(obs: np.ndarray) -> np.ndarray:
            place, goal = obs[:2], obs[4:]
            away = (point if place[0] < 0 else goal) - place
            distance = float(np.linalg.norm(away))
            return away / max(distance, 1e-6) * min(1.0, 6 * distance)

        return act

    def render(self) -> np.ndarray | None:
        """Return the picture of a camera above."""
        return self._renderer(self.model, self.data)

    def _observed(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel, self.goal])


class _Renderer:
    """MuJoCo's renderer, if the user chose one by ``MUJOCO_GL`` or has a screen."""

    def __init__(self, camera: str) -> None:
        self.camera, self.renderer = camera, None
        self.wanted = bool(os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY"))

    def __call__(self, model: Any, data: Any) -> np.ndarray | None:
        if not self.wanted:
            return None
        if self.renderer is None:
            import mujoco

            with suppress(Exception):  # whatever the graphics library raises
                self.renderer = mujoco.Renderer(model, 240, 320)
        if self.renderer is None:
            self.wanted = False
            return None
        self.renderer.update_scene(data, self.camera)
        return self.renderer.render()


def _side(style: str, seed: int) -> int:
    """Return 1 for the left, −1 for the right and 0 for straight; draw one for both."""
    check_choice(style, STYLES, "style")
    drawn = 1 - 2 * int(np.random.default_rng([seed, 1]).integers(2))
    return {"straight": 0, "left": 1, "right": -1, "both": drawn}[style]
