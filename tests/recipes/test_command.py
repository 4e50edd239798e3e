"""The command as a user meets it when something is wrong."""

import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf import OmegaConf

from flowkit import __version__
from flowkit.__main__ import (
    check_command,
    check_experiment,
    check_former,
    experiments,
    explained,
    no_empty_folder,
    null_of_group,
    parsed,
    recipes,
)
from flowkit.checks import check_at_least
from flowkit.errors import ErrorInALine, errors_to_us, line_of
from flowkit.runs import Run
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
    assert result.returncode == 2
    said = (
        "run must be a run folder, hub:owner/name or flowkit:name, got runs/typo; it does not exist"
    )
    assert result.stderr == f"error: {said}\n"
    assert not list(tmp_path.iterdir())


def test_a_missing_run_is_one_message_for_the_command_line_and_for_the_library(tmp_path):
    said = "run must be a run folder, hub:owner/name or flowkit:name, got "
    said += re.escape(f"{tmp_path}; it has no config.yaml") + "$"
    with pytest.raises(ValueError, match=said):
        check_command("sample", [f"run={tmp_path}"])
    with pytest.raises(FileNotFoundError, match=said):
        Run.load(tmp_path)


def test_what_names_no_single_folder_is_not_looked_for(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUN", "x")
    check_command("sample", [f"run={tiny_run}"])
    check_command("sample", [f"run='{tiny_run}'", "seed=3"])
    check_command("sample", ["run=${oc.env:RUN}"])
    check_command("train", ["--multirun", "seed=1,2", "resume=null", "logger.csv=null"])
    assert check_command("train", ["hydra.run.dir=new/run"]) == Path("new/run")
    with pytest.raises(ValueError, match=r"resume must be a folder .* got x; it does not exist$"):
        check_command("train", ["resume=x"])
    with pytest.raises(ValueError, match=r"options must be name=value, got .*; for example run=.*"):
        check_command("sample", [str(tmp_path)])


def test_folders_must_be_writable(tiny_run, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/nothing/here")):
        with pytest.raises(PermissionError, match=rf"out must be a writable folder, got {path}"):
            check_command("sample", [f"run={tiny_run}", f"out={path}"])
        with pytest.raises(PermissionError, match=rf"hydra.run.dir must be a .*, got {path}"):
            check_command("train", [f"hydra.run.dir={path}"])
    check_command("sample", [f"run={tiny_run}", f"out={tmp_path}/new/folder"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("name", ["one", "with a space"])
def test_users_files_of_any_folder_are_checked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("# @package _global_\noptimizer:\n  lr: -1\n")
    for option in ([f"--config-dir={name}"], ["--config-dir", name], ["-cd", name]):
        with pytest.raises(ValueError, match=r"^optimizer.lr must be float > 0, got -1$"):
            check_command("train", ["experiment=mine", *option])


@pytest.mark.parametrize(
    ("recipe", "option", "said"),
    [
        ("train", "module.start=a", "module=blockwise, mean_flow or straightening"),
        ("sample", "steps=8", "got steps; the number of steps is sampler.grid"),
        ("sample", "sampler.rtol=1", "it belongs to sampler=bosh3, dopri5 or dopri8"),
        ("sample", "data.image_size=8", "got data.image_size; see --help"),
        ("train", "lr=1", "got lr; did you mean optimizer.lr or "),
        ("train", "coupling=ot", "; did you mean conditional_ot or minibatch_ot?"),
    ],
)
def test_options_that_do_not_exist_name_those_that_do(tmp_path, recipe, option, said):
    run = [f"run={tmp_path}"] if recipe == "sample" else []
    with pytest.raises(Exception, match=re.escape(said)), one_line():
        check_command(recipe, [*run, option])


def test_every_swept_value_is_checked():
    accepted = ["--multirun", "seed=0,1,2", "data=digits,toy", "optimizer.lr=1e-3,1e-4"]
    check_command("train", accepted)
    for wrong, said in (
        ("seed=0,1,-2", "got -2"),
        ("data=digits,digit", "got digit; did you mean"),
    ):
        with pytest.raises(Exception, match=said), one_line():
            check_command("train", [*accepted[:1], wrong, "optimizer.lr=1e-3,1e-4"])


@contextmanager
def one_line():
    """Raise the line of an error of Hydra."""
    try:
        yield
    except Exception as error:
        raise ValueError(line_of(error)) from error


def test_null_removes_the_choice_of_a_group():
    assert null_of_group("train", "lr_scheduler=null") == "~lr_scheduler"
    assert null_of_group("train", "resume=null") == "resume=null"  # no group
    assert null_of_group("sample", "sampler.method=null") == "sampler.method=null"
    for group in ("data", "optimizer", "trainer"):
        with pytest.raises(ValueError, match=rf"^{group} must be a choice, got null$"):
            null_of_group("train", f"{group}=null")
    with pytest.raises(ValueError, match=r"logger must be a choice, got null; logger.<part>=null"):
        null_of_group("train", "logger=null")
    for recipe, group in (
        ("boss", "metric"),
        ("autoencoder", "lr_scheduler"),
        ("tokens", "encoder"),
    ):
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose(recipe, [null_of_group(recipe, f"{group}=null")])
        assert cfg[group] is None


def test_a_start_that_fails_leaves_no_folder_and_keeps_an_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    for folder in (tmp_path / "new" / "run", tmp_path / "old" / "run"):
        with pytest.raises(FileExistsError), no_empty_folder(folder):
            _raise(FileExistsError(folder.mkdir(parents=True)))
    with no_empty_folder(tmp_path / "done"):
        (tmp_path / "done").mkdir()
        (tmp_path / "done" / "file").touch()
    actual = OmegaConf.create({"hydra": {"runtime": {"output_dir": f"{tmp_path}/times/2"}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", actual)
    with pytest.raises(FileExistsError), no_empty_folder(tmp_path / "times" / "1"):
        _raise(FileExistsError((tmp_path / "times" / "2").mkdir(parents=True)))
    left = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*"))
    assert left == ["done", "done/file", "old", "old/kept"]


def test_errors_of_recipes_are_a_line_and_resuming_leaves_no_stray_folder(tiny_run, tmp_path):
    """A finished run is resumed: nothing is left behind, neither in it nor where we stand."""
    shutil.copytree(tiny_run, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    result = _run(tmp_path, "train", "resume=run")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: trainer.max_steps must exceed the steps already made, got 20;")
    assert sorted(tmp_path.rglob("*")) == before


def test_only_checks_are_a_line_and_bugs_keep_their_traceback(monkeypatch):
    def checked(task):
        with ends_in("depth must be at least 1, got 0"), ErrorInALine():
            task()

    checked(lambda: check_at_least(0, 1, "depth"))

    def build(cause):
        """As Hydra does when a part cannot be built."""
        try:
            cause()
        except Exception as error:
            raise InstantiationException(
                f"Error in call to target 'a.B':\n{error!r}\nfull_key: model"
            ) from error

    checked(lambda: build(lambda: check_at_least(0, 1, "depth")))
    with ends_in("values of model must fit, got an error: invalid literal"), ErrorInALine():
        build(lambda: int("no number"))
    with ends_in("run must be given, as run=..."), ErrorInALine():
        OmegaConf.create({"run": "???"}).run  # noqa: B018
    with ends_in("/nowhere/file must be usable, got No such file or directory"), ErrorInALine():
        Path("/nowhere/file").read_text()

    # Raised by others, by this file's "user code", or by no check of ours: a bug.
    for bug in (lambda: int("no number"), lambda: _raise(ValueError()), lambda: check_at_least()):
        with pytest.raises((ValueError, TypeError)), ErrorInALine():
            bug()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="depth must be"), ErrorInALine():
        check_at_least(0, 1, "depth")


@contextmanager
def ends_in(said):
    """The command ends with status 2 and one line on stderr."""
    told = io.StringIO()
    with pytest.raises(SystemExit) as caught, redirect_stderr(told):
        yield
    assert caught.value.code == 2
    (line,) = told.getvalue().splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "Could not override 'sede'.\nTo append to your config use +sede=3",
            "option must exist, got sede; see --help",
        ),
        (
            "In 'sample': Could not find 'sampler/eular'\n\nAvailable options in 'sampler':\n"
            "\teuler\n\theun\nConfig search path:\n\tprovider=hydra, path=pkg://hydra.conf",
            "sampler must be one of euler, heun, got eular; did you mean euler?",
        ),
        (
            "MissingMandatoryValue while resolving interpolation: Missing mandatory value: run\n"
            "    full_key: hydra.run.dir",
            "run must be given, as run=...",
        ),
        (
            "Ambiguous value for argument 'seed=1,2'\n1. To use it as a list, use key=[value1]",
            "seed must be one value, got 1,2; a list is [1,2], or add --multirun",
        ),
        (
            "Error locating target 'my.Net', set env var HYDRA_FULL_ERROR=1 to see chained "
            "exception.\nfull_key: model",
            "model._target_ must be a class, got my.Net",
        ),
        ("anything else\nof two lines\n    object_type=dict", "anything else of two lines"),
    ],
)
def test_slips_on_the_command_line_are_one_line_that_says_what_to_do(said, line):
    with ends_in(line), ErrorInALine():
        raise HydraException(said)


def test_help_names_the_choices_and_explains_the_options(tmp_path):
    result = _run(tmp_path, "sample", "sampler=euler", "--help")
    assert result.returncode == 0
    assert "flowkit sample run=runs/quickstart labels=[3,8]" in result.stdout
    assert "sampler=auto  # ab2, auto, blockwise, bosh3" in result.stdout
    assert "num_samples: 100 # int >= 1; at most the test split" in result.stdout
    assert "hydra" not in result.stdout


def test_help_explains_choices_of_the_command_line():
    text = explained("sample", ["sampler=shifted", "num_samples=3", "model=dit", "sampler=none"])
    assert "\nsampler=shifted:\n\n# Smaller steps near the noise" in text
    assert "  shift: 3.0 # float > 0; 1: uniform" in text
    plain = explained("sample")  # has no group model
    assert text.replace(
        text[text.index("sampler=shifted:") : text.index("`flowkit sample")], ""
    ) == (plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolve"], "--resolve must stand beside --cfg, got none; write --cfg job --resolve"),
        (["--shell-completion"], "--shell-completion must be absent"),
        (["--shell-completion", "install=bash"], "--shell-completion must be absent"),
    ],
)
def test_options_of_hydra_that_do_nothing_here_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_command("train", options)
    check_command("train", ["--cfg", "job", "--resolve"])


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_processes_of_a_recipe_inherit_the_environment_of_the_user(monkeypatch, value):
    seen = []
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # so that its value comes back after the test
    os.environ.pop("HYDRA_FULL_ERROR")
    if value is not None:
        os.environ["HYDRA_FULL_ERROR"] = value
    main = errors_to_us(lambda: lambda task: lambda: task("cfg"))
    command = main()(lambda cfg: seen.append((cfg, os.environ.get("HYDRA_FULL_ERROR"))))
    command()
    assert seen == [("cfg", value)]
    assert os.environ["HYDRA_FULL_ERROR"] == "1"  # so that Hydra raises what passes through it


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


def test_an_experiment_is_of_the_recipe_or_of_the_users_own(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    accepted = [[], ["experiment=digits_cfm"], ["experiment='digits_cfm'"], ["experiment=null"]]
    accepted += [["experiment=mine", "--config-dir", str(tmp_path)]]
    accepted += [["experiment=other", "--config-path", "elsewhere"], ["data.experiment=mine"]]
    accepted += [["experiment=mine", "hydra.searchpath=[pkg://mine]"], ["debug=one_batch"]]
    for arguments in [*accepted, ["experiment=${oc.env:NAME}"]]:
        check_experiment("train", parsed(arguments))
    check_experiment("sample", parsed(["experiment=mine"]))  # Hydra says: there is no such option
    for arguments in (["experiment=mine"], ["experiment=digits_cfm,mine", "--multirun"]):
        with pytest.raises(
            ValueError, match=r"an experiment of train, got mine; choices are boss_digits, "
        ):
            check_experiment("train", parsed(arguments))
    with pytest.raises(ValueError, match=r"an experiment of train, got theirs; choices are"):
        check_experiment("train", parsed(["experiment=theirs", "--config-dir", str(tmp_path)]))
    with pytest.raises(ValueError, match=r"got digit_edits; .* did you mean digits_edits\?$"):
        check_experiment("compare_edits", parsed(["experiment=digit_edits"]))
    for experiment in experiments("compare"):
        with pytest.raises(ValueError, match=f"flowkit compare experiment={experiment}$"):
            check_experiment("train", parsed([f"experiment={experiment}"]))


WRONG = {
    "compare": ["couplings={a:[]}", "problems={p:[]}", "seeds=[-1]"],
    "train": ["trainer.accumulate_grad_batches=0"],
    "sample": ["run=.", "num_samples=-1"],
    "encode": ["out=o", "device=foo"],
    "doctor": ["rnu=x"],
    "evaluate": ["run=typo"],
    "push": ["run=flowkit:digits", "to=flowkit:mine"],
    "table": ["a", "b"],
    "edit": ["image=x.png", "anderson=-1"],
}


@pytest.mark.parametrize("recipe", WRONG)
def test_wrong_options_are_refused_before_anything_heavy_is_imported(recipe, tmp_path):
    script = (
        "import sys, flowkit.__main__ as m\n"
        f"sys.argv[1:] = {[recipe, *WRONG[recipe]]}\n"
        "try: m.main()\n"
        "finally: print(*{'torch', 'lightning', 'diffusers', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "\n")
    assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


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
    assert result.returncode == 2
    assert "it is now `flowkit report run=<folder> guidance=[1,1.5,2]`" in result.stderr
