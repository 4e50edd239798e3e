"""A disk that is full, and a kill, at every write of every recipe: one line, whole files, go on."""

import itertools
import json
import os
import re
from contextlib import nullcontext
from shutil import copytree

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file

from flowkit import __main__ as command
from flowkit import places, provenance
from flowkit.errors import line_of
from flowkit.recipes.autoencoder import autoencoder
from flowkit.recipes.blockwise import blockwise
from flowkit.recipes.boss import boss
from flowkit.recipes.compare import compare
from flowkit.recipes.compare_edits import compare_edits
from flowkit.recipes.consistency import consistency
from flowkit.recipes.convert import convert
from flowkit.recipes.demonstrate import demonstrate
from flowkit.recipes.doctor import doctor
from flowkit.recipes.edit import edit
from flowkit.recipes.encode import encode
from flowkit.recipes.epsilon import epsilon
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.export import export
from flowkit.recipes.inpaint import inpaint
from flowkit.recipes.pairs import pairs
from flowkit.recipes.pareto import pareto
from flowkit.recipes.predict import predict
from flowkit.recipes.push import push
from flowkit.recipes.report import report
from flowkit.recipes.rollout import rollout
from flowkit.recipes.sample import sample
from flowkit.recipes.semantic import semantic
from flowkit.recipes.separate import separate
from flowkit.recipes.statistics import statistics
from flowkit.recipes.table import table
from flowkit.recipes.tokens import tokens
from flowkit.recipes.train import train
from flowkit.runs.resuming import resumed
from tests.audio.conftest import of_place, write_clips, write_encoder, write_place
from tests.conftest import CONF
from tests.recipes.conftest import TINY, status_of

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
DIT = [*SHORT, "model.net.width=16", "model.net.depth=1", "model.net.heads=2"]
POINTS = ["data=toy", "data.size=50", "model=mlp", "batch_size=16", "trainer.max_steps=1"]
POINTS += ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "callback.samples=null"]
POINTS += ["callback.losses=null", "logger.csv=null", "logger.tensorboard=null"]
PLAIN = "plain"  # the run that a recipe starts from
RUNS = {
    "holes": [*DIT, "module=inpainting", "model=inpainting_dit", "model.net.in_channels=3"],
    "maps": [*DIT, "module=latent", "model=semantic_dit", "data=digits_masks"],
    "symmetrical": [*SHORT, "module=symmetrical"],
}
RUNS["maps"] += ["model.num_classes=11", "model.factor=1", "module.drop_cond.null=11"]
RUNS["maps"] += ["model.net.in_channels=5"]
RUNS["policy"] = [*SHORT, "data=demonstrations", "model=policy", "model.net.width=16"]
RUNS["policy"] += ["model.net.depth=1", "model.net.heads=2"]
SHOWN = ["env=obstacle", "num=12"]
RUNS["sounds"] = [*SHORT, "data=captioned_audio", "model=sequence_dit", "model.width=16"]
RUNS["sounds"] += ["model.depth=1", "model.heads=2", "data.frames=20", "data.eval_mixtures=4"]
RUNS["sounds"] += ["+module.drop_cond={_target_:flowkit.guidance.DropCond,prob:0.1}"]
RUNS["speech"] = [*DIT, "data=speech", "model=voice", "data.frames=50", "data.eval_windows=4"]
RUNS["speech"] += ["+module.drop_cond={_target_:flowkit.guidance.DropCond,prob:0.1}"]
RECIPES = {
    "autoencoder": (autoencoder, None, LATENT),
    "blockwise": (blockwise, PLAIN, [*SHORT, "stage=flow", "edges=2"]),
    "boss": (
        boss,
        PLAIN,
        [
            *("budgets=[2]", "num_steps=3", "fine_steps=6", "start=16", "limit=16"),
            *("search_noises=12", "extra_noises=0", "fresh_noises=4", "adaptive=[]"),
        ],
    ),
    "compare": (
        compare,
        None,
        [
            *("couplings={A:['coupling=independent']}", "problems={B:['data.target=moons']}"),
            *("seeds=[0]", f"overrides={POINTS}", "evaluate=['num_samples=40','sampler=euler']"),
        ],
    ),
    "compare_edits": (
        compare_edits,
        PLAIN,
        [
            *("source=1", "target=2", "num_inverted=2", "num_edited=0", "num_steps=5"),
            *("solves=[2]", "rows=1"),
        ],
    ),
    "consistency": (consistency, "symmetrical", ["num_samples=8", "sampler.grid=1"]),
    "convert": (
        convert,
        "speech",
        ["num_pairs=2", "words=false", "sampler.grid=1", "vocoder.iterations=1"],
    ),
    "demonstrate": (demonstrate, None, SHOWN),
    "doctor": (doctor, PLAIN, ["num_samples=32"]),
    "edit": (edit, PLAIN, ["source=3", "target=8", "num_steps=2", "num_iters=1"]),
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
    "export": (export, PLAIN, ["sampler=euler", "steps=2"]),
    "inpaint": (inpaint, "holes", ["num_images=2", "num_samples=1", "sampler.grid=1"]),
    "separate": (separate, "sounds", ["num_mixtures=2", "sampler.grid=1"]),
    "statistics": (statistics, None, ["data=digits", "metric=pixels", "batch_size=60"]),
    "pairs": (pairs, PLAIN, ["num_noises=4", "shard_size=2", "fine_steps=2", "grid=[1,2]"]),
    "pareto": (pareto, "blocks", ["num_samples=4", "nfe=[2]", "repetitions=1", "metric=pixels"]),
    "predict": (predict, "symmetrical", ["batch_size=200"]),
    "push": (push, PLAIN, ["num_samples=4", "batch_size=2", "sampler.grid=1"]),
    "report": (
        report,
        PLAIN,
        ["num_samples=8", "solvers=[euler]", "nfe=[1,2]", "grids.shifted=null", "metric=pixels"],
    ),
    "rollout": (rollout, "policy", ["env=obstacle", "episodes=2", "sampler.grid=1"]),
    "sample": (sample, PLAIN, ["num_samples=4", "batch_size=2", "sampler.grid=1"]),
    "semantic": (semantic, "maps", ["num_images=4", "rows=1", "columns=1", "sampler.grid=1"]),
    "reflow": (train, PLAIN, [*SHORT, "module=straightening", "data=pairs", "sampler.grid=1"]),
    "table": (table, "evaluated", []),
    "tokens": (tokens, None, ["steps=1", "sizes.width=8", "sizes.depth=1", "sizes.heads=1"]),
    "train": (train, None, [*SHORT[:-1], "callback.samples.rows=1", "sampler.grid=1"]),
}
LAST = {"autoencoder": "metrics", "boss": "grid", "consistency": "consistency", "edit": "edit"}
LAST |= {"epsilon": "epsilon", "evaluate": "metrics", "inpaint": "inpainted", "pareto": "pareto"}
LAST |= {
    "doctor": "doctor",
    "export": "export",
    "predict": "predicted",
    "sample": "samples",
    "semantic": "semantic",
}
LAST |= {
    "push": "config",
    "evaluate samples": "metrics",
    "statistics": "statistics",
    "table": "table",
}  # stand for a whole
LAST |= {"demonstrate": "file", "rollout": "rollout"}
LAST |= {"separate": "mixtures", "convert": "pairs"}
FAST = ("sample", "pairs")
TO = {"push": "to"}  # instead of out
OTHER = dict.fromkeys(("boss", "consistency", "epsilon", "evaluate", "inpaint"), "seed=1")
OTHER |= dict.fromkeys(("pairs", "pareto", "predict", "sample", "semantic", "tokens"), "seed=1")
OTHER |= {"compare": f"overrides={[*POINTS, 'seed=7']}", "compare_edits": "num_steps=4"}
OTHER |= {
    "doctor": "seed=1",
    "statistics": "split=train",
    "demonstrate": "seed=1",
    "rollout": "seed=1",
    "separate": "seed=1",
    "convert": "seed=1",
    "edit": "num_iters=2",
    "push": "license=mit",
    "encode": "shard_size=500",
    "export": "steps=3",
    "report": "nfe=[4]",
    "table": "metrics=[recall]",
}
REFUSED = ("encode", "export", "pairs", "tokens")  # others may depend on these files


