"""The command ``flowkit <recipe> [option=value ...]``. Every file of the recipes is a recipe."""

import ast
import os
import re
import runpy
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn, cast

import flowkit.recipes
from flowkit import __version__
from flowkit.errors import ErrorInALine, errors_to_us, is_hydras
from flowkit.hub import check_name, results_of
from flowkit.places import (
    FILES,
    check_exist,
    check_writable,
    choice_of_group,
    files_as_option,
    no_such_option,
)
from flowkit.rules import (
    CONF,
    check,
    did_you_mean,
    fits,
    keys_of,
    rules_of,
)
from flowkit.stopping import stops_in_a_line

EXPERIMENTS = CONF / "experiment"

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
    if name in (None, "-h", "--help"):
        print("usage: flowkit <recipe> [option=value ...]\n")
        width = max(map(len, known))
        for recipe, line in known.items():
            print(f"  {recipe:<{width}}  {line}")
        print("\n`flowkit <recipe> --help` lists the options of a recipe and their choices.")
        print("`flowkit train model=dit --help` also explains this choice and its options.")
        print("`flowkit --version` prints the version.")
        return
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    with stops_in_a_line(str(name)), ErrorInALine():
        check_recipe(name, list(known))
        del sys.argv[1]
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(explained(name, [argument for argument in sys.argv[1:] if "=" in argument]))
            return
        sys.argv[1:] = files_as_option(name, sys.argv[1:])
        sys.argv[1:] = [null_of_group(name, argument) for argument in sys.argv[1:]]
        sys.argv[1:] = [choice_of_group(name, argument) for argument in sys.argv[1:]]
        if any(argument.startswith("resume=") for argument in sys.argv):
            sys.argv[1:] = [of_a_part(argument) for argument in sys.argv[1:]]
        import hydra

        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # so that a _target_ may name a user's own class
        with no_empty_folder(check_command(name, sys.argv[1:])):
            hydra.main = errors_to_us(hydra.main)
            runpy.run_module(f"flowkit.recipes.{name}", run_name="__main__", alter_sys=True)


def explained(name: str, chosen: Sequence[str] = ()) -> str:
    """Return the help of a recipe: its docstring, its groups, its options with their comments.

    Hydra's own help lists the groups of all recipes, and no comments.

    Args:
        name: Name of the recipe.
        chosen: Choices as ``group=choice``, whose files follow with their comments.
    """
    from omegaconf import OmegaConf

    folder = Path(flowkit.recipes.__path__[0])
    text = (CONF / f"{name}.yaml").read_text()
    choices, parts = [], {}
    for entry in OmegaConf.create(text).defaults:
        key, default = next(iter(entry.items())) if not isinstance(entry, str) else (entry, None)
        group = key.removeprefix("override ").lstrip("/")
        folder_of_group = CONF / group.partition("@")[0]
        every = sorted(file.stem for file in folder_of_group.glob("*.yaml"))
        names = experiments(name) if group == "experiment" else every
        parts |= {f"{group}={choice}": folder_of_group / f"{choice}.yaml" for choice in names}
        if names:
            line = f"{group}={'null' if default is None else default}  # {', '.join(names)}"
            choices.append(fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
    options = text[text.index("\n\n") :].partition("\nhydra:")[0].strip()
    about = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())) or ""
    title = "Groups, with the default and all choices:"
    listed = "\n".join([title, "", *choices, "", ""]) if choices else ""
    files = [
        f"{part}:\n\n{parts[part].read_text().strip()}\n\n" for part in chosen if part in parts
    ]
    return (
        f"{about}\n\n{listed}Options, with their defaults (??? must be given):\n\n{options}\n\n"
        f"{''.join(files)}"
        f"`flowkit {name} --cfg job` prints the whole configuration with the chosen groups."
    )


# --- checks before the slow imports of a recipe -----------------------------------------------


def check_recipe(name: str, known: list[str]) -> None:
    """Require the name of a recipe.

    Raises:
        ValueError: If there is no such recipe.
    """
    if name not in known:
        now = f"; it is now `{FORMER[name]}`" if name in FORMER else did_you_mean(name, known)
        raise ValueError(f"recipe must be one of {', '.join(known)}, got {name}{now}")


