"""A tiny trained run, made once; and commands within this process."""

import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from flowkit.__main__ import main
from flowkit.recipes.train import train
from tests.conftest import CONF

TINY = [
    "model.width=32",
    "model.depth=1",
    "batch_size=32",
    "trainer.max_steps=20",
    "trainer.val_check_interval=10",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "callback.ema.decay=0.9",
    "callback.losses=null",  # a plot takes longer than the training
    "callback.samples.rows=1",
    "sampler.grid=2",
]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder of a tiny class-conditional model on the digits, after 20 steps."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", overrides=[*TINY, f"run_dir={folder}"])
    train(cfg)
    return folder


def status_of(words, monkeypatch):
    """Run a command in this process, and return its exit status."""
    GlobalHydra.instance().clear()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["flowkit", *words])
        patch.setattr(sys, "path", sys.path[:])
        patch.setattr("hydra.main", sys.modules["hydra"].main)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        try:
            main()
        except SystemExit as end:
            return end.code or 0
        finally:
            GlobalHydra.instance().clear()
    return 0
