"""Files, folders and choices that a command line names."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from flowkit.rules import CONF, did_you_mean, keys_of, rules_of

FILES = {"explain": "records", "table": "runs"}  # recipes whose arguments without a name are files


def files_as_option(recipe: str, arguments: list[str]) -> list[str]:
    """Return the arguments with plain names of files as an option, where a recipe takes files.

    >>> files_as_option("explain", ["a/metrics.json", "b.json", "value=precision"])
    ['records=["a/metrics.json","b.json"]', 'value=precision']
    """
    option = FILES.get(recipe)
    files = [one for one in arguments if "=" not in one and not one.startswith(("-", "~", "+"))]
    if option is None or not files:
        return arguments
    quoted = ",".join('"' + file.replace("\\", r"\\").replace('"', r"\"") + '"' for file in files)
    return [f"{option}=[{quoted}]", *(one for one in arguments if one not in files)]


def check_exist(places: Sequence[str | Path], key: str) -> None:
    """Require files or folders, and name all that are not there.

    Args:
        places: The files or folders.
        key: Name of their option, for the error.

    Raises:
        FileNotFoundError: If some do not exist.
    """
    if absent := [str(place) for place in places if not Path(place).exists()]:
        listed = ", ".join(absent)
        raise FileNotFoundError(f"{key} must be files or folders that exist, got no {listed}")


def shown(place: Path) -> Path:
    """Return a path as it is printed: relative to the working folder, if it lies there.

    >>> shown(Path.cwd() / "runs" / "a"), shown(Path("runs/a"))
    (PosixPath('runs/a'), PosixPath('runs/a'))
    """
    whole = Path(os.path.abspath(place))
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole


def choice_of_group(recipe: str, argument: str) -> str:
    """Return ``group@key=choice`` for ``key=choice``, where a key names a choice or a path.

    Raises:
        ValueError: If the recipe has such a key, and there is neither the choice nor the path.

    >>> choice_of_group("evaluate", "reference=digits"), choice_of_group("evaluate", "seed=1")
    ('data@reference=digits', 'seed=1')
    """
    key, _, value = argument.partition("=")
    rules = rules_of(recipe)
    group = next((name for top, name in rules if not top and name.endswith(f"@{key}")), None)
    takes_paths = rules.get(("", key), "").startswith("path or part")
    if group is None or not takes_paths or value == "null" or not re.fullmatch(r"[\w.-]+", value):
        return argument
    if value in choices_of(group):
        return f"{group}={value}"
    if not Path(value).exists():
        raise ValueError(no_such_place(key, value, group))
    return argument


def choices_of(group: str) -> list[str]:
    """Return the choices of a group, which may have a key as in ``data@reference``."""
    return sorted(file.stem for file in (CONF / group.partition("@")[0]).glob("*.yaml"))


def no_such_place(key: str, value: str, group: str) -> str:
    """Return the message for a value that is neither a path nor a choice of a group."""
    choices = choices_of(group)
    fix = did_you_mean(value, choices, f"; a relative path counts from {Path.cwd()}")
    return (
        f"{key} must be a file or folder that exists, or one of {', '.join(choices)}, got "
        f"{value}{fix}"
    )


def no_such_option(key: str, known: list[str]) -> str:
    """Return the message for an option that does not exist, with those that may be meant.

    Args:
        key: The option.
        known: The options that exist in this command, with the classes of its parts.
    """
    options = [name for name in known if not name.endswith("_target_")]
    if key in ("steps", "sampler.steps") and "sampler.grid" in options:
        fix = "; the number of steps is sampler.grid"
    elif choices := _with_option(key, known):
        fix = f"; it belongs to {choices}"
    else:
        fix = did_you_mean(key, options, "; see --help")
    return f"option must exist, got {key}{fix}"


def _with_option(key: str, known: list[str]) -> str:
    """Return the choices of a group that have an option, in words; nothing if there are none.

    >>> _with_option("sampler.rtol", ["sampler", "sampler._target_"])
    'sampler=bosh3, dopri5 or dopri8'
    """
    import yaml

    group, _, option = key.partition(".")
    inside = [name for name in known if name.startswith(f"{group}.")]
    settings = inside and not any(name.endswith("._target_") for name in inside)
    if group not in known or settings or not option:
        return ""
    files = {choice: CONF / group / f"{choice}.yaml" for choice in choices_of(group)}
    names = [c for c, f in files.items() if option in keys_of(yaml.safe_load(f.read_text()) or {})]
    listed = " or ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
    return f"{group}={listed}" if names else ""


def check_writable(folder: Path, key: str, fix: str = "") -> None:
    """Require a folder that can be written or created, by a test file.

    Args:
        folder: The folder.
        key: Name of its option, for the error.
        fix: Advice at the end of the error message.

    Raises:
        PermissionError: If it cannot.
        ValueError: If it is the name of a model, such as ``flowkit:digits``.
    """
    if str(folder).startswith(("hub:", "flowkit:")):  # no place that a run is read from
        more = " or hub:owner/name" if key == "to" else ""
        raise ValueError(f"{key} must be a folder{more}, got {folder}, the name of a shared model")
    made = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with TemporaryFile(dir=made):
            pass
    except OSError as error:
        raise PermissionError(f"{key} must be a writable folder, got {folder}{fix}") from error
