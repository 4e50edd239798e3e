"""Errors of the command line, as one line for the user."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any

from flowkit import recipes
from flowkit.places import no_such_option
from flowkit.rules import did_you_mean

OURS = (Path(__file__).parent, Path(recipes.__path__[0]))
FULL_ERROR = "HYDRA_FULL_ERROR"  # variable of the environment
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
WRONG = 2  # exit status of a wrong command line, as in argparse


class ErrorInALine(ContextDecorator):
    """End with ``error: ...`` and status 2 if a check of flowkit or a configuration fails.

    Any other error is a bug and keeps its traceback. With the environment variable
    ``HYDRA_FULL_ERROR=1`` all errors keep their traceback.
    """

    def __init__(self) -> None:
        self.wanted = os.environ.get(FULL_ERROR) != "1"

    def __enter__(self) -> None:
        """Begin to watch for errors."""

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Replace an error of a check by one line."""
        if self.wanted and isinstance(error, Exception) and (line := line_of(error)):
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(WRONG)


def line_of(error: BaseException) -> str | None:
    """Return the message of a check of flowkit, of Hydra or of the system; None for a bug."""
    if is_hydras(error):
        cause = error.__cause__  # an error of flowkit, if Hydra was building a class of flowkit
        own = line_of(cause) if cause and not is_hydras(cause) else None
        return own or _plain(error)
    if isinstance(error, OSError) and (line := _of_the_system(error)):
        return line
    origin = traceback.extract_tb(error.__traceback__)[-1]
    raised_here = any(folder in Path(origin.filename).parents for folder in OURS)
    if raised_here and (origin.line or "").startswith("raise "):
        return str(error)
    return None


def _of_the_system(error: OSError) -> str | None:
    """Return the message of an error of the system; None for errors with a message of ours."""
    if error.filename is None and error.errno not in UNWRITTEN:
        return None
    rule = "written whole" if error.errno in UNWRITTEN else "usable"
    return f"{error.filename or 'files'} must be {rule}, got {error.strerror}"


def _plain(error: BaseException) -> str:
    """Return the message of Hydra or OmegaConf as one line."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    place = next((line[10:].strip() for line in lines if line.startswith("full_key:")), "")
    if missing := re.match(r".*Missing mandatory value: (\S+)", text, re.DOTALL):
        return f"{missing[1]} must be given, as {missing[1]}=..."
    if choice := re.match(r"(?:In '.*?': )?Could not find '(.+)/(.+?)'", text):
        group, name = choice.groups()
        listed = re.search(r"Available options in '.*?':(.*?)(?=\nConfig|$)", text, re.DOTALL)
        choices = listed[1].split() if listed else []
        return (
            f"{group} must be one of {', '.join(choices)}, got {name}{did_you_mean(name, choices)}"
        )
    if unknown := re.match(r"Could not override '(.+?)'\.", text):
        return no_such_option(unknown[1], [])
    if target := re.match(r"Error locating target '(.*?)'", text):
        reason = " ".join(str(error.__cause__ or "").split())
        return f"{place}._target_ must be a class, got {target[1]}: {reason}".lstrip(".")
    if built := re.match(r"Error in call to target '(.*?)'", text):
        reason = " ".join(str(error.__cause__ or lines[1:2]).split())
        return f"values of {place or built[1]} must fit, got an error: {reason}"
    if sweep := re.match(r"Ambiguous value for argument '(.*?)=(.*)'", text):
        key, value = sweep.groups()
        return f"{key} must be one value, got {value}; a list is [{value}], or add --multirun"
    if (override := getattr(error, "override", None)) is not None:  # it has no grammar
        reason = lines[1] if lines[0].startswith("Error parsing") else lines[0]
        return f"options must be name=value, got {override}: {reason}"
    return " ".join(line for line in lines if not re.match(r"(object|reference)_type=", line))


def is_hydras(error: BaseException) -> bool:
    """Return True for an error of Hydra or OmegaConf."""
    return type(error).__module__.partition(".")[0] in ("hydra", "omegaconf")


def errors_to_us(hydra_main: Callable[..., Any]) -> Callable[..., Any]:
    """Make Hydra raise its errors; return its ``main``, with errors caught within the task.

    Outside of the task, Hydra would print a line of its own before the message. Within the task,
    the environment is that of the user, since the processes of other devices inherit it.
    """
    wrap, users = ErrorInALine(), os.environ.get(FULL_ERROR)

    def within(task: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @wraps(task)
        def run(cfg: Any) -> Any:
            with _environment(FULL_ERROR, users):
                return task(cfg)

        return wrap(run)

    os.environ[FULL_ERROR] = "1"
    return lambda *args, **kwargs: lambda task: hydra_main(*args, **kwargs)(within(task))


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set a variable of the environment, or with None remove it, for a while."""
    before = os.environ.pop(name, None)
    try:
        if value is not None:
            os.environ[name] = value
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before
