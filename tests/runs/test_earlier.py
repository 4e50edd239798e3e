"""Runs of earlier versions, one of each kind: see ``earlier/``, whose numbers their code gave."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object

from flowkit.modules import load_run
from flowkit.modules.checkpoints import read_config
from flowkit.modules.earlier import current, current_name
from flowkit.recipes.autoencoder import autoencoder
from flowkit.recipes.blockwise import blockwise
from flowkit.recipes.train import train
from flowkit.runs.resuming import resumed
from tests.runs.reference import decoded, numbers

EARLIER = Path("tests/runs/earlier")  # as the runs name each other
ROOT = Path(__file__).resolve().parents[2]
NUMBERS = json.loads((ROOT / EARLIER / "numbers.json").read_text())
FLOWS = sorted(set(NUMBERS) - {"autoencoder"})

# What stood behind _target_ in the configuration of the version that these runs are of.
TARGETS = (ROOT / EARLIER / "targets.txt").read_text().split()


@pytest.fixture
def here(monkeypatch):
    """The folder that the runs were made in, seen from which they name each other."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", TARGETS)
def test_an_earlier_name_is_that_of_a_package_now(name):
    now = current_name(name)
    assert callable(get_object(now))
    _, package, public, *_ = now.split(".")
    owner = importlib.import_module(f"flowkit.{package}")
    assert public in getattr(owner, "__all__", vars(owner))


def test_names_that_have_not_moved_stay():
    for name in ("torch.optim.AdamW", "mine.Velocity", "flowkit.nn.DiT", "flowkit.codecsx.A"):
        assert current_name(name) == name
    node = {"a": [{"_target_": "flowkit.nn.kl.autoencoder_kl"}], "target": 1}
    assert current(node) == {"a": [{"_target_": "flowkit.nn.autoencoder_kl"}], "target": 1}


@pytest.mark.parametrize("kind", FLOWS)
def test_velocities_are_those_of_the_earlier_code(kind, here):
    folder = EARLIER / kind
    found = torch.tensor(numbers(folder, read_config(folder)["network"]))
    torch.testing.assert_close(found, torch.tensor(NUMBERS[kind]), rtol=1e-4, atol=1e-6)


def test_images_are_those_of_the_earlier_code(here):
    found = torch.tensor(decoded(EARLIER / "autoencoder"))
    torch.testing.assert_close(found, torch.tensor(NUMBERS["autoencoder"]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(NUMBERS))
def test_resume_goes_on(kind, configure, tmp_path, monkeypatch):
    shutil.copytree(ROOT / EARLIER, tmp_path / EARLIER)
    monkeypatch.chdir(tmp_path)
    recipe = {"autoencoder": "autoencoder", "blockwise_fra": "blockwise"}.get(kind, "train")
    more = ["run=tests/runs/earlier/blockwise_flow"] if recipe == "blockwise" else []
    folder, options = EARLIER / kind, ["trainer.max_steps=3"]
    with_resume = [*more, *options, f"resume={folder}", f"run_dir={folder}"]
    cfg = resumed(configure(recipe, *with_resume), options)
    (autoencoder if kind == "autoencoder" else train)(cfg)
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    before = torch.load(ROOT / folder / "checkpoints/last.ckpt", weights_only=True)
    assert before["global_step"] == 2
    changed = [not torch.equal(v, before["state_dict"][k]) for k, v in state["state_dict"].items()]
    assert any(changed)
    if kind != "autoencoder":
        assert load_run(folder).weights == {"kind": "averaged", "step": 3}


def test_training_starts_from_earlier_runs(configure, here, tmp_path):
    """A student, and the second stage of blocks: networks and data are those of the earlier run."""
    few = ["trainer.max_steps=1", "trainer.val_check_interval=1", "logger.tensorboard=null"]
    few += ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "batch_size=8"]
    few += ["callback=raw", "+trainer.limit_val_batches=1"]
    start = ["module=straightening", f"module.start={EARLIER}/conditional", "module.fine_steps=2"]
    train(configure("train", *few, *start, "sampler.grid=2", f"run_dir={tmp_path}/student"))
    taught = load_run(EARLIER / "conditional").state_dict()
    assert load_run(tmp_path / "student").state_dict().keys() == taught.keys()
    options = [
        f"run={EARLIER}/blockwise_flow",
        f"run_dir={tmp_path}/second",
        "sampler.grid.steps=1",
    ]
    blockwise(configure("blockwise", *few, *options))
    first, second = (
        load_run(f).velocity for f in (EARLIER / "blockwise_flow", tmp_path / "second")
    )
    assert second.feature_mode == "fra"
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
