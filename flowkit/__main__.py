"""The command ``flowkit <recipe> [option=value ...]``. Every file of the recipes is a recipe."""

import ast
import os
import re
import runpy
import sys
import traceback
from contextlib import ContextDecorator
from pathlib import Path
from textwrap import fill
from types import TracebackType

import flowkit.conf
import flowkit.recipes
from flowkit import __version__

EXPERIMENTS = Path(flowkit.conf.__path__[0]) / "experiment"
CONFIG_DIR = ("--config-dir", "-cd")
TAKE_A_VALUE = (*CONFIG_DIR, "--config-path", "-cp", "--config-name", "-cn")  # Hydra's own options


# Commands and options of earlier versions, and their replacement.
FORMER = {
    "sweep": "flowkit report run=<folder> guidance=[1,1.5,2]",
    "edit mask": "region=<picture>: white pixels may change (mask= had the opposite meaning)",
}


def recipes() -> dict[str, str]:
    """Return the recipes by name, each with the first line of its docstring."""
    found = {}
    for file in sorted(Path(flowkit.recipes.__path__[0]).glob("[!_]*.py")):
        found[file.stem] = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
    return found


def experiments(recipe: str) -> list[str]:
    """Return the names of a recipe's experiments, in alphabetical order.

    A file of ``conf/experiment`` belongs to the recipe of the command in its header.
    """
    return [f.stem for f in sorted(EXPERIMENTS.glob("*.yaml")) if _recipe_of(f) == recipe]


def _recipe_of(experiment: Path) -> str | None:
    """Return the recipe in the line ``#   flowkit <recipe> experiment=<name>`` of the header."""
    command = rf"^#   flowkit (\w+) experiment={experiment.stem}\b"
    found = re.search(command, experiment.read_text(), re.MULTILINE)
    return found[1] if found else None


def main() -> None:
    """Run a recipe as a real module, so that Lightning can start it again for each device."""
    known = recipes()
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name == "--version":
        print(f"flowkit {__version__}")
        return
    if name not in known:
        if name not in (None, "-h", "--help"):
            print(f"recipe must be one of {', '.join(known)}, got {name!r}", file=sys.stderr)
            if now := FORMER.get(name):
                print(f"`{name}` is now `{now}`", file=sys.stderr)
            print(file=sys.stderr)
        print("usage: flowkit <recipe> [option=value ...]\n")
        width = max(map(len, known))
        for recipe, line in known.items():
            print(f"  {recipe:<{width}}  {line}")
        print("\n`flowkit <recipe> --help` lists the options of a recipe and their choices.")
        print("`flowkit --version` prints the version.")
        raise SystemExit(name not in (None, "-h", "--help"))
    del sys.argv[1]
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(explained(name))
        return
    sys.path.insert(0, os.getcwd())  # so that a _target_ may name a user's own class
    with ErrorInALine():
        check_former(name, sys.argv[1:])
        check_overrides(sys.argv[1:])
        check_experiment(name, sys.argv[1:])
        _errors_to_us()
        runpy.run_module(f"flowkit.recipes.{name}", run_name="__main__", alter_sys=True)


def explained(name: str) -> str:
    """Return the help of a recipe: its docstring, its groups, its options with their comments.

    Hydra's own help lists the groups of all recipes, and no comments.
    """
    from omegaconf import OmegaConf

    folder = Path(flowkit.recipes.__path__[0])
    conf = folder.parent / "conf"
    text = (conf / f"{name}.yaml").read_text()
    choices = []
    for entry in OmegaConf.create(text).defaults:
        key, chosen = next(iter(entry.items())) if not isinstance(entry, str) else (entry, None)
        group = key.removeprefix("override ").lstrip("/")
        folder_of_group = conf / group.partition("@")[0]
        every = sorted(file.stem for file in folder_of_group.glob("*.yaml"))
        names = experiments(name) if group == "experiment" else every
        if names:
            line = f"{group}={'null' if chosen is None else chosen}  # {', '.join(names)}"
            choices.append(fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
    options = text[text.index("\n\n") :].partition("\nhydra:")[0].strip()
    about = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())) or ""
    title = "Groups, with the default and all choices:"
    listed = "\n".join([title, "", *choices, "", ""]) if choices else ""
    return (
        f"{about}\n\n{listed}Options, with their defaults (??? must be given):\n\n{options}\n\n"
        f"`flowkit {name} --cfg job` prints the whole configuration with the chosen groups."
    )


def check_former(recipe: str, overrides: list[str]) -> None:
    """Refuse options of earlier versions, and name their replacement.

    Raises:
        ValueError: If an option has another name or another meaning now.
    """
    for override in overrides:
        option = override.partition("=")[0].lstrip("+~")
        if now := FORMER.get(f"{recipe} {option}"):
            raise ValueError(f"{option} must be given as {now}, got {override}")


