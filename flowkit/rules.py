"""Rules of options: kind and range of each value, as the comments of ``conf`` state them.

A comment begins with a rule, and words may follow after a semicolon::

    num_samples: 1000 # int >= 1; samples per cell

======================== =======================================================================
rule                     values that fit
======================== =======================================================================
``int``, ``float``       a whole number, a finite number; with bounds ``0 <= float < 1``
``bool``                 true or false
``text``, ``path``       a string that is not empty
``file``, ``folder``     the path of a file or of a folder that exists
``run folder``           a folder that ``flowkit train`` wrote
``run``                  such a folder, one of ``flowkit push``, or the name of a shared model:
                         ``hub:owner/name``, ``flowkit:name``
``device``               a device of this machine
``part``, ``settings``   a mapping, for a part with the class to build as ``_target_``
``[int >= 1]``           a list of one or more such values; ``[]`` is the empty list
``[float, float]``       a list of as many values
``{text}``               a mapping of names to such values
``euclidean``, ``null``  this word
``float or null``        one of several
======================== =======================================================================

Keys without a rule take any value. The rules hold for the composed configuration, wherever its
values come from. A reference to another option fits always, since the other option has its own
rule. Rules of the keys of a part belong to its class, and hold wherever this class is built.
"""

import math
import operator
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

CONF = Path(str(files("flowkit.conf")))
MISSING = "???"

LINE = re.compile(r'( *)(- )?"?([\w/@]+)"?:(?: ([^#]*?))?(?: *# ([^;]*).*)?')
NUMBER = re.compile(r"(?:([-\d.*]+) (<=?) )?(int|float)(?: (<=?|>=?) ([-\d.*]+))?")
NAMED = re.compile(r"hub:[\w.-]+/[\w.-]+|flowkit:[\w.-]+")  # a model, see `flowkit.hub`
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|hpu|xla|mtia)(:\d+)?")

COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}

Rules = Mapping[tuple[str, str], str]
"""Rules by class and key. The class is empty for keys that count from the top. A key without a
rule has an empty text."""

WORDS = {
    "run folder": "a folder with a config.yaml",
    "run": "a run folder, hub:owner/name or flowkit:name",
    "device": "a device of this machine, such as cpu",
    "file": "a file that exists",
    "folder": "a folder that exists",
    "part": "a part",
    "path": "a path",
    "text": "a text",
    "settings": "a mapping",
    "bool": "true or false",
}


# --- reading ----------------------------------------------------------------------------------


@cache
def rules_of(recipe: str) -> Rules:
    """Return the rules of a recipe's options and of all parts."""
    return _merged(_rules_of_parts(), _rules_of_options(recipe))


@cache
def _rules_of_parts() -> Rules:
    """Return the rules of the files of all groups."""
    texts = [(file.parent.name, file.read_text()) for file in sorted(CONF.glob("*/*.yaml"))]
    return _merged(
        *(
            {(cls, key if cls else f"{group}.{key}"): rule for (cls, key), rule in rules.items()}
            for group, rules in ((group, _declared(text)) for group, text in texts)
        )
    )


def _rules_of_options(recipe: str) -> Rules:
    """Return the rules of a recipe's groups and options, and of the recipes that it extends."""
    text = (CONF / f"{recipe}.yaml").read_text()
    bases = re.findall(r"^  - ([a-z]\w*)$", text, re.MULTILINE)
    return _merged(*map(_rules_of_options, bases), _rules_of_groups(text), _declared(text))


def _merged(*several: Rules) -> Rules:
    """Return all rules; later ones replace earlier ones."""
    found: dict[tuple[str, str], str] = {}
    for rules in several:
        found |= {place: rule for place, rule in rules.items() if rule or place not in found}
    return found


def _rules_of_groups(text: str) -> Rules:
    """Return the rules of the groups in the list of defaults of a recipe's file.

    Without a comment a group must be chosen, unless its default is null.
    """
    found = {}
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if match and match[2]:
            chosen = "part or null" if match[4] == "null" else "part"
            found["", match[3]] = match[5] if _is_rule(match[5]) else chosen
    return found


def _declared(text: str) -> dict[tuple[str, str], str]:
    """Return the rules in the text of a configuration file, which indents by two spaces.

    Experiments and other files of no package of their own hold no rules.
    """
    if "# @package _global_" in text:
        return {}
    found, path, classes = {}, [], {}
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        if not match or match[2]:
            continue
        depth, key, value, rule = len(match[1]) // 2, match[3], match[4], match[5]
        path = [*path[:depth], key]
        classes = {level: name for level, name in classes.items() if level <= depth}
        if key == "_target_":
            classes[depth] = value
        elif path[0] not in ("defaults", "hydra") and not key.startswith("_"):
            top = max(classes, default=0)
            found[classes.get(top, ""), ".".join(path[top:])] = rule if _is_rule(rule) else ""
    return found


