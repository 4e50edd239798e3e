"""Wrong values for all options: one line and status 2, or a result; no traceback and no hang."""

import copy
import random
import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from flowkit.__main__ import recipes
from flowkit.rules import check
from tests.conftest import CONF
from tests.recipes.conftest import status_of

WRONG = [-1, 0, 1.5, -0.5, 10**30, "abc", "", None, [], [1, -2], {"a": 1}, True, float("nan")]
NEEDED = {"run": "${run}", "out": "o", "image": "${image}", "source": 3, "target": 8}
NEEDED |= {"couplings": {"a": []}, "problems": {"p": []}, "runs": {"a": "r"}}
NEEDED |= {"path": "p", "to": "t"}  # of an autoencoder


@pytest.fixture(scope="module")
def configs():
    """The default configuration of every recipe, with what must be given."""
    found = {}
    with initialize_config_dir(CONF, version_base="1.3"):
        for recipe in recipes():
            found[recipe] = OmegaConf.to_container(compose(recipe))
    for config in found.values():
        for node in (config, config.get("autoencoder") or {}):
            for key, value in node.items():
                node[key] = NEEDED[key] if value == "???" else value
    return found


def _leaves(node, place=()):
    for key, value in node.items():
        if key not in ("_target_", "_partial_", "inversions", "edits"):
            yield (*place, key), value
            if isinstance(value, dict):
                yield from _leaves(value, (*place, key))


def _with(config, place, value):
    changed = copy.deepcopy(config)
    node = changed
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return changed


def _absurd(default, value):
    """Whether a value is of a kind that no option with this default takes."""
    if isinstance(default, bool):
        return not (value is None or isinstance(value, bool))
    if isinstance(default, int | float):
        nan = isinstance(value, float) and value != value
        return nan or isinstance(value, bool) or value in ("", {"a": 1})
    return value == "" or (isinstance(default, str) and "${" not in default and value is True)


def _outcome(recipe, config):
    try:
        check(recipe, config)
    except ValueError as error:
        return str(error)
    return None


def test_all_wrong_values_of_all_options_are_refused_in_one_line(configs):
    """Every recipe and every key; then every choice of every group, within a training."""
    cases, seen, train = [], set(), configs["train"]
    for recipe, config in configs.items():
        for place, default in _leaves(config):
            if len(place) == 1 or place not in seen:  # parts are those of other recipes
                seen.add(place)
                cases += [(recipe, config, place, value, default) for value in WRONG]
    for file in sorted(Path(CONF).glob("*/*.yaml")):
        text = file.read_text()
        group, node = file.parent.name, yaml.safe_load(text)
        if "# @package _global_" not in text and group in train and "_target_" in node:
            node.pop("defaults", None)
            whole = {**train, group: node}
            cases += [
                ("train", whole, (group, *place), value, default)
                for place, default in _leaves(node)
                for value in WRONG
            ]
    refused = 0
    for recipe, config, place, value, default in cases:
        said = _outcome(recipe, _with(config, place, value))
        where = f"flowkit {recipe} {'.'.join(place)}={value!r}"
        if said is None:
            assert not _absurd(default, value), where
        else:
            refused += 1
            assert "\n" not in said, where
            assert re.match(r"[\w.]+ must ", said), (where, said)
    assert refused > 0.5 * len(cases) > 1000


def test_the_defaults_of_all_recipes_are_accepted(configs):
    assert {
        recipe: _outcome(recipe, config) for recipe, config in configs.items()
    } == dict.fromkeys(recipes())


