"""Run mutmut on the functions with changed lines, for ``make mutants``."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

HUNK = re.compile(r"^@@ -\S+ \+(\d+)(?:,(\d+))? @@", re.MULTILINE)


def changed_lines(base: str, file: str) -> set[int]:
    """Return the lines changed since a revision; for removed lines, the line before them."""
    diff = ["git", "diff", "--unified=0", base, "--", file]
    text = subprocess.run(diff, capture_output=True, text=True, check=True).stdout
    hunks = ((int(first), int(count) if count else 1) for first, count in HUNK.findall(text))
    return {line for first, count in hunks for line in range(first, first + max(count, 1))}


def functions(tree: ast.Module) -> Iterator[tuple[str, range]]:
    """Yield mutmut's name and the lines of each function and method of a module."""
    for node in tree.body:
        methods = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in methods:
            if isinstance(function, ast.FunctionDef):
                owner = f"ǁ{node.name}ǁ" if isinstance(node, ast.ClassDef) else "_"
                lines = range(function.lineno, (function.end_lineno or function.lineno) + 1)
                yield f"x{owner}{function.name}", lines


def changed_functions(base: str) -> list[str]:
    """Return patterns of the mutants of all functions with a line changed since ``base``."""
    mutated = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]["only_mutate"]
    names = []
    for file in sorted(map(str, Path("flowkit").rglob("*.py"))):
        if any(fnmatch(file, pattern) for pattern in mutated):
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            lines = changed_lines(base, file)
            found = functions(ast.parse(Path(file).read_text()))
            names += [f"{module}.{name}__mutmut_*" for name, span in found if lines & {*span}]
    return names


if __name__ == "__main__":
    # Without a name mutmut would run all mutants, so an empty list must not reach it.
    if not (names := changed_functions(sys.argv[1])):
        raise SystemExit(f"no function that is mutated has changed since {sys.argv[1]}")
    raise SystemExit(subprocess.run([sys.executable, "-m", "mutmut", "run", *names]).returncode)