def _is_rule(text: str | None) -> bool:
    """Return True for a rule, False for other words of a comment.

    >>> [_is_rule(text) for text in ("int >= 1", "[int or text]", "a or b", "images", "per batch")]
    [True, True, True, False, False]
    """
    alternatives = _split(text or "", " or ")
    return all(
        one in WORDS
        or bool(NUMBER.fullmatch(one))
        or one == "[]"
        or (one[:1] in ("[", "{") and all(map(_is_rule, _split(one[1:-1], ", "))))
        or (len(alternatives) > 1 and bool(re.fullmatch(r"[\w-]+", one)))
        for one in alternatives
    )


# --- checking ---------------------------------------------------------------------------------


def check(recipe: str, config: Mapping[str, Any]) -> None:
    """Require that the values of a composed configuration fit their rules.

    Args:
        recipe: Name of the recipe.
        config: The configuration as a container, with references as text such as ``${seed}``.

    Raises:
        ValueError: If a value does not fit, if a value is missing, or if the recipe has no such
            option.

    >>> check("sample", {"run": "${oc.env:RUN}", "num_samples": 0})
    Traceback (most recent call last):
    ValueError: num_samples must be int >= 1, got 0
    """
    rules, text = rules_of(recipe), str(config)
    for key, rule, value in _values(config, rules):
        if value == MISSING:
            raise ValueError(f"{key} must be given, as {key}=...")
        if ("", key) not in rules and "." not in key and f"${{{key}" not in text:
            known = [name for top, name in rules if not top and "." not in name]
            raise ValueError(
                f"option must exist, got {key}{did_you_mean(key, known, '; see --help')}"
            )
        if rule and not fits(rule, value):
            raise ValueError(
                f"{key} must be {_in_words(rule)}, got {_shown(value)}{_fix(rule, value)}"
            )

    for (cls, key), rule in rules.items():
        if not cls and "." not in key and key not in config and rule != "part or null":
            raise ValueError(f"{key} must stay, got ~{key}")