def some_fast(names):
    return [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in sorted(names)]


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
        elif name == "policy" and name not in made:
            place.mkdir(exist_ok=True)
            demonstrate(composed("demonstrate", *SHOWN, f"out={place}/shown.npz"))
            root = f"data.root={place}/shown.npz"
            train(composed("train", *RUNS[name], root, f"run_dir={folder}"))
        elif name == "sounds" and name not in made:
            for part, write in (("clips", write_clips), ("encoder", write_encoder)):
                (place / part).mkdir()
                write(place / part)
            options = [f"data.root={place}/clips", f"data.query.path={place}/encoder"]
            train(composed("train", *RUNS[name], *options, f"run_dir={folder}"))
        elif name == "speech" and name not in made:
            write_place(place)
            train(composed("train", *RUNS[name], *of_place(place), f"run_dir={folder}"))
        elif name in RUNS and name not in made:
            train(composed("train", *RUNS[name], f"run_dir={folder}"))
        elif name == "pairs" and name not in made:
            options = [f"run={tiny_run}", f"out={folder}", *RECIPES["pairs"][2]]
            pairs(composed("pairs", *options))
        elif name == "evaluated" and name not in made:
            options = [f"run={tiny_run}", f"out={folder}", *RECIPES["evaluate"][2]]
            evaluate(composed("evaluate", *options))
        elif name == "samples" and name not in made:
            options = [f"run={tiny_run}", f"out={folder}", *RECIPES["sample"][2], "format=npz"]
            sample(composed("sample", *options, "num_samples=20"))
        return made.setdefault(name, folder)

    return start


