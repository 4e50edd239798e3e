"""The functions that ``make mutants`` looks at."""

import subprocess

from tests.changed_functions import changed_functions

BEFORE = """\
def kept(x):
    return x


def shorter(x):
    x = x + 1
    return x


class Solver:
    def step(self, x):
        return x - 1

    def end(self, x):
        return x
"""


def git(*arguments):
    identity = ["-c", "user.name=name", "-c", "user.email=name@example.org"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def test_only_functions_with_changed_or_removed_lines_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("flowkit/sampling", "flowkit/data"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "ode.py").write_text(BEFORE)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.mutmut]\nonly_mutate = ["flowkit/sampling/*.py"]\n'
    )
    git("init")
    git("add", ".")
    git("commit", "-m", "before")
    assert changed_functions("HEAD") == []
    after = BEFORE.replace("    x = x + 1\n", "").replace("x - 1", "x - 2")
    for folder in ("flowkit/sampling", "flowkit/data"):
        (tmp_path / folder / "ode.py").write_text(after)
    assert changed_functions("HEAD") == [
        "flowkit.sampling.ode.x_shorter__mutmut_*",
        "flowkit.sampling.ode.xǁSolverǁstep__mutmut_*",
    ]
