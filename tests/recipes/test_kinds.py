"""Parts, labels and lengths that a recipe takes, and those it refuses with a line of advice."""

import json
from types import SimpleNamespace

import pytest
import torch
from hydra import initialize_config_dir
from lightning import LightningDataModule, LightningModule
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from flowkit.data import SplitData
from flowkit.recipes.compare import compare
from flowkit.recipes.compare_edits import compare_edits
from flowkit.recipes.encode import encode
from flowkit.recipes.sample import sample
from flowkit.recipes.train import train
from flowkit.runs import Run
from flowkit.runs.epochs import count_in_steps
from flowkit.runs.splits import prepared
from tests.conftest import CONF
from tests.recipes.conftest import TINY

HERE = "tests.recipes.test_kinds"
TOY = ["data=toy", "data.size=40", "model=mlp", "model.width=8", "trainer.accelerator=cpu"]
TOY += ["trainer.enable_progress_bar=false", "batch_size=10", "callback=raw", "sampler.grid=2"]
TOY += ["logger.tensorboard=null", "callback.losses=null", "callback.samples.rows=1"]


# --- epochs -----------------------------------------------------------------------------------


def _counted(max_steps=10_000, max_epochs=-1, interval=1000, accumulate=1, size=95, **schedule):
    """Steps, epochs and interval for batches of 10 samples."""
    node = {"max_steps": max_steps, "max_epochs": max_epochs, "val_check_interval": interval}
    node |= {"_target_": "lightning.Trainer", "accumulate_grad_batches": accumulate}
    node |= {"accelerator": "cpu", "devices": 1}
    cfg = OmegaConf.create({"trainer": node, "lr_scheduler": schedule or None})
    count_in_steps(cfg, SimpleNamespace(train=range(size), batch_size=10))
    return cfg.trainer.max_steps, cfg.trainer.max_epochs, cfg.trainer.val_check_interval


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, (10_000, -1, 1000)),
        ({"max_epochs": 1, "max_steps": -1}, (10, -1, 1000)),  # the last batch is smaller
        ({"max_epochs": 3}, (30, -1, 1000)),
        ({"max_epochs": 3, "max_steps": 7}, (7, -1, 1000)),
        ({"max_epochs": 3, "accumulate": 4}, (8, -1, 1000)),
        ({"interval": 0.5}, (10_000, -1, 5)),
        ({"interval": 1.0}, (10_000, -1, 10)),
        ({"interval": 0.01}, (10_000, -1, 1)),
        ({"max_steps": -1}, (-1, -1, 1000)),
    ],
)
def test_epochs_are_counted_in_steps_of_the_stream(given, steps):
    assert _counted(**given) == steps


def test_a_schedule_needs_its_length():
    assert _counted(max_steps=-1, max_epochs=1, T_max="${trainer.max_steps}")[0] == 10
    with pytest.raises(ValueError, match=r"trainer.max_steps must be given for a learning-rate"):
        _counted(max_steps=-1, T_max="${trainer.max_steps}")


def test_one_epoch_of_training_validates_twice_at_intervals_of_a_half(configure, tmp_path):
    options = ["trainer.max_epochs=1", "trainer.max_steps=-1", "trainer.val_check_interval=0.5"]
    module = train(configure("train", *TOY, *options, f"run_dir={tmp_path}"))
    assert module.trainer.global_step == 4
    pictures = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert pictures == ["step-000002.png", "step-000004.png"]


# --- classes by name --------------------------------------------------------------------------


def test_classes_have_numbers_and_names(tiny_run, configure, tmp_path):
    run = Run.load(tiny_run)
    assert [run.class_number(label) for label in ("3", 3, None)] == [3, 3, None]
    with pytest.raises(
        ValueError, match=r"^source must be the number or name of a class .* cat; c"
    ):
        run.class_number("cat", "source")
    options = [f"run={tiny_run}", "num_samples=4", "sampler.grid=2"]
    by_name = sample(configure("sample", *options, f"out={tmp_path}/a", "labels=['3','8']"))
    by_number = sample(configure("sample", *options, f"out={tmp_path}/b", "labels=[3,8]"))
    assert torch.equal(by_name, by_number)
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert record["sampling"]["labels"] == [3, 8]


