"""Demonstrate, train, roll out: the record, the same starts again, and wrong settings."""

import json
import re
import shlex
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from flowkit import grids
from flowkit.modules import load_run
from flowkit.modules.card import _use
from flowkit.modules.checkpoints import CONFIG, UNRESOLVED, load_module, read_checkpoint
from flowkit.modules.latent_actions import load_latents
from flowkit.recipes.boss import boss
from flowkit.recipes.demonstrate import demonstrate
from flowkit.recipes.push import push
from flowkit.recipes.rollout import rollout
from flowkit.recipes.train import train
from flowkit.runs.records import weights
from flowkit.runs.resuming import resumed
from flowkit.runs.training_cost import read_cost, total_cost
from tests.conftest import CONF
from tests.recipes.conftest import TINY, status_of

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


@pytest.mark.filterwarnings("ignore:.*sys.modules:RuntimeWarning")
def test_a_shared_policy_acts_by_the_command_of_its_card(run, tmp_path, monkeypatch):
    own = shutil.copytree(run, tmp_path / "run")
    early = push(composed("push", f"run={own}", f"to={tmp_path}/early"))
    words = "Not measured. `flowkit rollout run=early env=... task=...` measures it."
    assert words in (early / "README.md").read_text()
    acting = ["env=obstacle", "episodes=2", "sampler.grid=2"]
    ours = rollout(composed("rollout", f"run={own}", *acting))
    folder = push(composed("push", f"run={own}", f"to={tmp_path}/shared"))
    card = (folder / "README.md").read_text()
    low, high = ours["success"]["interval"]
    share = f"| success | {ours['success']['value']:.4g} | {low:.4g} to {high:.4g} |"
    for part in ("pipeline_tag: robotics", share, "How: 2 episodes;"):
        assert part in card
    assert (folder / "samples.png").read_bytes() == (own / "rollout/rollout.png").read_bytes()
    (command,) = re.findall("^flowkit (rollout .*)$", card, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    more = [*acting[1:], f"out={tmp_path}/again"]
    assert status_of([*shlex.split(command), *more], monkeypatch) == 0
    theirs = json.loads((tmp_path / "again/rollout.json").read_text())["rollout"]
    assert theirs["success"] == ours["success"]
    assert theirs["jerk"] == ours["jerk"]


def test_a_card_names_the_task_that_was_measured():
    config = {"data": {"_target_": "flowkit.data.Demonstrations"}}
    text = _use(config, "x", [], {"acting": {"env": "metaworld", "task": "push-v3", "seed": 0}})
    assert "\nflowkit rollout run=x env=metaworld task=push-v3\n" in text


@pytest.mark.parametrize("option", ["labels=[1]", "num_samples=4", "seed=1", "batch_size=2"])
def test_options_of_pictures_of_samples_are_refused(run, tmp_path, option):
    words = f"{option.partition('=')[0]} must be absent for a run of flowkit rollout, where it is"
    with pytest.raises(ValueError, match=words):
        push(composed("push", f"run={run}", f"to={tmp_path}/shared", option))
    assert not (tmp_path / "shared").exists()


def test_wrong_settings_are_named(run, tiny_run, tmp_path):
    with pytest.raises(TypeError, match=r"run must be a run of a policy \(model=policy\) to act"):
        rollout(composed("rollout", f"run={tiny_run}", "env=obstacle"))
    with pytest.raises(ValueError, match=r"out must be a file with the suffix .npz, got .*shown"):
        demonstrate(composed("demonstrate", "env=obstacle", f"out={tmp_path}/shown"))
    with pytest.raises(ValueError, match="execute and prefix must fit a chunk of 14 actions"):
        rollout(composed("rollout", f"run={run}", "env=obstacle", "execute=20", f"out={tmp_path}"))
    whole = ["experiment=obstacle_chunks", f"data.root={run.parent}/shown.npz", *SMALL]
    whole += ["prediction=noise", "path=vp", f"run_dir={tmp_path}/noise"]
    with pytest.raises(
        ValueError, match=r"prediction must be velocity for a policy, .*, got Noise"
    ):
        train(composed("train", *whole))
    options = ["model=policy", "data=toy", f"run_dir={tmp_path}/run", "trainer.accelerator=cpu"]
    with pytest.raises(Exception, match=r"shape must be \(C, T\), got \(2,\)"):
        train(composed("train", *options))


def weights_hash(folder):
    return weights(load_run(folder))["hash"]


def assert_resumes(folder):
    """Go on for a step."""
    steps = ["trainer.max_steps=5"]
    train(resumed(composed("train", f"resume={folder}"), steps))
    assert read_checkpoint(folder / "checkpoints/last.ckpt")["global_step"] == 5


LATENTS = [*TINY[2:-2], "batch_size=16", "trainer.max_steps=4", "trainer.val_check_interval=4"]
LATENTS += ["logger.tensorboard=null", "model.width=8", "model.hidden=16"]


@pytest.fixture(scope="module")
def latents(run):
    """A run of latent actions that has trained for four steps."""
    folder = run.parent / "latents"
    options = ["experiment=obstacle_latents", f"data.root={run.parent}/shown.npz", *LATENTS]
    train(composed("train", *options, f"run_dir={folder}"))
    return folder


def test_latent_actions_become_part_of_a_policy(run, latents, tmp_path, monkeypatch):
    """The second run holds the averaged weights of the first, and needs it no more."""
    five = "trainer.max_steps=5"
    trained = load_latents(latents)
    observations = load_run(run).velocity.observations
    assert torch.equal(trained.observations.scale, observations.scale)  # of the same episodes
    first = shutil.copytree(latents, tmp_path / "first")
    options = ["experiment=obstacle_chunks", f"data.root={run.parent}/shown.npz", *SMALL]
    options += [f"model.latents={first}", "data.future=true", "data.episodes=3"]
    train(composed("train", *options, f"run_dir={tmp_path}/second"))
    record = read_cost(tmp_path / "second")
    source = record["latents"]
    assert source["folder"] == str(first)
    assert source["hash"] == weights(load_module(latents)[0])["hash"]
    own, learnt = record["seconds"], read_cost(latents)["seconds"]
    assert total_cost(record)["seconds"] == pytest.approx(own + learnt)

    for file in (CONFIG, UNRESOLVED):  # a training by the run's own file, at another place
        again = tmp_path / f"by_{file}"
        text = (tmp_path / "second" / file).read_text().replace("/second", f"/{again.name}")
        cfg = OmegaConf.merge(OmegaConf.create(text), {"run_dir": str(again), "trust": []})
        train(cfg)
        assert weights_hash(again) == weights_hash(tmp_path / "second")
        assert read_cost(again)["latents"] == source
    shutil.rmtree(first)
    assert_resumes(tmp_path / "by_config.yaml")
    last = tmp_path / "second/checkpoints/last.ckpt"
    train(composed("train", *options, five, f"resume={last}", f"run_dir={tmp_path}/by_file"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train(composed("train", *options, five, f"run_dir={tmp_path}/second"))
    for name in ("second", "by_file"):
        assert read_checkpoint(tmp_path / name / "checkpoints/last.ckpt")["global_step"] == 5
        assert read_cost(tmp_path / name)["latents"] == source
        stored = load_run(tmp_path / name).velocity.latents.state_dict()
        for part, value in trained.state_dict().items():
            assert torch.equal(stored[part], value)
    acting = [f"run={tmp_path}/second", "env=obstacle", "episodes=2", "sampler.grid=1"]
    pictures = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        rollout(composed("rollout", *acting, f"out={tmp_path}/{seed}"))
        pictures.append((tmp_path / f"{seed}/rollout.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_a_run_of_latent_actions_continues(latents, tmp_path):
    whole = read_checkpoint(latents / "checkpoints/last.ckpt")
    half = [line for line in LATENTS if not line.startswith("trainer.max_steps")]
    data = f"data.root={latents.parent}/shown.npz"
    options = ["experiment=obstacle_latents", data, *half, f"run_dir={tmp_path}/run"]
    options += ["lr_scheduler.T_max=4", "callback.checkpoint.every_n_steps=2"]
    train(composed("train", *options, "trainer.max_steps=2"))
    train(composed("train", *options, "trainer.max_steps=4", f"resume={tmp_path}/run"))
    again = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    for name, value in whole["current_model_state"].items():
        assert torch.equal(again["current_model_state"][name], value), name


def test_runs_of_other_kinds_are_named(run, latents, tmp_path):
    place = f"run_dir={tmp_path}/run"
    data = f"data.root={run.parent}/shown.npz"
    policy = ["experiment=obstacle_chunks", data, *SMALL, place]
    own = f"model.latents={latents}"
    with pytest.raises(
        ValueError, match=r"got LatentActions in .*train a policy on it: flowkit tr"
    ):
        load_run(latents)
    with pytest.raises(ValueError, match=r"data.future must be true to train on latent actions"):
        train(composed("train", *policy, own))
    with pytest.raises(ValueError, match=r"data.horizon must be that of model.latents, 14, got 7"):
        train(composed("train", *policy, own, "data.future=true", "data.horizon=7"))
    with pytest.raises(ValueError, match=r"model.latents must be a run of latent actions \(mod"):
        train(composed("train", *policy, f"model.latents={run}", "data.future=true"))
    whole = [*policy, own, "data.future=true"]
    for kind, wrapper in (("noise", "path=vp"), ("data", "path=linear")):
        with pytest.raises(ValueError, match=f"prediction must be velocity for a .*, got {kind}"):
            train(composed("train", *whole, f"prediction={kind}", wrapper))
    missing = [*policy, "data.future=true", f"model.latents={tmp_path}/none"]
    with pytest.raises(FileNotFoundError, match=r"model\.latents must be a run folder, .*none"):
        train(composed("train", *missing))
    student = ["module=straightening", f"module.start={tmp_path}/none", "module.grid=2"]
    with pytest.raises(FileNotFoundError, match=r"module\.start must be a run folder, .*none"):
        train(composed("train", *policy, *student))
    wrong = ["experiment=obstacle_latents", data, *LATENTS, place, "data.predict=action"]
    with pytest.raises(ValueError, match=r"demonstrations with data.predict=future for latent"):
        train(composed("train", *wrong))
    options = ["env=obstacle", "camera=obs", f"out={tmp_path}/a.npz"]
    with pytest.raises(ValueError, match="camera must be another name than obs, action, episode"):
        demonstrate(composed("demonstrate", *options))


@pytest.mark.slow
def test_grids_of_boss_serve_a_policy(run, tmp_path):
    """They are searched under observations of the data, and a rollout takes them."""
    few = ["fine_steps=8", "start=16", "limit=16", "search_noises=12", "fresh_noises=8"]
    out = f"out={tmp_path}/boss"
    boss(composed("boss", f"run={run}", "num_steps=4", "budgets=[2]", "adaptive=[]", *few, out))
    for name, steps in (("grid", 4), ("grid-2", 2)):
        grid = grids.load(tmp_path / f"boss/{name}.json")
        assert len(grid) == steps + 1
        options = [f"run={run}", "env=obstacle", "episodes=1", "sampler=from_file"]
        options += [f"sampler.grid.file={tmp_path}/boss/{name}.json", f"out={tmp_path}/{name}"]
        rollout(composed("rollout", *options))
        record = json.loads((tmp_path / f"{name}/rollout.json").read_text())
        assert record["sampling"]["grid"] == grid.tolist()


def test_a_regression_has_no_grid(run, tmp_path):
    options = ["experiment=obstacle_chunks", "module=regression", *SMALL]
    options += [f"data.root={run.parent}/shown.npz", f"run_dir={tmp_path}/run"]
    train(composed("train", *options))
    with pytest.raises(ValueError, match="run must be a flow to have a grid of times, got a regre"):
        boss(composed("boss", f"run={tmp_path}/run"))


def test_a_policy_of_images_end_to_end(run, tmp_path, monkeypatch):
    """Pictures are read by the name that they were recorded under, and taken in a rollout."""
    sizes = []

    def render(self, height=240, width=320):
        sizes.append((height, width))
        return np.full((height, width, 3), 7, np.uint8)

    monkeypatch.setattr("flowkit.policies.environments.Obstacle.render", render)
    file = tmp_path / "shown.npz"
    seen = ["env=obstacle", "task=wide", "camera=front", "image_size=16", "num=12"]
    demonstrate(composed("demonstrate", *seen, f"out={file}"))
    assert np.load(file)["front"].shape[1:] == (16, 16, 3)
    options = ["experiment=obstacle_images", f"data.root={file}", "data.camera=front", *SMALL]
    options += ["data.image_size=16", "model.encoder.width=4", "model.encoder.size=8"]
    train(composed("train", *options, f"run_dir={tmp_path}/run"))
    sizes.clear()
    acting = [f"run={tmp_path}/run", "env=obstacle", "task=wide", "episodes=2", "shown=1"]
    found = rollout(composed("rollout", *acting, "sampler.grid=1"))
    assert sizes.count((16, 16)) == found["solves"]
    record = json.loads((tmp_path / "run/rollout/rollout.json").read_text())
    assert record["acting"]["animation"] == "rendered"


@pytest.mark.slow
def test_a_policy_of_another_robot_is_refused(run):
    pytest.importorskip("metaworld")
    with pytest.raises(ValueError, match="run must have actions of size 4 for metaworld push-v3"):
        rollout(composed("rollout", f"run={run}", "env=metaworld", "task=push-v3"))
