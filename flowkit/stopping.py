"""Commands that Ctrl-C or a signal stops: their exit status, and a line that says how to go on."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CONTINUED = ("compare", "encode", "evaluate", "pairs", "report", "sample", "tokens")
"""Recipes that keep finished parts on the disk."""
TRAINING = ("autoencoder", "blockwise", "train")


class Stopped(SystemExit):
    """End of a command that a signal has stopped, after its work was saved.

    The exit status is that of a shell: 128 plus the number of the signal. So scripts see that the
    work is not finished.

    Args:
        number: Number of the signal, for example 15 for SIGTERM.
        message: A line that says how to go on.

    >>> Stopped(signal.SIGTERM, "continue with resume=runs/mine").code
    143
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        """Return the message."""
        return self.message


@contextmanager
def stops_in_a_line(recipe: str) -> Iterator[None]:
    """End with one line on the error stream if Ctrl-C or a signal stops a recipe.

    Raises:
        SystemExit: With status 130 for Ctrl-C.

    >>> with stops_in_a_line("sample"):
    ...     raise KeyboardInterrupt
    Traceback (most recent call last):
    ...
    flowkit.stopping.Stopped: stopped; the same command continues
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        line = _line(error, recipe)
        if line is None:
            raise
        sys.stderr.write(f"\n{line}\n")
        if isinstance(error, Stopped):
            raise
        raise Stopped(signal.SIGINT, line) from None


def _line(error: Any, recipe: str) -> str | None:
    """Return the line for an error; None if it is no stop, or one that the first process tells."""
    # Lightning turns Ctrl-C into an exit of its own.
    by_lightning = isinstance(error.__context__, KeyboardInterrupt)
    if isinstance(error, SystemExit) and not by_lightning and not isinstance(error, Stopped):
        return None
    if isinstance(error, Stopped) and error.code == 0:
        return None
    if recipe in CONTINUED:
        return "stopped; the same command continues"
    if isinstance(error, Stopped):
        return str(error)
    if recipe in TRAINING:
        return "stopped; a run with a checkpoint continues with resume=<run folder>"
    return "stopped; the same command starts again"
