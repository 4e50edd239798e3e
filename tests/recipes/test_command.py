"""The command as a user meets it when something is wrong."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf

from flowkit import __version__
from flowkit.__main__ import (
    ErrorInALine,
    check_experiment,
    check_former,
    check_overrides,
    experiments,
    explained,
    recipes,
)
from flowkit.checks import check_at_least
from tests.conftest import CONF


def _run(folder, *command, **environment):
    return subprocess.run(
        [sys.executable, "-m", "flowkit", *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mistyped_run_is_an_error_at_once_and_makes_no_folder(tmp_path):
    result = _run(tmp_path, "sample", "run=runs/typo")
    assert result.returncode == 1
    assert result.stderr == "error: run must be a run folder, got runs/typo; it does not exist\n"
    assert not list(tmp_path.iterdir())


def test_what_names_no_single_folder_is_not_looked_for(tmp_path):
    check_overrides([f"run={tmp_path}", f"run='{tmp_path}'", "resume=null", "seed=3"])
    (tmp_path / "file").touch()
    check_overrides([f"hydra.run.dir={tmp_path}/new/run", "hydra.run.dir=new/run"])
    with pytest.raises(
        PermissionError, match=r"hydra.run.dir must be a writable folder, got .*file/r"
    ):
        check_overrides([f"hydra.run.dir={tmp_path}/file/run"])
    for seed in ("abc", "1.5", "1e3"):
        with pytest.raises(TypeError, match=f"seed must be a whole number, got {seed}"):
            check_overrides([f"seed={seed}"])
    with pytest.raises(ValueError, match=r"options must be name=value, got .*; for example run=.*"):
        check_overrides([str(tmp_path)])
    check_overrides(["seed=-1", "seed=1,2", "seed=null", "logger.csv=null"])
    with pytest.raises(ValueError, match=r"logger must be a choice, got null; logger.<part>=null"):
        check_overrides(["logger=null"])
    check_overrides(["run=[a,b]", "run=a,b", "run=${oc.env:RUN}", "problem.run=x"])
    with pytest.raises(
        FileNotFoundError, match="resume must be a run folder, got x; it does not exist"
    ):
        check_overrides([f"run={tmp_path}", "resume=x"])


def test_errors_of_recipes_are_a_line_and_resuming_leaves_no_stray_folder(tiny_run, tmp_path):
    """A finished run is resumed: nothing is left behind, neither in it nor where we stand."""
    shutil.copytree(tiny_run, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    result = _run(tmp_path, "train", "resume=run")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: trainer.max_steps must exceed the steps already made, got 20;")
    assert sorted(tmp_path.rglob("*")) == before


def test_only_checks_are_a_line_and_bugs_keep_their_traceback(monkeypatch):
    with (
        pytest.raises(SystemExit, match=r"^error: depth must be at least 1, got 0$"),
        ErrorInALine(),
    ):
        check_at_least(0, 1, "depth")

    @ErrorInALine()
    def build(cause):
        """As Hydra does when a part cannot be built."""
        try:
            cause()
        except Exception as error:
            raise InstantiationException("Error in call to target") from error

    with pytest.raises(SystemExit, match=r"^error: depth must be at least 1, got 0$"):
        build(lambda: check_at_least(0, 1, "depth"))
    with pytest.raises(SystemExit, match=r"^error: Error in call to target$"):
        build(lambda: int("no number"))

    with pytest.raises(SystemExit, match=r"^error: run must be given, as run=...$"), ErrorInALine():
        OmegaConf.create({"run": "???"}).run  # noqa: B018

    # Raised by others, by this file's "user code", or by no check of ours: a bug.
    for bug in (lambda: int("no number"), lambda: _raise(ValueError()), lambda: check_at_least()):
        with pytest.raises((ValueError, TypeError)), ErrorInALine():
            bug()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="depth must be"), ErrorInALine():
        check_at_least(0, 1, "depth")


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "Could not override 'sede'.\nTo append to your config use +sede=3",
            "Could not override 'sede': there is no such option; see --help",
        ),
        (
            "In 'sample': Could not find 'sampler/eular'\n\nAvailable options in 'sampler':\n"
            "\teuler\n\theun\nConfig search path:\n\tprovider=hydra, path=pkg://hydra.conf",
            "Could not find 'sampler/eular'; choices are euler, heun",
        ),
        (
            "MissingMandatoryValue while resolving interpolation: Missing mandatory value: run\n"
            "    full_key: hydra.run.dir",
            "run must be given, as run=...",
        ),
        ("anything else\nof two lines", "anything else\nof two lines"),
    ],
)
def test_slips_on_the_command_line_are_one_line_that_says_what_to_do(said, line):
    with pytest.raises(SystemExit) as caught, ErrorInALine():
        raise HydraException(said)
    assert str(caught.value) == f"error: {line}"


def test_help_names_the_choices_and_explains_the_options(tmp_path):
    result = _run(tmp_path, "sample", "sampler=euler", "--help")
    assert result.returncode == 0
    assert "flowkit sample run=runs/quickstart labels=[3,8]" in result.stdout
    assert "sampler=heun  # ab2, blockwise, bosh3" in result.stdout
    assert "labels: null # e.g. [3,8]; null cycles through all classes" in result.stdout
    assert "hydra" not in result.stdout


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_explains_itself(name):
    text = explained(name)
    assert text.startswith(recipes()[name])
    groups = {line.partition("=")[0] for line in text.splitlines() if "  # " in line}
    assert not groups & {"_self_", "train", "hydra/job_logging"}
    assert ("sampler" in groups) == ("sampler: " in Path(CONF, f"{name}.yaml").read_text())


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("consistency", "num_samples"),
        ("inpaint", "num_images"),
        ("report", "num_samples"),
        ("semantic", "num_images"),
    ],
)
def test_nothing_to_measure_is_refused(configure, recipe, name):
    module = importlib.import_module(f"flowkit.recipes.{recipe}")
    with pytest.raises(ValueError, match=f"{name} must be at least [12], got 0"):
        getattr(module, recipe)(configure(recipe, "run=nowhere", f"{name}=0"))


def test_the_version_is_printed(tmp_path):
    result = _run(tmp_path, "--version")
    assert (result.returncode, result.stdout) == (0, f"flowkit {__version__}\n")


def test_a_recipe_lists_its_own_experiments(tmp_path):
    result = _run(tmp_path, "compare", "--help")
    listed = result.stdout.partition("experiment=null  # ")[2].partition("\nOptions")[0]
    assert [name.strip() for name in listed.split(",")] == experiments("compare")
    assert {"toy_table", "weighted_toy"} <= set(experiments("compare"))
    assert not set(experiments("compare")) & set(experiments("train"))


def test_an_experiment_of_another_recipe_is_an_error_at_once_that_names_the_recipe(tmp_path):
    """At once: nothing heavy has been imported by then."""
    script = (
        "import sys, flowkit.__main__ as m\n"
        "sys.argv[1:] = ['train', 'experiment=toy_table']\n"
        "try: m.main()\n"
        "finally: print(*{'torch', 'hydra', 'omegaconf', 'lightning'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr == (
        "error: experiment must be an experiment of train, got toy_table; it belongs to compare: "
        "flowkit compare experiment=toy_table\n"
    )
    assert result.stdout == "\n"


def test_an_experiment_is_of_the_recipe_or_of_the_users_own(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    accepted = [[], ["experiment=digits_cfm"], ["experiment='digits_cfm'"], ["experiment=null"]]
    accepted += [["experiment=mine", "--config-dir", str(tmp_path)]]
    accepted += [[f"--config-dir={tmp_path}", "experiment=mine"]]
    accepted += [["-cd", str(tmp_path), "experiment=mine"], ["experiment=${oc.env:NAME}"]]
    accepted += [["experiment=other", "--config-path", "elsewhere"], ["data.experiment=mine"]]
    accepted += [["experiment=mine", "hydra.searchpath=[pkg://mine]"], ["debug=one_batch"]]
    for arguments in accepted:
        check_experiment("train", arguments)
    check_experiment("sample", ["experiment=mine"])  # Hydra says that it has no such option
    for arguments in (["experiment=mine"], ["experiment=digits_cfm,mine", "--multirun"]):
        with pytest.raises(
            ValueError, match=r"an experiment of train, got mine; choices are boss_digits, "
        ):
            check_experiment("train", arguments)
    with pytest.raises(ValueError, match=r"an experiment of train, got theirs; choices are"):
        check_experiment("train", ["experiment=theirs", "--config-dir", str(tmp_path)])
    with pytest.raises(ValueError, match=r"compare_edits, got mine; choices are digits_edits, f"):
        check_experiment("compare_edits", ["experiment=mine"])
    for experiment in experiments("compare"):
        with pytest.raises(ValueError, match=f"flowkit compare experiment={experiment}$"):
            check_experiment("train", [f"experiment={experiment}"])


def test_the_users_own_files_come_from_a_folder(tmp_path):
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "short.yaml").write_text("# @package _global_\nbatch_size: 17\n")
    result = _run(tmp_path, "train", "experiment=short", "--config-dir", "mine", "--cfg", "job")
    assert result.returncode == 0, result.stderr
    assert "\nbatch_size: 17\n" in result.stdout


@pytest.mark.parametrize(
    ("recipe", "option", "now"),
    [
        ("edit", "mask=m.png", r"mask must be given as region=<picture>: white pixels may change"),
        ("edit", "+mask=m.png", r"opposite meaning\), got \+mask=m.png"),
    ],
)
def test_options_of_earlier_versions_are_refused_with_the_fix(recipe, option, now):
    with pytest.raises(ValueError, match=now):
        check_former(recipe, ["run=r", option])
    check_former("sample", ["run=r", option])  # another recipe's options are its own


def test_a_command_of_earlier_versions_names_its_successor(tmp_path):
    result = _run(tmp_path, "sweep", "run=r")
    assert result.returncode == 1
    assert "`sweep` is now `flowkit report run=<folder> guidance=[1,1.5,2]`" in result.stderr
