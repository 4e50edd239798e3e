"""Demonstrate, train, roll out: the record, the same starts again, and wrong settings."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from flowkit.modules import load_run
from flowkit.recipes.demonstrate import demonstrate
from flowkit.recipes.rollout import rollout
from flowkit.recipes.train import train
from tests.conftest import CONF
from tests.recipes.conftest import TINY

SMALL = [*TINY[2:-2], "batch_size=16", "trainer.max_steps=4", "trainer.val_check_interval=4"]
SMALL += ["model.net.width=16", "model.net.depth=1", "model.net.heads=2", "logger.tensorboard=null"]


def composed(recipe, *options):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(recipe, overrides=[str(option) for option in options])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny policy that has trained for four steps."""
    pytest.importorskip("mujoco")
    folder = tmp_path_factory.mktemp("policy")
    shown = folder / "shown.npz"
    demonstrate(composed("demonstrate", "env=obstacle", "num=12", f"out={shown}"))
    options = ["experiment=obstacle_chunks", f"data.root={shown}", *SMALL]
    train(composed("train", *options, f"run_dir={folder}/run"))
    return folder / "run"


def test_a_checkpoint_is_a_whole_policy(run):
    """Its statistics are those of the training split, also after the file of the data is gone."""
    velocity = load_run(run).velocity
    arrays = np.load(run.parent / "shown.npz")
    assert velocity.shape == (2, 14)
    ends = [0, *arrays["episode_ends"]]
    parts = [arrays["action"][a:b] for a, b in pairwise(ends)]
    means = torch.tensor(np.stack([part.mean(0) for part in parts]))
    assert ((velocity.actions.center - means.mean(0)).abs() < 3 * means.std(0)).all()
    assert velocity.actions.low.min() >= arrays["action"].min()
    assert velocity.observations.scale[0] == pytest.approx(arrays["obs"][:, 0].std(), rel=0.05)


def test_a_rollout_is_recorded_and_repeats(run, tmp_path):
    options = [f"run={run}", "env=obstacle", "episodes=3", "sampler.grid=2", "execute=5"]
    first = rollout(composed("rollout", *options, f"out={tmp_path}/a"))
    second = rollout(composed("rollout", *options, f"out={tmp_path}/b"))
    record = json.loads((tmp_path / "a/rollout.json").read_text())
    assert record["rollout"] == first
    assert first["success"]["episodes"] == 3
    assert first["prefixes"] == first["solves"]  # the observation is prepared once a solve
    assert first["success"] == second["success"]
    assert first["action_change"] == second["action_change"]
    assert (tmp_path / "a/rollout.png").read_bytes() == (tmp_path / "b/rollout.png").read_bytes()
    with Image.open(tmp_path / "a/rollout.gif") as animation:
        assert animation.n_frames > 3
    other = rollout(composed("rollout", *options, f"out={tmp_path}/a", "prefix=3"))
    assert other["action_change"] != first["action_change"]
    assert json.loads((tmp_path / "a/rollout-1.json").read_text()) == record


def test_wrong_settings_are_named(run, tiny_run, tmp_path):
    with pytest.raises(TypeError, match=r"run must be a run of a policy \(model=policy\) to act"):
        rollout(composed("rollout", f"run={tiny_run}", "env=obstacle"))
    with pytest.raises(ValueError, match=r"out must be a file with the suffix .npz, got .*shown"):
        demonstrate(composed("demonstrate", "env=obstacle", f"out={tmp_path}/shown"))
    with pytest.raises(ValueError, match="execute and prefix must fit a chunk of 14 actions"):
        rollout(composed("rollout", f"run={run}", "env=obstacle", "execute=20", f"out={tmp_path}"))
    options = ["model=policy", "data=toy", f"run_dir={tmp_path}/run", "trainer.accelerator=cpu"]
    with pytest.raises(Exception, match=r"shape must be \(C, T\), got \(2,\)"):
        train(composed("train", *options))


@pytest.mark.slow
def test_a_policy_of_another_robot_is_refused(run):
    pytest.importorskip("metaworld")
    with pytest.raises(ValueError, match="run must have actions of size 4 for metaworld push-v3"):
        rollout(composed("rollout", f"run={run}", "env=metaworld", "task=push-v3"))