@pytest.mark.parametrize(
    "words",
    [
        ["seed=[1"],
        ["seed==3"],
        ["=3"],
        ["seed"],
        ["sede=3"],
        ["+sede=3"],
        ["++data.split_seed.x=3"],
        ["data=null"],
        ["logger=null"],
        ["data=digit"],
        ["modle=dit"],
        ["~seed"],
        ["~data"],
        ["hydra.run.dir="],
        ["seed=1,2"],
        ["--multirun", "seed=0,-1"],
        ["-m", "data=digits,digit"],
        ["--foo"],
        ["--config-dir", "nowhere"],
        ["experiment=toy_table"],
        ["model.heads=2"],
        ["+data=folder"],
        ["data@x=folder"],
        ["seed={a:1"],
    ],
    ids=" ".join,
)
def test_wrong_grammar_ends_in_one_line(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert status_of(["train", *words], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not list(tmp_path.iterdir())


# --- through the recipes ----------------------------------------------------------------------

TEXTS = ["-1", "0", "1.5", "1e2", "-0.5", "abc", "''", "null", "[]", "[1,-2]", "{a:1}", "true", "2"]
TINY = [
    "trainer.max_steps=1",
    "trainer.val_check_interval=1",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "+trainer.limit_val_batches=1",
    "logger.tensorboard=null",
    "logger.csv=null",
]
COMMANDS = {
    "autoencoder": [*TINY, "vae.width=8", "vae.multipliers=[1,1]", "metric=pixels", "num_samples=9",
                    "num_scale_images=9", "batch_size=4"],
    "train": [*TINY, "data=toy", "data.size=40", "model=mlp", "model.width=8", "sampler.grid=2",
              "callback.samples.rows=1", "batch_size=4"],
    "doctor": ["run={run}", "out=o", "num_samples=32"],
    "epsilon": ["data.size=40", "num_samples=20"],
    "tokens": ["steps=1", "sizes.width=8", "sizes.depth=1"],
    "sample": ["run={run}", "out=o", "sampler.grid=2", "num_samples=6"],
    "evaluate": ["run={run}", "out=o", "sampler.grid=2", "num_samples=12", "metric=pixels"],
    "statistics": ["data=digits", "out=o.npz", "metric=pixels"],
    "report": ["run={run}", "out=o", "num_samples=12", "solvers=[euler]", "nfe=[2]",
               "metric=pixels"],
    "boss": ["run={run}", "out=o", "num_steps=2", "budgets=[2]", "fine_steps=4", "start=16",
             "limit=16", "search_noises=6", "fresh_noises=4", "adaptive=[0.1]"],
    "pairs": ["run={run}", "out=o", "num_noises=6", "fine_steps=3", "grid=[2]"],
    "pareto": ["runs={{a: {run}}}", "nfe=[2]", "num_samples=12", "repetitions=1", "metric=pixels"],
    "edit": ["run={run}", "image={image}", "source=3", "target=8", "out=o", "num_steps=3",
             "num_iters=2"],
    "compare_edits": ["run={run}", "source=3", "target=8", "num_inverted=2", "num_edited=2",
                      "num_steps=4", "solves=[2]", "out=o"],
}  # fmt: skip
BUDGET = 45.0  # seconds
ELSEWHERE = {"devices", "num_workers", "num_nodes", "compile", "null"}  # processes, compilers


class _Hangs(BaseException):
    """Raised when a command takes too long."""


def _hangs(*_):
    raise _Hangs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of odd values that are accepted
def test_a_sample_of_commands_ends_in_one_line_or_a_result(
    tiny_run, configs, monkeypatch, capsys, tmp_path
):
    Image.new("L", (8, 8), 99).save(tmp_path / "image.png")
    places = {"run": tiny_run, "image": tmp_path / "image.png"}
    cases = [
        (recipe, ".".join(place), text)
        for recipe in COMMANDS
        for place, _ in _leaves(configs[recipe])
        for text in TEXTS
        if place[-1] not in ELSEWHERE and len(place) < 3
        if (place[-1], text) != ("max_steps", "-1")  # a training without an end
    ]
    random.Random(0).shuffle(cases)
    before = signal.signal(signal.SIGALRM, _hangs)
    began, statuses = time.monotonic(), []
    for number, (recipe, key, text) in enumerate(cases):
        if time.monotonic() - began > BUDGET:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        base = [word for word in COMMANDS[recipe] if word.partition("=")[0] != key]
        words = [recipe, *(word.format(**places) for word in base), f"{key}={text}"]
        signal.alarm(30)
        try:
            statuses.append(status_of(words, monkeypatch))
        except (Exception, _Hangs) as error:
            pytest.fail(f"flowkit {' '.join(words)}: {error!r}")
        finally:
            signal.alarm(0)
        said = capsys.readouterr().err
        if statuses[-1]:
            assert (statuses[-1], said.count("\n")) == (2, 1), (words, said)
            assert not [file for file in folder.rglob("*") if file.is_file()], words
    signal.signal(signal.SIGALRM, before)
    assert len(statuses) > 20
    assert {0, 2} == set(statuses)
