"""Lines of a diagnosis."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of a diagnosis.

    >>> Finding("round trip", True, "error 0.2 %", "").ok
    True
    """

    name: str
    """Name of the line."""
    ok: bool
    """False for an alarm."""
    figure: str
    """The number that was measured, with its unit."""
    advice: str
    """Advice; empty without an alarm."""


def line(name: str, alarm: bool, figure: str, advice: str) -> Finding:
    """Return a finding, with its advice only if it is an alarm."""
    return Finding(name, not alarm, figure, advice if alarm else "")


def percent(share: float) -> str:
    """Return a share as text.

    >>> percent(0.0123), percent(1.5), percent(1e-6), percent(-0.5)
    ('1.2 %', '150 %', '0.0001 %', '-50 %')
    """
    size = abs(100 * share)
    if size < 1:
        return f"{100 * share:.1g} %"
    return f"{100 * share:.1f} %" if size < 10 else f"{100 * share:.0f} %"
