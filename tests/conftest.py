"""Fixtures shared by all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import settings
from omegaconf import DictConfig

import flowkit.conf

CONF = str(Path(flowkit.conf.__path__[0]).resolve())

# A first call imports and compiles: its time says nothing.
settings.register_profile("flowkit", deadline=None)
settings.load_profile("flowkit")

# Networks here are too small for threads to help, and waiting for one costs milliseconds.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def configure() -> Callable[..., DictConfig]:
    """Compose a recipe's configuration: ``configure("train", "seed=1", ...)``."""

    def configure(recipe: str, *overrides: str) -> DictConfig:
        with initialize_config_dir(CONF, version_base="1.3"):
            return compose(recipe, overrides=list(overrides))

    return configure