def keys_of(node: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration."""
    for name, value in node.items():
        yield f"{place}{name}"
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{place}{name}.")


def did_you_mean(name: str, known: list[str], otherwise: str = "") -> str:
    """Return a question with the nearest known name, or with names that it is a word of.

    >>> did_you_mean("eular", ["euler", "heun"]), did_you_mean("ot", ["gibbs", "minibatch_ot"])
    ('; did you mean euler?', '; did you mean minibatch_ot?')
    """
    parts = [one for one in known if name and name in re.split(r"[_.]", one)]
    parts = sorted(parts, key=lambda one: one.rpartition(".")[2] != name)  # optimizer.lr for lr
    near = get_close_matches(name, known, 1) or parts
    return f"; did you mean {' or '.join(near[:3])}?" if near else otherwise


def _values(
    node: Mapping[str, Any], rules: Rules, place: str = "", cls: str = "", inside: str = ""
) -> Iterator[tuple[str, str | None, Any]]:
    """Yield key, rule and value of all nodes."""
    for name, value in node.items():
        key, within = f"{place}{name}", f"{inside}{name}"
        if name == "_target_":
            continue
        yield key, rules.get(("", key)) or rules.get((cls, within)), value
        if isinstance(value, Mapping):
            own = value.get("_target_")
            yield from _values(value, rules, f"{key}.", own or cls, "" if own else f"{within}.")


def fits(rule: str, value: Any) -> bool:
    """Return True if a value fits a rule. A reference fits all rules.

    >>> [fits("int >= 1 or null", value) for value in (1, None, 0, 1.0, "a", True)]
    [True, True, False, False, False, False]
    """
    reference = isinstance(value, str) and "${" in value
    return reference or any(_fits(one, value) for one in _split(rule, " or "))


def _fits(rule: str, value: Any) -> bool:
    """Return True if a value fits a rule without alternatives."""
    if rule == "[]":
        return value == []
    if rule.startswith("["):
        several, values = _split(rule[1:-1], ", "), value if isinstance(value, list) else []
        several = several * len(values) if len(several) == 1 else several
        return 0 < len(values) == len(several) and all(map(fits, several, values))
    if rule.startswith("{"):
        values = value.values() if isinstance(value, Mapping) else []
        return bool(values) and all(fits(rule[1:-1], one) for one in values)
    if number := NUMBER.fullmatch(rule):
        return _in_range(value, *number.groups())
    if rule in WORDS:
        return _of_kind(rule, value)
    return _shown(value) == rule


def _of_kind(kind: str, value: Any) -> bool:
    """Return True if a value is of a kind in `WORDS`."""
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("part", "settings"):
        return isinstance(value, Mapping) and (kind == "settings" or "_target_" in value)
    if not isinstance(value, str) or not value.strip():
        return False
    path = Path(value)
    exists = {"file": path.is_file, "folder": path.is_dir}
    if kind in exists:
        return exists[kind]()
    if kind in ("run folder", "run"):  # to resume a shared model is refused in other words
        return is_run(value) and (kind == "run" or not NAMED.fullmatch(value))
    return kind != "device" or _is_device(value)


def is_run(place: str) -> bool:
    """Return True for a folder with the configuration of a run, or the name of such a model."""
    files = (Path(place) / name for name in ("config.yaml", "config.json"))
    return bool(NAMED.fullmatch(place)) or any(file.is_file() for file in files)


def why_no_run(places: Any) -> str:
    """Return why places are no runs, as the end of an error message.

    >>> why_no_run("runs/typo"), why_no_run(["runs/typo", "hub:owner/name", "runs/other"])
    ('; it does not exist', '; runs/typo, runs/other do not exist')
    """
    several = [str(place) for place in (places if isinstance(places, list) else [places])]
    wrong = [place for place in several if not is_run(place)]
    absent = [place for place in wrong if not Path(place).exists()]
    if not wrong:  # a shared model, where only a run folder fits
        return ""
    if not absent:
        return f"; {_named(wrong, several)} {'have' if len(wrong) > 1 else 'has'} no config.yaml"
    return f"; {_named(absent, several)} {'do' if len(absent) > 1 else 'does'} not exist"


def _named(some: list[str], several: list[str]) -> str:
    """Return some of several places for a message that has just named all of them."""
    return "it" if len(several) == 1 else ", ".join(some)


def _is_device(name: str) -> bool:
    """Return True for a device of this machine, after a test allocation."""
    if name == "cpu" or not DEVICE.fullmatch(name):
        return name == "cpu"
    from flowkit.checks import usable_device  # it brings torch, for which few commands must wait

    try:
        usable_device(name)
    except ValueError:
        return False
    return True


def _in_range(
    value: Any, low: str | None, above: str | None, kind: str, sign: str | None, bound: str | None
) -> bool:
    """Return True for a number of a kind within bounds, such as ``0 < float <= 1``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind == "float" and isinstance(value, float) and math.isfinite(value))):
        return False
    from_below = above is None or COMPARE[above](_number(low), value)
    return from_below and (sign is None or COMPARE[sign](value, _number(bound)))


def _number(text: str | None) -> float:
    """Return the number that a bound states, such as ``2**32``."""
    base, _, power = str(text).partition("**")
    return float(base) ** float(power or 1)


def _split(text: str, separator: str) -> list[str]:
    """Split a text at a separator that is not within brackets.

    >>> _split("[int or text] or null", " or ")
    ['[int or text]', 'null']
    """
    parts: list[str] = []
    for piece in text.split(separator):
        if parts and sum(map(parts[-1].count, "[{")) > sum(map(parts[-1].count, "]}")):
            parts[-1] += separator + piece
        else:
            parts.append(piece)
    return parts


# --- messages ---------------------------------------------------------------------------------


def _in_words(rule: str) -> str:
    """Return a rule for an error message, with its kinds in words."""
    kinds = "|".join(WORDS)
    return re.sub(rf"(?<!\w)({kinds})(?!\w)", lambda kind: WORDS[kind[0]], rule)


def _shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(one)}' for key, one in value.items())}}}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value) if value != "" else "an empty text"


def _fix(rule: str, value: Any) -> str:
    """Return advice for common mistakes, as the end of an error message."""
    kinds = _split(rule, " or ")
    if value and isinstance(value, str | list) and {"run", "[run]", "run folder"} & set(kinds):
        return why_no_run(value)
    if isinstance(value, str):
        words = [one for one in kinds if one not in WORDS and re.fullmatch(r"[\w-]+", one)]
        listed = any(one[0] == "[" and fits(one, [value]) for one in kinds)
        return did_you_mean(value, words) or (f"; write [{value}]" if listed and value else "")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and value.is_integer() and fits(rule, int(value)):
            return f"; write {int(value)}"
        alone = any(re.search(r"\b(int|float)\b", one) and one[0] != "[" for one in kinds)
        if not alone and any(one[0] == "[" and fits(one, [value]) for one in kinds):
            return f"; write [{value}]"
        if "path" in kinds:
            return f"; write ./{value}"
    return ""
