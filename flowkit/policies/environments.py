"""Simulated robots with scripted experts: the tasks of MetaWorld, and a reach around an obstacle.

Both need the extra ``robots``. All physics are MuJoCo's.
"""

import atexit
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from flowkit.checks import check_choice
from flowkit.extras import not_imported

Expert = Callable[[np.ndarray], np.ndarray]
ENVIRONMENTS = ("metaworld", "obstacle")
STYLES = ("straight", "left", "right", "both")


class Environment(Protocol):
    """A task of a simulated robot, with states as observations, and pictures of a camera."""

    name: str
    obs_size: int
    action_size: int
    max_steps: int
    proprio: tuple[int, ...]
    """Numbers of an observation that tell of the robot's place: what a policy with a camera knows
    beside the picture. Not its velocity, which may tell where the expert was going."""
    radii: Mapping[str, float]
    """Radii in meters of what `points` names, for those that are round."""

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

    def render(self, height: int = 240, width: int = 320) -> np.ndarray | None:
        """Return a picture ``(height, width, 3)`` in bytes; None without a renderer."""
        ...


def environment(env: str, task: str | None = None) -> Environment:
    """Make an environment.

    Args:
        env: ``"metaworld"`` or ``"obstacle"``.
        task: Name of a task of MetaWorld, such as ``"push-v3"``. For ``obstacle`` None, or
            ``"wide"``, where the goal may lie far from the middle line.

    Raises:
        ValueError: If there is no such environment or task.
        ImportError: If its packages are not installed.
        RuntimeError: If ``MUJOCO_GL`` names a graphics library that does not work.
    """
    check_choice(env, ENVIRONMENTS, "env")
    try:
        _import_mujoco()
        if env == "metaworld":
            return MetaWorld(task)
        return Obstacle(task)
    except ImportError as error:
        raise not_imported(error, f"for env={env}", "robots") from error


def _import_mujoco() -> None:
    """Import MuJoCo, which loads the graphics library of ``MUJOCO_GL`` at once."""
    try:
        import mujoco  # noqa: F401
    except ImportError:
        raise
    except Exception as error:  # whatever the graphics library raises
        raise RuntimeError(
            "MUJOCO_GL must name a graphics library that works here, such as egl, got "
            f"{os.environ.get('MUJOCO_GL')}: {error}"
        ) from error


def picture(env: Environment, size: int) -> np.ndarray:
    """Return the picture ``(size, size, 3)`` that a policy with a camera sees, in bytes.

    Raises:
        RuntimeError: If there is no renderer.
    """
    found = env.render(size, size)
    if found is None:
        raise RuntimeError(
            f"{env.name} must have a renderer to take pictures, got none; set MUJOCO_GL=egl, or "
            "MUJOCO_GL=osmesa, in the environment"
        )
    return found


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
    proprio: tuple[int, ...] = (0, 1, 2, 3)  # place and grip of the hand
    radii: Mapping[str, float] = {}
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

    def render(self, height: int = 240, width: int = 320) -> np.ndarray | None:
        """Return the picture of a camera."""
        return self._renderer(self.robot.model, self.robot.data, height, width)


RADII = {"hand": 0.04, "object": 0.18, "goal": 0.05}
GOALS = {None: (0.5, 0.05), "wide": (0.6, 0.2)}  # distance, and largest offset from the middle line
# MuJoCo would not move a site that is compiled at its body's own place.
OBSTACLE = f"""
<mujoco>
  <option timestep="0.005" gravity="0 0 0"/>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="above" pos="0 0 1.6"/>
    <geom type="plane" size="1 1 .1" pos="0 0 -.05" contype="0" conaffinity="0"/>
    <geom name="obstacle" type="cylinder" size="{RADII["object"]} .05" rgba=".4 .4 .4 1"/>
    <body name="hand">
      <joint name="x" type="slide" axis="1 0 0"/>
      <joint name="y" type="slide" axis="0 1 0"/>
      <geom name="hand" type="sphere" size="{RADII["hand"]}" mass="1" rgba=".2 .4 .9 1"/>
    </body>
    <site name="goal" pos="{GOALS[None][0]} 0 0" size="{RADII["goal"]}" rgba=".2 .8 .3 1"/>
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

    Args:
        task: None for a goal near the middle line, 5 cm away at most: its place need not be known.
            ``"wide"`` for one up to 20 cm away, which only those reach who know its place.

    Raises:
        ValueError: If there is no such task.
    """

    name, obs_size, action_size, max_steps = "obstacle", 6, 2, 80
    proprio: tuple[int, ...] = (0, 1)  # place of the hand
    radii: Mapping[str, float] = RADII
    SPEED, SUBSTEPS = 0.6, 10

    def __init__(self, task: str | None = None) -> None:
        import mujoco

        if task not in GOALS:
            raise ValueError(f"task must be null or wide for env=obstacle, got {task}")
        self.place = GOALS[task]
        self._mujoco: Any = mujoco
        self.model: Any = self._mujoco.MjModel.from_xml_string(OBSTACLE)
        self.data: Any = self._mujoco.MjData(self.model)
        self._renderer = _Renderer("above")

    def reset(self, seed: int) -> np.ndarray:
        """Begin an episode: the hand on the left near the middle line, the goal on the right."""
        rng = np.random.default_rng(seed)
        self._mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = [-0.5, rng.uniform(-0.05, 0.05)]
        distance, offset = self.place
        self.goal = np.array([distance, rng.uniform(-offset, offset)])
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
        away = float(np.linalg.norm(self.goal - self.data.qpos))
        success = not touched and away < RADII["goal"]
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

    def render(self, height: int = 240, width: int = 320) -> np.ndarray | None:
        """Return the picture of a camera above."""
        return self._renderer(self.model, self.data, height, width)

    def _observed(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel, self.goal])


class _Renderer:
    """MuJoCo's renderer, if the user chose one by ``MUJOCO_GL`` or has a screen."""

    def __init__(self, camera: str) -> None:
        self.camera, self.renderers = camera, {}
        self.wanted = bool(os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY"))

    renderers: dict[tuple[int, int], Any]
    """Those made so far, by height and width."""

    def __call__(self, model: Any, data: Any, height: int, width: int) -> np.ndarray | None:
        size = (height, width)
        if self.wanted and size not in self.renderers:
            import mujoco

            with suppress(Exception):  # whatever the graphics library raises
                self.renderers[size] = renderer = mujoco.Renderer(model, *size)
                atexit.register(renderer.close)  # before the graphics library itself ends
            self.wanted = size in self.renderers
        if not self.wanted:
            return None
        self.renderers[size].update_scene(data, self.camera)
        return self.renderers[size].render()


def _side(style: str, seed: int) -> int:
    """Return 1 for the left, −1 for the right and 0 for straight; draw one for both."""
    check_choice(style, STYLES, "style")
    drawn = 1 - 2 * int(np.random.default_rng([seed, 1]).integers(2))
    return {"straight": 0, "left": 1, "right": -1, "both": drawn}[style]
