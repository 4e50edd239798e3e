"""Simulators: scripted experts, fixed starts, and what a rollout measures."""

import builtins

import numpy as np
import pytest
import torch

from flowkit.policies import (
    RecedingHorizon,
    action_change,
    demonstrate,
    environment,
    jerk,
    roll_out,
    success,
    timing,
)

needs_mujoco = pytest.mark.usefixtures("mujoco")


@pytest.fixture
def mujoco():
    pytest.importorskip("mujoco")


@needs_mujoco
def test_the_same_seed_gives_the_same_bytes_and_both_ways_occur():
    env = environment("obstacle")
    one, two = demonstrate(env, 12, "both", 3), demonstrate(environment("obstacle"), 12, "both", 3)
    for name, array in one.arrays.items():
        assert array.tobytes() == two.arrays[name].tobytes()
    other = demonstrate(env, 12, "both", 4).arrays["obs"]
    assert other.tobytes() != one.arrays["obs"].tobytes()
    ends = one.arrays["episode_ends"]
    heights = [part[:, 1] for part in np.split(one.arrays["obs"], ends[:-1])]
    extremes = [part[np.abs(part).argmax()] for part in heights]
    assert min(extremes) < -0.2
    assert max(extremes) > 0.2
    assert min(np.abs(extremes)) > 0.18  # nobody passes through the obstacle


@needs_mujoco
@pytest.mark.parametrize(("style", "way"), [("left", "left"), ("right", "right")])
def test_an_expert_of_a_style_goes_its_way(style, way):
    env = environment("obstacle")
    obs, expert, done = env.reset(0), env.expert(style, 0), False
    while not done:
        obs, done, reached = env.step(expert(obs))
    assert reached
    assert env.way() == way


def straight(obs):
    """Eight actions straight to the goal: the mean of both ways."""
    return torch.tensor([[1.0, 0.0]]).expand(8, 2)


def around(obs):
    """Eight actions around the obstacle, on the left."""
    point = np.array([0.05, 0.33]) if obs[0] < 0 else obs[4:6]
    away = torch.from_numpy(point - obs[:2])
    return (away / away.norm()).expand(8, 2)


@needs_mujoco
def test_the_mean_of_both_ways_ends_at_the_obstacle():
    env = environment("obstacle")
    found = roll_out(env, RecedingHorizon(straight, 4), 5)
    assert found.metrics()["success"]["value"] == 0
    assert all(abs(path[-1]["hand"][0] + 0.22) < 0.03 for path in found.paths)  # 0.18 + 0.04


