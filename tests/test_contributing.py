"""The worked examples of CONTRIBUTING.md, run as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowkit.modules import load_run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = re.findall(r"^```(?:python|yaml)\n# (mine/\S+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
BASH = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [block.replace("\\\n", " ").split() for block in BASH if block.startswith("flowkit ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with the files of all examples."""
    folder = tmp_path_factory.mktemp("contributing")
    for name, text in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _run(folder, *command):
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_no_block_of_code_is_left_out():
    assert TEXT.count("```") == 2 * (len(FILES) + len(BASH))
    assert len(BASH) == 1 + len(COMMANDS)  # the set-up
    kinds = [name for name in ("antithetic", "spiral", "linear") if f"mine/{name}.py" in TEXT]
    assert [command[-1] for command in COMMANDS] == [f"hydra.run.dir=runs/{k}" for k in kinds]


def test_tests_of_the_examples_pass(folder):
    passed = _run(folder, "pytest", "-q", "-p", "no:cacheprovider", "mine")
    assert passed.rstrip().splitlines()[-1].startswith("3 passed")


def test_examples_are_formatted(folder):
    files = [name for name, _ in FILES if name.endswith(".py")]
    for command in (["check"], ["format", "--check"]):
        _run(folder, "ruff", *command, "--no-cache", f"--config={ROOT / 'pyproject.toml'}", *files)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1].rpartition("/")[2])
def test_example_trains(command, folder, monkeypatch):
    said = _run(folder, *command)
    example = command[-1].rpartition("/")[2]
    monkeypatch.syspath_prepend(folder)
    own = ["mine.antithetic.AntitheticFlowMatching", "mine.linear.Linear"]
    module = load_run(folder / "runs" / example, trust=own)
    assert module.weights == {"kind": "raw", "step": 2}
    made = {
        "antithetic": "AntitheticFlowMatching of MLP",
        "spiral": "Spiral: 10,000 train",
        "linear": "ConditionalFlowMatching of Linear",
    }
    assert made[example] in said
