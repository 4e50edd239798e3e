"""Logs of trainings: over resumes, in other programs, and without secrets."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from flowkit.errors import line_of
from flowkit.extras import install
from flowkit.modules.logs import read_rows
from flowkit.recipes.train import train
from flowkit.runs import logs
from flowkit.runs.resuming import resumed
from tests.recipes.conftest import TINY

LOGGED = [o for o in TINY if "losses" not in o and "max_steps" not in o]
LOGGED += ["trainer.max_steps=30", "trainer.log_every_n_steps=3"]


class Killed(BaseException):
    """What stands for a kill."""


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            raise Killed


def _killed_and_resumed(configure, monkeypatch, folder, *options, trust="trust=[]"):
    """A training that is killed at step 17, and resumed from its checkpoint of step 10."""
    from flowkit.recipes import train as recipe

    parts = recipe._parts
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_parts", lambda group: [*parts(group), Kill(17)])
        with pytest.raises(Killed):
            train(configure("train", *LOGGED, *options, f"run_dir={folder}"))
    train(resumed(configure("train", f"resume={folder}", trust), []))


def _table(folder):
    (file,) = folder.glob("logs/*/metrics.csv")
    return read_rows(file)


def _events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (version,) = (folder / "tensorboard").iterdir()
    found = EventAccumulator(str(version)).Reload()
    tags = [*found.Tags()["scalars"], *found.Tags()["images"]]
    scalars = {
        tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }
    images = {
        tag: [(e.step, e.encoded_image_string) for e in found.Images(tag)]
        for tag in found.Tags()["images"]
    }
    assert {"train/loss", "val/loss", "train/learning_rate", "samples"} <= set(tags)
    return scalars, images, found.summary_metadata["_hparams_/session_start_info"]


def test_logs_of_a_killed_and_resumed_training_are_those_of_a_whole_one(
    configure, tmp_path, monkeypatch, capsys
):
    """The same rows, points and pictures: nothing twice, nothing missing, one file."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(configure("train", *LOGGED, f"run_dir={whole}"))
    said = capsys.readouterr().out
    assert f"losses    {whole / 'losses.png'}\n" in said
    assert (whole / "losses.png").is_file()
    _killed_and_resumed(configure, monkeypatch, parted)
    rows = _table(whole)
    assert rows == _table(parted)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    rates = {float(row["train/learning_rate"]) for row in rows if row["train/loss"]}
    assert rates == {torch.tensor(0.001).item()}
    theirs, ours = _events(whole), _events(parted)
    assert theirs[:2] == ours[:2]
    assert [step for step, _ in theirs[1]["samples"]] == [9, 19, 29]
    assert theirs[0]["last/val/loss"] == [theirs[0]["val/loss"][-1]]
    assert b"trainer.max_steps" in theirs[2].plugin_data.content


@pytest.mark.slow
def test_mlflow_continues_its_run(configure, tmp_path, monkeypatch):
    """The same run, with settings, pictures and the steps that were logged twice; no secret."""
    pytest.importorskip("mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KEY", "a secret")
    trust = "trust=[oc.env:KEY]"
    _killed_and_resumed(
        configure, monkeypatch, tmp_path, "logger=mlflow", "+secret=${oc.env:KEY}", trust=trust
    )
    (run,) = tmp_path.glob("mlflow/*/*/meta.yaml")
    run = run.parent
    assert logs.read_ids(tmp_path) == {"mlflow": run.name}
    values = [line.split() for line in (run / "metrics/val/loss").read_text().splitlines()]
    held_out = [row["val/loss"] for row in _table(tmp_path) if row["val/loss"]]
    assert [(v, s) for _, v, s in values] == list(zip(held_out, ["9", "19", "29"], strict=True))
    assert (run / "params/trainer.max_steps").read_text() == "30"
    assert (run / "params/secret").read_text() == "${oc.env:KEY}"
    names = [f"step-0000{step}.png" for step in (10, 20, 30)]
    assert sorted(f.name for f in (run / "artifacts/samples").iterdir()) == names
    train(resumed(configure("train", f"resume={tmp_path}", trust), ["trainer.max_steps=33"]))
    assert (run / "params/trainer.max_steps").read_text() == "30"
    assert (run / "tags/trainer.max_steps").read_text() == "33"


@pytest.mark.slow
def test_wandb_continues_its_run_offline(tmp_path):
    """In a process of its own, since wandb opens sockets: one id, settings, numbers, pictures."""
    pytest.importorskip("wandb")

    def call(*words):
        mode = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        command = [sys.executable, "-m", "flowkit", "train", *words]
        found = subprocess.run(command, env=os.environ | mode, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr[-2000:]

    call(*LOGGED, "logger=wandb", f"hydra.run.dir={tmp_path}")
    call(f"resume={tmp_path}", "trainer.max_steps=40")
    name = logs.read_ids(tmp_path)["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    for file, steps in zip(files, (30, 40), strict=True):
        content = file.read_bytes()
        assert b"val/loss" in content
        assert b"trainer.max_steps" in content
        pictures = sorted(file.parent.glob("files/media/images/samples_*.png"))
        made = {p.read_bytes() for p in (tmp_path / "samples").iterdir()}
        assert len(pictures) == (3 if steps == 30 else 1)
        assert {p.read_bytes() for p in pictures} <= made


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_without_its_package_is_refused_with_the_extra(
    name, configure, monkeypatch, tmp_path
):
    monkeypatch.setattr(logs, "find_spec", lambda package: None)
    loggers = configure("train", f"logger={name}", f"run_dir={tmp_path}").logger
    with pytest.raises(ImportError) as caught:
        logs.build_loggers(loggers, tmp_path, 0)
    assert line_of(caught.value) == (
        f"{name} must be installed for logger={name}, got none; {install(name)}"
    )


def test_names_of_runs_are_names(tmp_path):
    (tmp_path / logs.IDS).write_text('{"mlflow": "../../elsewhere"}')
    with pytest.raises(ValueError, match=r"loggers\.json must hold names of runs, got others"):
        logs.read_ids(tmp_path)