@needs_mujoco
def test_a_rollout_measures_what_it_did():
    env = environment("obstacle")
    control = RecedingHorizon(around, 2)
    found, again = (
        roll_out(env, control, 4, seed=1),
        roll_out(env, RecedingHorizon(around, 2), 4, 1),
    )
    metrics = found.metrics()
    assert metrics["success"]["value"] == 1
    assert metrics["left"] == 1
    assert metrics["steps"] == np.mean([len(taken) for taken in found.actions])
    assert len(found.solves) == sum(-(-len(taken) // 2) for taken in found.actions)
    assert found.paths == again.paths
    assert found.paths != roll_out(env, RecedingHorizon(around, 2), 4, seed=2).paths
    assert metrics["policy_hz"] > metrics["control_hz"]


@needs_mujoco
def test_starts_of_rollouts_are_not_those_of_demonstrations():
    env = environment("obstacle")
    shown = demonstrate(env, 20, "left", 0).arrays
    firsts = shown["obs"][[0, *shown["episode_ends"][:-1]], 1]
    found = roll_out(env, RecedingHorizon(around, 8), 20)
    starts = [path[0]["hand"][1] for path in found.paths]
    assert np.abs(np.subtract.outer(firsts, starts)).min() > 1e-7


@needs_mujoco
def test_wrong_settings_are_named():
    env = environment("obstacle")
    with pytest.raises(ValueError, match="style must be left, right or both for env=obstacle"):
        env.expert("straight", 0)
    with pytest.raises(ValueError, match="task must be null or wide for env=obstacle, got push-v3"):
        environment("obstacle", "push-v3")
    with pytest.raises(ValueError, match="env must be one of metaworld, obstacle, got 'libero'"):
        environment("libero")
    with pytest.raises(ValueError, match=r"actions must have size 2 in obstacle, got shape \(3,\)"):
        roll_out(env, RecedingHorizon(lambda obs: torch.zeros(8, 3), 4), 1)


@needs_mujoco
@pytest.mark.parametrize(("task", "offset"), [(None, 0.05), ("wide", 0.2)])
def test_the_goal_that_is_shown_is_the_goal(task, offset):
    """Also in the simulator's picture; and a wide one is far from the mean of all."""
    env, goals = environment("obstacle", task), []
    for seed in range(40):
        env.reset(seed)
        goals.append(env.goal[1])
        assert env.data.site_xpos[0, :2] == pytest.approx(env.goal)
    assert 0.8 * offset < np.abs(goals).max() <= offset
    shown = demonstrate(env, 10, "both", 0)
    assert shown.tried <= 12


def painted(env):
    """An environment whose pictures hold numbers: of the hand and of the goal."""
    env.taken = 0

    def render(height, width):
        env.taken += 1
        numbers = np.concatenate([env.data.qpos, env.goal])
        row = np.rint(100 * (1 + numbers)).astype(np.uint8)
        return np.broadcast_to(np.resize(row, width)[None, :, None], (height, width, 3))

    env.render = render
    return env


@needs_mujoco
def test_pictures_of_demonstrations_are_of_their_steps_and_only_they_show_the_goal():
    plain = demonstrate(environment("obstacle", "wide"), 4, "both", 0).arrays
    shown = demonstrate(painted(environment("obstacle", "wide")), 4, "both", 0, 8).arrays
    assert shown["image"].dtype == np.uint8
    assert shown["image"].shape == (len(plain["obs"]), 8, 8, 3)
    assert np.array_equal(shown["obs"], plain["obs"][:, :2])
    assert np.array_equal(shown["action"], plain["action"])
    expected = np.rint(100 * (1 + plain["obs"][:, [0, 1, 4, 5]]))
    assert np.abs(shown["image"][:, 0, :4, 0] - expected).max() <= 1  # float32 beside float64


@needs_mujoco
def test_a_policy_with_a_camera_gets_a_picture_at_each_decoding_and_not_the_goal():
    env, seen = painted(environment("obstacle", "wide")), []

    def policy(obs):
        seen.append(obs)
        goal = obs["image"][0, 0, 2:4] / 100 - 1
        return around(np.concatenate([obs["vector"], [0, 0], goal]))

    found = roll_out(env, RecedingHorizon(policy, 3), 4, image_size=6)
    assert len(found.solves) == len(seen) == env.taken
    assert {(obs["vector"].shape, obs["image"].shape) for obs in seen} == {((2,), (3, 6, 6))}
    assert found.metrics()["success"]["value"] == 1  # by the goal that was seen


@needs_mujoco
def test_without_a_renderer_pictures_are_refused(monkeypatch):
    for name in ("MUJOCO_GL", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    env = environment("obstacle")
    assert env.render() is None
    with pytest.raises(RuntimeError, match=r"must have a renderer to take .*set MUJOCO_GL=egl"):
        demonstrate(env, 1, "both", image_size=8)


def test_a_graphics_library_that_does_not_work_is_named(monkeypatch):
    real = builtins.__import__

    def broken(name, *rest, **options):
        if name == "mujoco":
            raise AttributeError("no glGetError")
        return real(name, *rest, **options)

    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(RuntimeError, match=r"MUJOCO_GL must name .*, got osmesa: no glGetError"):
        environment("obstacle")


def test_an_environment_that_is_not_installed_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.partition(".")[0] in ("mujoco", "metaworld"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    for env, task in (("obstacle", None), ("metaworld", "push-v3")):
        with pytest.raises(ImportError, match=rf"installed for env={env}, .*'\.\[robots\]'"):
            environment(env, task)


def test_measures_have_their_closed_forms():
    ramp = torch.arange(6.0)[:, None] * torch.tensor([[3.0, 4.0]])
    assert action_change(ramp) == pytest.approx(5)
    assert jerk(ramp) == pytest.approx(0)
    assert jerk(torch.tensor([[0.0], [1.0], [4.0], [9.0]])) == pytest.approx(2)
    found = success([True] * 80 + [False] * 20)
    assert found["interval"] == pytest.approx([0.711, 0.867], abs=1e-3)
    times = timing([0.01] * 99 + [1.0], steps=700, seconds=14.0)
    assert times["control_hz"] == pytest.approx(50)
    assert times["policy_hz"] == pytest.approx(700 / 1.99)
    assert times["latency_ms_50"] == pytest.approx(10)
    with pytest.raises(ValueError, match="outcomes must hold at least one episode, got none"):
        success([])


@pytest.mark.slow
@pytest.mark.parametrize("style", ["straight", "both"])
def test_experts_of_metaworld_push(style):
    pytest.importorskip("metaworld")
    env = environment("metaworld", "push-v3")
    first, second = demonstrate(env, 3, style, 0), demonstrate(env, 3, style, 0)
    assert first.tried == 3
    for name, array in first.arrays.items():
        assert array.tobytes() == second.arrays[name].tobytes()
    assert np.abs(first.arrays["action"]).max() <= 1
    with pytest.raises(ValueError, match="task must be one of assembly-v3, "):
        environment("metaworld", "push")
