"""A disk that is full, and a kill, at every write of every recipe: one line, whole files, go on."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file

from flowkit import provenance
from flowkit.errors import line_of
from flowkit.recipes.autoencoder import autoencoder
from flowkit.recipes.blockwise import blockwise
from flowkit.recipes.compare_edits import compare_edits
from flowkit.recipes.encode import encode
from flowkit.recipes.epsilon import epsilon
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.pairs import pairs
from flowkit.recipes.pareto import pareto
from flowkit.recipes.predict import predict
from flowkit.recipes.report import report
from flowkit.recipes.sample import sample
from flowkit.recipes.statistics import statistics
from flowkit.recipes.train import train
from flowkit.runs.resuming import resumed
from tests.conftest import CONF
from tests.recipes.conftest import TINY

SHORT = [*TINY[2:-1], "batch_size=8", "trainer.max_steps=2", "trainer.val_check_interval=2"]
SHORT += ["+trainer.limit_val_batches=1", "logger.tensorboard=null", "callback.samples=null"]
LATENT = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu"]
LATENT += ["trainer.enable_progress_bar=false", "vae.width=8", "vae.multipliers=[1,2]"]
LATENT += [
    "metric=pixels",
    "num_samples=20",
    "num_scale_images=20",
    "batch_size=4",
    "logger.tensorboard=null",
]
PLAIN = "plain"  # the run that a recipe starts from
RECIPES = {
    "autoencoder": (autoencoder, None, LATENT),
    "blockwise": (blockwise, PLAIN, [*SHORT, "stage=flow", "edges=2"]),
    "compare_edits": (
        compare_edits,
        PLAIN,
        [
            *("source=1", "target=2", "num_inverted=2", "num_edited=0", "num_steps=5"),
            *("solves=[2]", "rows=1"),
        ],
    ),
    "encode": (encode, "network", ["shard_size=600"]),
    "epsilon": (epsilon, None, ["num_samples=40"]),
    "evaluate": (
        evaluate,
        PLAIN,
        ["num_samples=8", "batch_size=4", "sampler.grid=1", "metric=pixels"],
    ),
    "evaluate samples": (
        evaluate,
        "samples",
        ["data@reference=digits", "batch_size=8", "metric=pixels"],
    ),
    "statistics": (statistics, None, ["data=digits", "metric=pixels", "batch_size=60"]),
    "pairs": (pairs, PLAIN, ["num_noises=4", "shard_size=2", "fine_steps=2", "grid=[1,2]"]),
    "pareto": (pareto, "blocks", ["num_samples=4", "nfe=[2]", "repetitions=1", "metric=pixels"]),
    "predict": (predict, "symmetrical", ["batch_size=200"]),
    "report": (
        report,
        PLAIN,
        ["num_samples=8", "solvers=[euler]", "nfe=[1,2]", "grids.shifted=null", "metric=pixels"],
    ),
    "sample": (sample, PLAIN, ["num_samples=4", "batch_size=2", "sampler.grid=1"]),
    "reflow": (train, PLAIN, [*SHORT, "module=straightening", "data=pairs", "sampler.grid=1"]),
}
LAST = {"autoencoder": "metrics.json", "evaluate": "metrics.json"}
LAST |= {"evaluate samples": "metrics.json", "statistics": "statistics.json"}
LAST |= {"predict": "predicted.json", "sample": "samples.json"}  # what stands for a whole
FAST = ("sample", "pairs")


def composed(recipe, *options):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(recipe, overrides=[str(option) for option in options])


@pytest.fixture(scope="module")
def starts(tmp_path_factory, tiny_run):
    """Makes the folder that a recipe starts from, once."""
    made, place = {PLAIN: tiny_run}, tmp_path_factory.mktemp("starts")

    def start(name):
        folder = place / name
        if name == "network" and name not in made:
            autoencoder(composed("autoencoder", *LATENT, f"run_dir={folder}"))
        elif name == "blocks" and name not in made:
            options = [*RECIPES["blockwise"][2], f"run={tiny_run}", f"run_dir={folder}"]
            blockwise(composed("blockwise", *options))
        elif name == "symmetrical" and name not in made:
            options = [*TINY, "trainer.max_steps=2", "callback.samples=null"]
            train(composed("train", *options, "module=symmetrical", f"run_dir={folder}"))
        elif name == "pairs" and name not in made:
            options = [f"run={tiny_run}", f"out={folder}", *RECIPES["pairs"][2]]
            pairs(composed("pairs", *options))
        elif name == "samples" and name not in made:
            options = [f"run={tiny_run}", f"out={folder}", *RECIPES["sample"][2], "format=npz"]
            sample(composed("sample", *options, "num_samples=20"))
        return made.setdefault(name, folder)

    return start


def call(recipe, folder, starts):
    """Call a recipe as a user does who calls it again after an error."""
    work, origin, options = RECIPES[recipe]
    trains = recipe in ("autoencoder", "blockwise", "reflow")
    name = "train" if recipe == "reflow" else recipe.split()[0]
    out = folder / "statistics.npz" if recipe == "statistics" else folder
    options = [*options, f"run_dir={folder}" if trains else f"out={out}"]
    if origin is not None:
        key = {"encode": "autoencoder.path", "pareto": "+runs.it", "reflow": "module.start"}
        key["evaluate samples"] = "samples"
        options.append(f"{key.get(recipe, 'run')}={starts(origin)}")
    if recipe == "reflow":
        options.append(f"data.root={starts('pairs')}")
    if trains and (folder / "checkpoints" / "last.ckpt").is_file():
        name = "train" if recipe == "blockwise" else name
        work = {"train": train}.get(name, work)
        work(resumed(composed(name, f"resume={folder}"), []))
    else:
        work(composed(name, *options))


class Killed(BaseException):
    """What stands for a kill."""


class Disk:
    """Writes below a folder fail from the one of a number on, when half of the file is there."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.number, self.failed = folder, None, None
        self.flush = provenance._flush
        monkeypatch.setattr(provenance, "_flush", self)

    def __call__(self, path):
        own = path.suffix == ".partial" and self.folder in path.parents
        if not own or self.number is None or next(self.count) != self.number:
            return self.flush(path)
        os.truncate(path, path.stat().st_size // 2)
        self.failed = path.name.split(f".{provenance._machine()}-")[0]
        raise self.error(path)

    def fails(self, number, error):
        self.number, self.error, self.failed = number, error, None
        self.count = itertools.count()


def full(path):
    return OSError(28, "No space left on device")  # as of a write: it names no file


def killed(path):
    """The partial file of a process that is no more stays."""
    left = path.name.replace(f"-{os.getpid()}-", "-4194305-")  # above the largest number of Linux
    path.rename(path.with_name(left))
    path.touch()  # for the removal after an error, which a kill does not make
    return Killed()


def read(file):
    """Read a file whole; a half one is an error."""
    if file.suffix == ".json":
        return timeless(json.loads(file.read_text()))
    if file.suffix == ".png":
        with Image.open(file) as picture:
            picture.load()
            return picture.size
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return {name: arrays[name].tolist() for name in arrays}
    if file.suffix == ".safetensors":
        return {k: v.shape for k, v in load_file(file).items()}
    if file.suffix in (".pt", ".ckpt"):
        return sorted(torch.load(file, weights_only=True))
    return None


def timeless(value):
    """A record without what depends on the time."""
    names = {"seconds", "processor_seconds", "milliseconds", "sampling", "cost"}
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in names}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder):
    files = [file for file in folder.rglob("*") if file.is_file() and "logs" not in file.parts]
    return {f.relative_to(folder).as_posix(): read(f) for f in files if f.suffix != ".partial"}