def check_overrides(overrides: list[str]) -> None:
    """Check overrides before the slow imports of a recipe.

    Raises:
        FileNotFoundError: If ``run`` or ``resume`` names no existing path.
        PermissionError: If the folder of ``hydra.run.dir`` or ``out`` cannot be written or created.
        TypeError: If ``seed`` is not a whole number.
        ValueError: If an argument is a path without an option name, or if ``logger`` or
            ``callback`` is null, which Hydra would not understand.
    """
    for before, override in zip(["", *overrides], overrides, strict=False):
        key, equal, value = override.partition("=")
        if not equal and before not in TAKE_A_VALUE and Path(override).exists():
            raise ValueError(
                f"options must be name=value, got {override}; for example run={override}"
            )
        path = value.strip("'\"")
        plain = path not in ("", "null") and not set(path) & set(",[$")  # no list, no reference
        if key == "seed" and plain and not re.fullmatch(r"[+-]?\d+", path):
            raise TypeError(f"seed must be a whole number, got {path}")
        if key in ("logger", "callback") and path == "null":
            raise ValueError(f"{key} must be a choice, got null; {key}.<part>=null removes a part")
        if key in ("run", "resume") and plain and not Path(path).exists():
            raise FileNotFoundError(f"{key} must be a run folder, got {path}; it does not exist")
        if key in ("hydra.run.dir", "out") and plain:
            made = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
            if not (made.is_dir() and os.access(made, os.W_OK | os.X_OK)):
                raise PermissionError(f"{key} must be a writable folder, got {path}")


def check_experiment(recipe: str, arguments: list[str]) -> None:
    """Require ``experiment`` to be an experiment of this recipe, or a file of the user.

    Files of the user are ``<folder>/experiment/<name>.yaml`` for the folder after
    ``--config-dir``. If other options give Hydra other folders, Hydra makes the check.

    Raises:
        ValueError: If the experiment belongs to another recipe, or if no file has this name.
    """
    own = experiments(recipe)
    folders = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        key, equal, value = argument.partition("=")
        if key in ("--config-path", "-cp", "hydra.searchpath"):
            return
        if key in CONFIG_DIR:
            folders.append(Path(value if equal else following))
    asked = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("experiment=")]
    names = [name for value in asked for name in value.split(",")]  # several for --multirun
    for name in names:
        plain = name not in ("", "null") and not set(name) & set("[]${}")
        users = any((folder / "experiment" / f"{name}.yaml").is_file() for folder in folders)
        if not plain or name in own or users:
            continue
        file = EXPERIMENTS / f"{name}.yaml"
        if file.is_file() and (other := _recipe_of(file)):
            fix = f"it belongs to {other}: flowkit {other} experiment={name}"
        elif own:
            fix = f"choices are {', '.join(own)}"
        else:
            continue  # Hydra's own error says that there is no such option
        raise ValueError(f"experiment must be an experiment of {recipe}, got {name}; {fix}")


class ErrorInALine(ContextDecorator):
    """End with ``error: ...`` and status 1 if a check of flowkit or a configuration fails.

    Any other error is a bug and keeps its traceback. With the environment variable
    ``HYDRA_FULL_ERROR=1`` all errors keep their traceback.
    """

    def __init__(self) -> None:
        self.wanted = os.environ.get("HYDRA_FULL_ERROR") != "1"

    def __enter__(self) -> None:
        """Begin to watch for errors."""

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Replace an error of a check by one line."""
        if self.wanted and isinstance(error, Exception) and (line := _for_the_user(error)):
            raise SystemExit(f"error: {line}")


def _for_the_user(error: BaseException) -> str | None:
    """Return the message of a check of flowkit or of Hydra; None for a bug."""
    if _is_hydras(error):
        cause = error.__cause__  # an error of flowkit, if Hydra was building a class of flowkit
        return (_for_the_user(cause) if cause and not _is_hydras(cause) else None) or _plain(error)
    origin = traceback.extract_tb(error.__traceback__)[-1]
    ours = (Path(flowkit.__file__).parent, Path(flowkit.recipes.__path__[0]))
    raised_here = any(folder in Path(origin.filename).parents for folder in ours)
    return str(error) if raised_here and (origin.line or "").startswith("raise ") else None


def _plain(error: BaseException) -> str:
    """Return Hydra's message, shortened to one line for common mistakes on the command line."""
    text = str(error)
    if missing := re.match(r".*Missing mandatory value: (\S+)", text, re.DOTALL):
        return f"{missing[1]} must be given, as {missing[1]}=..."
    if unknown := re.match(r"Could not override '(.+?)'\.", text):
        return f"{unknown[0][:-1]}: there is no such option; see --help"
    if choice := re.match(
        r"(?:In '.*?': )?(Could not find '.+?')\s+Available options in '.*?':(.*?)(?=\nConfig|$)",
        text,
        re.DOTALL,
    ):
        return f"{choice[1]}; choices are {', '.join(choice[2].split())}"
    return text


def _is_hydras(error: BaseException) -> bool:
    """Return True for an error of Hydra or OmegaConf."""
    return type(error).__module__.partition(".")[0] in ("hydra", "omegaconf")


def _errors_to_us() -> None:
    """Make Hydra raise its errors, and catch the errors of a recipe within its task.

    Outside of the task, Hydra would print a line of its own before the message.
    """
    import hydra

    hydra_main, wrap = hydra.main, ErrorInALine()
    hydra.main = lambda *args, **kwargs: lambda task: hydra_main(*args, **kwargs)(wrap(task))
    os.environ["HYDRA_FULL_ERROR"] = "1"


if __name__ == "__main__":
    main()