def test_names_of_sub_folders_are_names_of_classes(configure, tmp_path):
    shades = {"discs": 40, "squares": 200}
    for name, shade in shades.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(30):
            image = Image.new("L", (8, 8), shade + k)
            image.save(tmp_path / "images" / name / f"{k}.png")
    own = ["data=folder", f"data.root={tmp_path}/images", "data.image_size=8", "data.channels=1"]
    own += ["trainer.max_steps=2", "trainer.val_check_interval=2", "callback.samples=null"]
    kept = [
        option for option in TINY if not option.startswith(("trainer.m", "trainer.v", "callback.s"))
    ]
    train(configure("train", *kept, *own, f"run_dir={tmp_path}/run"))
    options = [f"run={tmp_path}/run", "num_samples=2"]
    by_name = sample(configure("sample", *options, f"out={tmp_path}/a", "labels=[squares]"))
    by_number = sample(configure("sample", *options, f"out={tmp_path}/b", "labels=[1]"))
    assert torch.equal(by_name, by_number)
    record = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert record["sampling"]["labels"] == [1]
    with pytest.raises(
        ValueError, match=r"^labels must be the number or name of a class .* circles"
    ):
        sample(configure("sample", *options, f"out={tmp_path}/c", "labels=[circles]"))


# --- kinds ------------------------------------------------------------------------------------


class OneArgument(nn.Module):
    """A network that takes no time."""

    def __init__(self, shape, **_):
        super().__init__()

    def forward(self, x):
        return x


class PlainModule(LightningModule):
    """Not a module of flows."""

    def __init__(self, **_):
        super().__init__()


class PlainData(LightningDataModule):
    """Not a data module of flowkit."""


class RowsAsDictionaries(SplitData):
    """Splits are lists of samples, as data sets of torch are."""

    def load(self):
        return {"train": [{"x1": torch.zeros(2)}]}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            f"model._target_={HERE}.OneArgument",
            r"model must be callable as model\(x, t, cond\), got",
        ),
        (
            f"module._target_={HERE}.PlainModule",
            r"module must be a subclass of .*FlowModule, got P",
        ),
        (
            f"data={{_target_: {HERE}.PlainData}}",
            r"data must be a subclass of .*SplitData, got Plai",
        ),
        ("module.drop_cond.null=3", r"module.drop_cond.null must be no class, got 3; .* so 10 can"),
    ],
)
def test_other_kinds_of_parts_are_refused_before_a_folder_is_made(
    option, said, configure, tmp_path
):
    cfg = configure("train", *TINY, f"run_dir={tmp_path}/run")
    key, _, value = option.partition("=")
    OmegaConf.update(cfg, key, OmegaConf.create(f"v: {value}").v, merge=False, force_add=True)
    with pytest.raises((TypeError, ValueError), match=said):
        train(cfg)
    assert not (tmp_path / "run").exists()


def test_splits_must_be_splits():
    data = RowsAsDictionaries(batch_size=1, seed=0, num_workers=0)
    with pytest.raises(TypeError, match=r"load must return splits by name, .* got list"):
        prepared(data)


def test_images_are_encoded_by_a_kl_autoencoder_on_a_device_that_exists(configure, tmp_path):
    cfg = configure("encode", "autoencoder=identity", f"out={tmp_path}/cache")
    with pytest.raises(
        TypeError, match=r"autoencoder must be a network of diffusers, got Identity; give"
    ):
        encode(cfg)
    cfg.device = "foo"
    with pytest.raises(ValueError, match="device must be a device of this machine"):
        encode(cfg)
    assert not (tmp_path / "cache").exists()


def test_a_comparison_checks_all_cells_before_it_empties_a_folder(configure, tmp_path):
    cfg = configure("compare", "couplings={a:[]}", "problems={p:['data=toy']}", f"out={tmp_path}")
    kept = tmp_path / "p" / "a" / "seed-0" / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for key, said in (("overrides", "optimizer.lr must be"), ("evaluate", "num_samples must be")):
        wrong = {"overrides": ["optimizer.lr=-1"], "evaluate": ["num_samples=0"]}[key]
        with (
            initialize_config_dir(CONF, version_base="1.3"),
            pytest.raises(ValueError, match=said),
        ):
            compare(OmegaConf.merge(cfg, {key: wrong}))
    assert kept.exists()


def test_settings_of_edits_are_checked_before_the_work(configure):
    cfg = configure("compare_edits", "run=nowhere", "source=3", "target=8")
    cfg.edits.automatic = {"step_sise": 0.1}
    with pytest.raises(
        TypeError, match=r"'automatic' must hold settings of FlowOpt, got .*step_si"
    ):
        compare_edits(cfg)
    cfg.edits.automatic = {"skip": 10}
    with pytest.raises(ValueError, match=r"skip of 'automatic' must lie in \[0, 9\], got 10"):
        compare_edits(cfg)