def arguments(recipe, starts):
    """Return the name and the options of a command, but for the place of its results."""
    _, origin, options = RECIPES[recipe]
    options = [*options]
    if origin is not None:
        key = {
            "encode": "autoencoder.path",
            "pareto": "+runs.it",
            "reflow": "module.start",
            "table": "runs",
        }
        key["evaluate samples"] = "samples"
        place = f"[{starts(origin)}]" if recipe == "table" else starts(origin)
        options.append(f"{key.get(recipe, 'run')}={place}")
    if recipe == "reflow":
        options.append(f"data.root={starts('pairs')}")
    if recipe == "edit":
        options.append(f"image={starts(PLAIN)}/samples/step-000020.png")
    return "train" if recipe == "reflow" else recipe.split()[0], options


def call(recipe, folder, starts, *more):
    """Call a recipe as a user does who calls it again after an error."""
    trains = recipe in ("autoencoder", "blockwise", "reflow", "train")
    name, options = arguments(recipe, starts)
    own = {"statistics": "statistics.npz", "demonstrate": "file.npz"}
    out = folder / own.get(recipe, "")
    options += [f"run_dir={folder}" if trains else f"{TO.get(recipe, 'out')}={out}", *more]
    if trains and (folder / "checkpoints" / "last.ckpt").is_file():
        name = "train" if recipe == "blockwise" else name
        work = {"train": train, "autoencoder": autoencoder}[name]
        work(resumed(composed(name, f"resume={folder}"), []))
    else:
        with initialize_config_dir(CONF, version_base="1.3"):  # `compare` composes, too
            RECIPES[recipe][0](compose(name, overrides=options))


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
    names |= {"real_time_factor"}
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not re.search(r"_hz$|^latency_ms", k)}
        return {k: timeless(v) for k, v in kept.items() if k not in names}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder):
    logged = {"logs", "losses.png"}  # a kill leaves out what was not logged before
    files = [f for f in folder.rglob("*") if f.is_file() and not logged & {*f.parts}]
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
        assert not (folder / f"{LAST.get(recipe, 'nothing')}.json").exists()
    assert disk.failed is None
    assert number >= 1
    found = contents(folder)
    assert found.keys() == expected.keys()
    assert found == expected
    assert not list(folder.rglob("*.partial"))