def null_of_group(recipe: str, argument: str) -> str:
    """Return ``~group`` for ``group=null``, which Hydra does not understand.

    Raises:
        ValueError: If the recipe needs a choice of this group.

    >>> null_of_group("train", "lr_scheduler=null"), null_of_group("train", "guidance=null")
    ('~lr_scheduler', 'guidance=null')
    """
    group, _, value = argument.partition("=")
    if value != "null" or not (CONF / group).is_dir():
        return argument
    if not fits(rules_of(recipe).get(("", group), "null"), None):
        fix = f"; {group}.<part>=null removes a part" if group in ("logger", "callback") else ""
        raise ValueError(f"{group} must be a choice, got null{fix}")
    return f"~{group}"


def of_a_part(argument: str) -> str:
    """Return ``++key=value`` for a value of a part.

    A resumed run has parts of its own, whose keys the default parts may not have. Hydra would
    refuse these keys. `flowkit.runs.resuming.resumed` looks for them in the run.

    >>> of_a_part("data.root=photos"), of_a_part("hydra.run.dir=new"), of_a_part("seed=1")
    ('++data.root=photos', 'hydra.run.dir=new', 'seed=1')
    """
    return re.sub(r"^(?!hydra\.)(?=\w+\.[\w.]+=)", "++", argument)


def check_command(recipe: str, arguments: list[str]) -> Path | None:
    """Compose the configuration of a command line, and check all its values.

    Swept values of ``--multirun`` are checked one after another. A command that only prints a
    configuration is not checked, and neither is a configuration file of the user's own.

    Returns:
        The folder that Hydra will make, if there is a single one.

    Raises:
        TypeError, ValueError, OSError: If the command line is wrong.
    """
    args = parsed(arguments)
    if args.resolve and not args.cfg:
        raise ValueError("--resolve must stand beside --cfg, got none; write --cfg job --resolve")
    if args.shell_completion:
        raise ValueError("--shell-completion must be absent: flowkit has no completion of shells")
    check_former(recipe, args.overrides)
    check_experiment(recipe, args)
    for override in args.overrides:
        if "=" not in override and not override.startswith("~"):
            run = f"; for example run={override}" if Path(override).exists() else ""
            raise ValueError(f"options must be name=value, got {override}{run}")
    if args.cfg or args.info or args.config_path or args.config_name:
        return None
    folder = None
    for overrides in _runs(args):
        folder = _check_composed(recipe, args.config_dir, overrides)
    return None if args.multirun else folder


def parsed(arguments: list[str]) -> Namespace:
    """Parse Hydra's own options.

    Raises:
        ValueError: If there is no such option.
    """
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"command line must be understood, got {' '.join(arguments)}: {message}")

    parser = get_args_parser()
    parser.error = refuse
    return parser.parse_args(arguments)


