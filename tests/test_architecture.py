"""Layers, packaging and the command."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from flowkit import __version__

ROOT = Path(__file__).parent.parent


def _run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_imports_point_down():
    result = _run(str(Path(sys.executable).parent / "lint-imports"), "--no-cache", cwd=ROOT)
    assert result.returncode == 0, result.stdout


def test_library_files_read_in_one_sitting():
    long = {
        str(file.relative_to(ROOT)): lines
        for file in (ROOT / "flowkit").rglob("*.py")
        if (lines := file.read_text().count("\n")) > 400
    }
    assert not long


def test_hooks_are_local_and_run_what_make_check_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]
    entries = [hook["entry"].replace(".venv/bin/", "") for hook in hooks[0]["hooks"]]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    commands = re.findall(r"\$\(BIN\)/(ruff \w+|[\w-]+)", lint)
    assert [entry.partition(" --")[0] for entry in entries] == commands


def test_the_version_is_that_of_citation_and_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what CFF requires
    assert citation["version"] == __version__
    newest = (ROOT / "CHANGELOG.md").read_text().partition("\n## ")[2].split()[0]
    assert newest == __version__


def test_bare_command_lists_every_recipe_with_a_line():
    result = _run(sys.executable, "-m", "flowkit", cwd=ROOT)
    assert result.returncode == 0
    listed = {
        line.split()[0]: line.split(maxsplit=1)[1]
        for line in result.stdout.splitlines()
        if line.startswith("  ") and len(line.split()) > 2
    }
    recipes = {file.stem for file in (ROOT / "recipes").glob("[!_]*.py")}
    assert recipes <= set(listed)


def test_an_unknown_recipe_is_an_error_that_lists_the_known():
    result = _run(sys.executable, "-m", "flowkit", "trian")
    assert result.returncode == 2
    assert result.stderr.startswith("error: recipe must be one of autoencoder, ")
    assert result.stderr.endswith("got trian; did you mean train?\n")


def test_an_unknown_option_is_an_error():
    result = _run(sys.executable, "-m", "flowkit", "train", "sede=3", cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr == "error: option must exist, got sede; did you mean seed?\n"


def test_every_folder_of_modules_is_a_package_and_is_packaged():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"] == {
        "flowkit": "flowkit",
        "flowkit.recipes": "recipes",
        "flowkit.conf": "conf",
    }
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "flowkit").rglob("*.py")}
    folders |= {Path("recipes"), Path("conf")}
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    names = [".".join(folder.parts).removeprefix("flowkit.") for folder in folders]
    packages = ["flowkit" if name == "flowkit" else f"flowkit.{name}" for name in names]
    assert setuptools["packages"] == sorted(packages)


def _copy_of_the_checkout(folder):
    """What a clone holds: a build in the checkout itself would find and leave files of others."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    for name in ("flowkit", "recipes", "conf", "tests", "notebooks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


SEEN = """
import importlib, sys
import flowkit
print(flowkit.__file__, flowkit.recipes.__path__[0], flowkit.conf.__path__[0], sep="\\n")
importlib.import_module("flowkit.recipes.train")
for name in ("tests", "notebooks", "docs", "shared"):
    try:
        importlib.import_module("flowkit." + name)
    except ModuleNotFoundError as error:
        print(error.name)
"""


@pytest.mark.slow  # imports everything in a new process
@pytest.mark.parametrize("inside", [True, False])
def test_a_checkout_runs_without_being_installed(inside, tmp_path):
    """Within its folder, and by PYTHONPATH from another; of its folders only two are importable."""
    checkout = _copy_of_the_checkout(tmp_path / "checkout")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": "" if inside else str(checkout)}
    folder = checkout if inside else elsewhere
    result = _run(sys.executable, "-c", SEEN, cwd=folder, env=environment)
    assert result.stdout.splitlines() == [
        str(checkout / "flowkit" / "__init__.py"),
        str(checkout / "recipes"),
        str(checkout / "conf"),
        *(f"flowkit.{name}" for name in ("tests", "notebooks", "docs", "shared")),
    ], result.stderr
    command = (sys.executable, "-m", "flowkit", "train", "--cfg", "job")
    result = _run(*command, cwd=folder, env=environment)
    assert "flowkit.modules.ConditionalFlowMatching" in result.stdout, result.stderr


WHAT_RUNS = {
    "sys.argv = ['flowkit', 'train', '--cfg', 'job']; import flowkit.__main__ as m, flowkit; "
    "print(flowkit.__file__); m.main()": "flowkit.modules.ConditionalFlowMatching",
    "import flowkit; from flowkit.modules import load_run; print(flowkit.__file__); "
    "images = load_run('flowkit:digits').sample(4, cond=4 * ['3'], seeds=range(4)); "
    "print(tuple(images.shape), float(images.std()) > 0.5)": "(4, 1, 8, 8) True",
}


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.parametrize("source", ["checkout", "sdist"])
def test_the_wheel_holds_recipes_and_configuration_and_runs_elsewhere(source, tmp_path):
    """Built and installed in an environment of its own, seen from another folder."""
    built_from = _copy_of_the_checkout(tmp_path / "checkout")
    shared = {f"flowkit/weights/probe/{name}" for name in ("config.json", "autoencoder/a.json")}
    for name in shared:
        (built_from / name).parent.mkdir(parents=True, exist_ok=True)
        (built_from / name).write_text("{}")
    if source == "sdist":
        script = (
            "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
        )
        build = _run(sys.executable, "-c", script, str(tmp_path), cwd=built_from)
        assert build.returncode == 0, build.stderr
        (archive,) = tmp_path.glob("flowkit_fm-*.tar.gz")
        shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
        shutil.rmtree(built_from)
        (built_from,) = (tmp_path / "unpacked").iterdir()
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(tmp_path))
    build = _run(sys.executable, "-m", "pip", "wheel", *options, str(built_from))
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if not name.startswith("flowkit_fm-")}
    expected = {str(f.relative_to(ROOT)) for f in (ROOT / "flowkit").rglob("*.py")}
    for folder in ("recipes", "conf"):
        expected |= {f"flowkit/{f.relative_to(ROOT)}" for f in (ROOT / folder).rglob("*.py")}
    expected |= {f"flowkit/{f.relative_to(ROOT)}" for f in (ROOT / "conf").rglob("*.yaml")}
    shared |= {
        str(file.relative_to(ROOT))
        for file in (ROOT / "flowkit" / "weights").rglob("*")
        if file.is_file()
    }
    assert packed == {*expected, *shared, "flowkit/py.typed", "flowkit/data/sentences.txt"}

    # The environment sees this one's packages, but not the checkout.
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(here) + "\n")
    own = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in "
        "getattr(f, '__module__', '') + getattr(f, '__name__', '')]; "
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    for script, seen in WHAT_RUNS.items():
        # -E: nor by PYTHONPATH
        command = (str(environment / "bin" / "python"), "-E", "-c", own + script)
        result = _run(*command, cwd=empty)
        assert str(site) in result.stdout, result.stdout + result.stderr
        assert seen in result.stdout, result.stderr