def whole(folder):
    """Return the content of all results of a folder."""
    files = [file for file in folder.rglob("*") if file.suffix in RESULTS]
    return {file.read_bytes() for file in files}


RESULTS = (".csv", ".json", ".md", ".png", ".pt", ".safetensors", ".txt")


@pytest.mark.parametrize("recipe", some_fast(OTHER))
def test_a_call_with_other_options_loses_no_result_of_the_first(
    recipe, starts, tmp_path, monkeypatch
):
    """Not even if it is killed at a write: the first results keep their content, if not names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "made"
    call(recipe, folder, starts)
    first = whole(folder)
    if recipe in REFUSED:
        with pytest.raises(ValueError, match=r"must be a new folder or hold|another"):
            call(recipe, folder, starts, OTHER[recipe])
        assert whole(folder) == first
        return
    disk = Disk(folder, monkeypatch)
    disk.fails(0, killed)
    with pytest.raises(Killed):
        call(recipe, folder, starts, OTHER[recipe])
    assert first <= whole(folder)
    disk.number = None
    call(recipe, folder, starts, OTHER[recipe])
    assert first < whole(folder)


# --- the command --------------------------------------------------------------------------------

PLACES = {"boss": "boss", "compare_edits": "edits", "consistency": "consistency", "edit": "edits"}
PLACES |= {"inpaint": "inpainted", "predict": "predicted", "report": "report", "sample": "drawn"}
PLACES |= {"export": "exported", "rollout": "rollout", "semantic": "semantic"}
PLACES |= {"separate": "separated", "convert": "converted"}


@pytest.mark.parametrize("recipe", some_fast(RECIPES))
def test_a_folder_that_cannot_be_written_is_refused_before_the_recipe_is_read(
    recipe, tiny_run, tmp_path, monkeypatch, capsys
):
    """By one line and status 2, whether it is given or that of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command.runpy, "run_module", None)
    monkeypatch.setattr(places, "TemporaryFile", refuse(tiny_run, tmp_path / "closed"))
    (tmp_path / "closed").mkdir()
    name, options = arguments(recipe, lambda _: tiny_run)
    key = "out" if name in OTHER and name not in ("compare", "tokens") else "hydra.run.dir"
    key = TO.get(name, key)
    assert status_of([name, *options, f"{key}=closed/x"], monkeypatch) == 2
    said = f"error: {key} must be a writable folder, got closed/x\n"
    assert capsys.readouterr() == ("", said)
    if recipe in PLACES or recipe == "evaluate":
        assert status_of([name, *options], monkeypatch) == 2
        said = f"error: run must be a writable folder, got {tiny_run}; choose another folder by "
        assert capsys.readouterr() == ("", f"{said}out=\n")
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # it would run
        status_of([name, *options, f"{key}=open/x"], monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["closed"]


def refuse(*folders):
    """Return what makes no file in some folders; root may write anywhere."""
    closed = {folder.resolve() for folder in folders}

    def make(dir):
        if closed & {dir.resolve(), *dir.resolve().parents}:
            raise PermissionError(13, "Permission denied")
        return nullcontext()

    return make


@pytest.mark.filterwarnings("ignore")  # a recipe is run that is imported already
@pytest.mark.parametrize("recipe", some_fast(PLACES))
def test_a_file_in_the_place_of_the_results_is_refused_before_the_work(
    recipe, starts, tmp_path, monkeypatch, capsys
):
    name, options = arguments(recipe, starts)
    run = tmp_path / "run"
    copytree(starts(RECIPES[recipe][1]), run)
    (run / PLACES[recipe]).touch()
    capsys.readouterr()
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # no network may work
    assert status_of([name, *options, f"run={run}"], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: out must be a writable folder, got {run}/{PLACES[recipe]}")


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_has_status_2(starts, tmp_path, monkeypatch, capsys):
    name, options = arguments("sample", starts)
    Disk(tmp_path, monkeypatch).fails(0, full)
    assert status_of([name, *options, f"out={tmp_path}/made"], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: .*/000000.safetensors must be written whole, got No space.*", line)