def _runs(args: Namespace) -> Iterator[list[str]]:
    """Yield the overrides of the runs of a command line, so that each swept value occurs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not args.multirun:
        yield args.overrides
        return
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [text]
        for text, override in zip(
            args.overrides, OverridesParser.create().parse_overrides(args.overrides), strict=True
        )
    ]
    for number in range(max(map(len, choices), default=1)):
        yield [values[min(number, len(values) - 1)] for values in choices]


def _check_composed(recipe: str, own: str | None, overrides: list[str]) -> Path | None:
    """Compose a configuration and check it; return the folder that Hydra will make."""
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    import flowkit.recipes._resolvers  # noqa: F401  # the folder may call one

    if own is not None:
        if not Path(own).is_dir():
            raise NotADirectoryError(f"--config-dir must be a folder, got {own}")
        if any(override.startswith("hydra.searchpath") for override in overrides):
            return None
        overrides = [f"hydra.searchpath=['file://{Path(own).absolute()}']", *overrides]
    folder = None
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        cfg = _composed(recipe, overrides)
        HydraConfig.instance().set_config(cfg)
        values: Any = OmegaConf.to_container(cfg)
        values.pop("hydra")
        if values.get("resume") and "_target_" not in (values["lr_scheduler"] or {}):
            values["lr_scheduler"] = None  # values alone, for the schedule of the run
        check(recipe, values)
        name = None
        with suppress(Exception):  # a reference that only the run itself can follow
            name = cfg.hydra.run.dir
        if name == "":
            raise ValueError("hydra.run.dir must be a folder, got an empty text")
        folder = None if name is None else Path(name)
    if option := FILES.get(recipe):
        check_exist(values[option], option)
    _check_places(values, folder)
    return folder


def _check_places(values: dict[str, Any], folder: Path | None) -> None:
    """Require that the folders can be written to which the results go."""
    out, run, to = values.get("out"), values.get("run"), values.get("to")
    if to and to.startswith("hub:"):  # of flowkit push
        check_name(to.removeprefix("hub:"), "to=hub:")
    elif to:
        check_writable(Path(to), "to")
    if isinstance(run, list):  # of flowkit report
        run, out = None, out or "runs/report"
    if "out" in values and out is None and run is not None:
        check_writable(results_of(run), "run", "; choose another folder by out=")
    elif out and "${" not in str(out):
        file = Path(out).suffix == ".npz"  # of flowkit statistics
        check_writable(Path(out).parent if file else Path(out), "out")
    elif folder and str(folder) == values.get("pipeline"):
        check_writable(folder, "pipeline", "; choose another folder by out=")
    elif folder:
        check_writable(folder, "hydra.run.dir")


def _composed(recipe: str, overrides: list[str]) -> Any:
    """Compose a configuration; an error names the nearest option."""
    from hydra import compose
    from omegaconf import OmegaConf

    try:
        return compose(recipe, overrides, return_hydra_config=True)
    except Exception as error:
        if unknown := re.match(r"Could not override '(.+?)'", str(error)):
            full = re.search(r"full_key: (\S+)", str(error.__cause__))
            key = full[1] if full else unknown[1]
            if f"~{key}" in overrides:
                raise ValueError(f"{key} must stay, got ~{key}") from error
            if rules_of(recipe).get(("", key.rpartition(".")[0]), "").startswith("{"):
                raise ValueError(f"{key} must be added with a plus sign, as +{key}=...") from error
            rest = [o for o in overrides if o.lstrip("+~").partition("=")[0] != unknown[1]]
            known = keys_of(cast(Any, OmegaConf.to_container(compose(recipe, rest))))
            groups = [name for top, name in rules_of(recipe) if not top and (CONF / name).is_dir()]
            raise ValueError(no_such_option(key, [*known, *groups])) from error
        if not is_hydras(error):
            text = " ".join(overrides)
            raise ValueError(f"options must be name=value, got {text}: {error}") from error
        raise


def check_former(recipe: str, overrides: list[str]) -> None:
    """Refuse options of earlier versions, and name their replacement.

    Raises:
        ValueError: If an option has another name or another meaning now.
    """
    for override in overrides:
        option = override.partition("=")[0].lstrip("+~")
        if now := FORMER.get(f"{recipe} {option}"):
            raise ValueError(f"{option} must be given as {now}, got {override}")


def check_experiment(recipe: str, args: Namespace) -> None:
    """Require ``experiment`` to be an experiment of this recipe, or a file of the user.

    Files of the user are ``<folder>/experiment/<name>.yaml`` for the folder after
    ``--config-dir``. If other options give Hydra other folders, Hydra makes the check.

    Raises:
        ValueError: If the experiment belongs to another recipe, or if no file has this name.
    """
    own = experiments(recipe)
    if args.config_path or any(o.startswith("hydra.searchpath=") for o in args.overrides):
        return
    asked = [o.removeprefix("experiment=") for o in args.overrides if o.startswith("experiment=")]
    for name in ",".join(asked).replace("'", "").replace('"', "").split(","):  # several in a sweep
        plain = name not in ("", "null") and not set(name) & set("[]${}")
        users = args.config_dir and Path(args.config_dir, "experiment", f"{name}.yaml").is_file()
        if not plain or name in own or users:
            continue
        file = EXPERIMENTS / f"{name}.yaml"
        if file.is_file() and (other := _recipe_of(file)):
            fix = f"; it belongs to {other}: flowkit {other} experiment={name}"
        elif own:
            fix = f"; choices are {', '.join(own)}{did_you_mean(name, own)}"
        else:
            continue  # Hydra's own error says that there is no such option
        raise ValueError(f"experiment must be an experiment of {recipe}, got {name}{fix}")


# --- the run, and its errors ------------------------------------------------------------------


@contextmanager
def no_empty_folder(folder: Path | None) -> Iterator[None]:
    """Remove a folder, and its parents, that the command has made and left empty."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    paths = [] if folder is None else [folder, *folder.absolute().parents]
    made = [path for path in paths if not path.exists()]
    try:
        yield
    finally:
        # A time in its name may be a second later than in the checked configuration.
        config: Any = HydraConfig.instance().cfg or OmegaConf.create()
        name = OmegaConf.select(config, "hydra.runtime.output_dir", throw_on_missing=False)
        if made and name is not None:
            made[0] = Path(name)
        for path in made:
            with suppress(OSError):  # it is not empty, or was not made
                path.rmdir()


if __name__ == "__main__":
    main()