SLOW = [pytest.param(name, 0, marks=pytest.mark.slow) for name in RECIPES if name not in FAST]


@pytest.mark.parametrize(("recipe", "first"), [*itertools.product(FAST, (0, 1)), *SLOW])
def test_an_error_at_every_write_leaves_whole_files_and_the_next_call_goes_on(
    recipe, first, starts, tmp_path, monkeypatch
):
    """The k-th call fails at its k-th write, until a call needs fewer writes.

    It finds a full disk or is killed, in turn. The half of a file is the worst of the three states
    around a write: before it there is no such half, and after it the state is that before the next
    write.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "made"
    call(recipe, folder, starts)
    expected = contents(folder)
    folder.rename(tmp_path / "whole")  # records hold the names of folders
    disk = Disk(folder, monkeypatch)
    for number in itertools.count():
        disk.fails(number, (full, killed)[(number + first) % 2])
        try:
            call(recipe, folder, starts)
        except (OSError, RuntimeError) as found:
            line = line_of(found)
            assert line is not None, "a traceback"
            assert "\n" not in line
            assert "No space left on device" in line
            assert disk.failed in line or "checkpoints" in line
            assert not list(folder.rglob("*.partial"))
        except Killed:
            assert disk.failed
        else:
            break
        contents(folder)  # whole, or they could not be read
        assert not (folder / LAST.get(recipe, "nothing")).exists()
    assert disk.failed is None
    assert number >= 1
    found = contents(folder)
    assert found.keys() == expected.keys()
    assert found == expected
    assert not list(folder.rglob("*.partial"))
