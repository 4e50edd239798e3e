"""Layers, packaging and the command."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

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
        if (lines := file.read_text().count("\n")) > 370
    }
    assert not long


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
    assert result.returncode == 1
    assert "recipe must be one of" in result.stderr
    assert "got 'trian'" in result.stderr


def test_an_unknown_option_is_an_error():
    result = _run(sys.executable, "-m", "flowkit", "train", "sede=3", cwd=ROOT)
    assert result.returncode != 0
    assert "Could not override 'sede'" in result.stderr


@pytest.mark.slow
@pytest.mark.enable_socket
def test_the_wheel_holds_recipes_and_configuration_and_runs_elsewhere(tmp_path):
    """Built and installed in an environment of its own, seen from another folder."""
    build = _run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)
    )
    assert build.returncode == 0, build.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    configs = {str(f.relative_to(ROOT / "conf")) for f in (ROOT / "conf").rglob("*.yaml")}
    assert {f"flowkit/conf/{name}" for name in configs} <= set(names)
    assert {n.split("/")[0].split("-")[0] for n in names} == {"flowkit", "flowkit_fm"}

    # The environment sees this one's packages, but not the checkout.
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    site = next(environment.glob("lib/*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    here = [p for p in sys.path if p.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(here) + "\n")
    result = _run(
        str(environment / "bin" / "python"),
        "-c",
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in "
        "getattr(f, '__module__', '') + getattr(f, '__name__', '')]; "
        "sys.argv = ['flowkit', 'train', '--cfg', 'job']; "
        "import flowkit.__main__ as m, flowkit; print(flowkit.__file__); m.main()",
        cwd=tmp_path,
    )
    assert str(site) in result.stdout, result.stdout + result.stderr
    assert "flowkit.modules.ConditionalFlowMatching" in result.stdout, result.stderr
