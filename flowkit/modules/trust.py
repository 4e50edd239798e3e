"""The code that a stored configuration may call: listed by flowkit, or trusted by the user.

Configurations of run folders, and the ``source`` of caches and pairs, may come from other people.
`check` walks such a configuration before anything is imported or called for it. Names are looked up
by `listed.find`. The user trusts other names by an argument, by an option, or by a file of his own.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flowkit.modules.listed import ARGUMENTS, REFUSED, find

CONTROLS = {"_target_", "_args_", "_partial_", "_convert_", "_recursive_"}

# A reference to a variable of the environment: the only one in a resolved configuration.
VARIABLE = re.compile(r"\$\{(oc\.env:(\w+))(?:,([^${}]*))?\}")
# The beginning of a reference in an unresolved configuration: to another node, or a resolver.
REFERENCE = re.compile(r"\$\{(?:[\w.\[\]]+\}|(oc\.env:\w+|hydra:[\w.]+|[\w.]+(?=:)))")
RESOLVERS = {
    *("flat", "now", "oc.select", "one_more_channel", "quarter", "run_folder"),
    "hydra:runtime.output_dir",
}

_given: ContextVar[frozenset[str]] = ContextVar("trust", default=frozenset())


def trust_file() -> Path:
    """Return the user's file of trusted names, ``~/.config/flowkit/trust.txt``.

    ``XDG_CONFIG_HOME`` may name another folder than ``~/.config``.
    """
    chosen = Path(os.environ.get("XDG_CONFIG_HOME", ""))  # by its standard, absolute or ignored
    return (chosen if chosen.is_absolute() else Path.home() / ".config") / "flowkit" / "trust.txt"


def trusted() -> frozenset[str]:
    """Return the names that the user trusts: by `trusting`, or as a line of the user's file."""
    file = trust_file()
    lines = file.read_text().splitlines() if file.is_file() else []
    return _given.get() | {name for line in lines if (name := line.partition("#")[0].strip())}


@contextmanager
def trusting(names: Sequence[str]) -> Iterator[None]:
    """Trust further names in a ``with`` block.

    Args:
        names: Dotted names as in the configuration, or ``oc.env:NAME`` for a variable of the
            environment. A single name may be a string.

    Raises:
        ValueError: If a name is not a dotted name.

    >>> with trusting(["fractions.Fraction"]):
    ...     check({"_target_": "fractions.Fraction"}, "module.path")
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if not re.fullmatch(r"[\w.]+(:[\w.]+)?", str(name)):
            raise ValueError(f"trust must be a list of dotted names, got {name!r}")
    token = _given.set(_given.get() | set(names))
    try:
        yield
    finally:
        _given.reset(token)


def check(node: Any, place: str, resolved: bool = True) -> None:
    """Require that a stored configuration names only what is listed or trusted.

    Args:
        node: Dictionaries, lists, texts, numbers and None, as read from a file.
        place: Name of the node, for the error.
        resolved: False for a configuration with references to its nodes.

    Raises:
        ValueError: If a name is neither listed nor trusted. The error holds nodes and names, and
            what to write to trust them.

    >>> check({"_target_": "os.system", "command": "ls"}, "module.path")
    Traceback (most recent call last):
    ...
    ValueError: stored configuration must name only what flowkit lists or you trust, got
    module.path._target_: os.system; ...
    """
    wrong = list(_untrusted(node, place, resolved, trusted()))
    if not wrong:
        return
    got = ", ".join(f"{where}: {value}" for where, value, _ in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    names = list(dict.fromkeys(name for _, _, name in wrong if name))
    fix = f"if you know and trust this code: trust=[{','.join(names)}], in Python trust={names}, "
    fix += f"or each name as a line of {trust_file()}"
    raise ValueError(
        "stored configuration must name only what flowkit lists or you trust, got "
        f"{got}{more}; {fix if names else 'remove it, since nothing allows it'}"
    )


Untrusted = tuple[str, Any, str | None]


def _untrusted(node: Any, place: str, resolved: bool, known: frozenset[str]) -> Iterator[Untrusted]:
    """Yield the place and the value of all that is not allowed, and the name that would allow it.

    The name is None if nothing allows the value.
    """
    if isinstance(node, str) and "${" in node:
        names = _variables(node) if resolved else _references(node)
        yield from ((place, node, name) for name in names if name not in known)
    elif isinstance(node, list):
        for k, item in enumerate(node):
            yield from _untrusted(item, f"{place}[{k}]", resolved, known)
    elif isinstance(node, dict):
        target = node.get("_target_", "")
        if not isinstance(target, str) and (resolved or target is not None):
            yield f"{place}._target_", target, None
        elif target and target not in known:
            yield from _unlisted(node, target, place)
        for key, value in node.items():
            if key != "_target_":
                yield from _untrusted(value, f"{place}.{key}", resolved, known)
    elif not isinstance(node, str | int | float | None):
        yield place, type(node).__name__, None  # nothing else is looked into


def _unlisted(node: dict[Any, Any], target: str, place: str) -> Iterator[Untrusted]:
    """Yield the target of a node if it is not listed, and arguments that it may not have."""
    if find(target) is None:
        dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target)
        yield f"{place}._target_", target, target if dotted else None
    allowed = _arguments(node)
    for key in node.keys() - CONTROLS:
        if key in REFUSED or (allowed is not None and key not in allowed):
            yield f"{place}.{key}", node[key], None


def _arguments(node: Any) -> tuple[str, ...] | None:
    """Return the names of the arguments that a node may have; None if it may have all.

    The arguments of a `functools.partial` are those of the object that it will call.
    """
    if not isinstance(node, dict):
        return ()  # a reference, whose node is not known here
    if node.get("_target_") != "functools.partial":
        found = find(str(node.get("_target_")))  # whatever name it is known by
        same = (allowed for name, allowed in ARGUMENTS.items() if find(name) == found)
        return None if found is None else next(same, None)
    inner = node.get("_args_")
    return _arguments(inner[0]) if isinstance(inner, list) and inner else ()


def _variables(text: str) -> Iterator[str | None]:
    """Yield the variables of the environment that a text names, and None for other references."""
    yield from (found[1] for found in VARIABLE.finditer(text))
    if "${" in VARIABLE.sub("", text):
        yield None


def _references(text: str) -> Iterator[str | None]:
    """Yield the variables and foreign resolvers of a text, and None for what could hide a name.

    A literal dictionary in a reference could hold a ``_target_``, and the name of a resolver or of
    a node could be a reference itself.
    """
    names = (found[1] for found in REFERENCE.finditer(text))
    yield from (name for name in names if name and name not in RESOLVERS)
    if "{" in REFERENCE.sub("", text):
        yield None


def substituted(text: str) -> str:
    """Put the values of variables of the environment into a checked text.

    Raises:
        ValueError: If a variable without a default is not set.
    """

    def value(found: re.Match[str]) -> str:
        if (value := os.environ.get(found[2], found[3])) is None:
            raise ValueError(f"{found[2]} must be set in the environment, got no value")
        return value

    return VARIABLE.sub(value, text)
