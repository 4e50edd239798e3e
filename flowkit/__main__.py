"""The command: ``flowkit <recipe> [overrides]``; the recipes folder is the registry."""

import ast
import os
import runpy
import sys
from pathlib import Path

import flowkit.recipes


def recipes() -> dict[str, str]:
    """Return the recipes by name, each with the first line of its docstring."""
    found = {}
    for file in sorted(Path(flowkit.recipes.__path__[0]).glob("[!_]*.py")):
        found[file.stem] = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
    return found


def main() -> None:
    """Run a recipe as a real module, so that Lightning can start it again for each device."""
    known = recipes()
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name not in known:
        if name not in (None, "-h", "--help"):
            print(f"recipe must be one of {', '.join(known)}, got {name!r}\n", file=sys.stderr)
        print("usage: flowkit <recipe> [option=value ...]\n")
        for recipe, line in known.items():
            print(f"  {recipe:<10} {line}")
        print("\n`flowkit <recipe> --help` lists a recipe's options and their choices.")
        raise SystemExit(name not in (None, "-h", "--help"))
    del sys.argv[1]
    sys.path.insert(0, os.getcwd())  # a user's own classes are importable as _target_
    runpy.run_module(f"flowkit.recipes.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
