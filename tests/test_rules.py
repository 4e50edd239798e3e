"""Rules of options: their grammar, and their agreement with the configuration and the classes."""

import inspect
import math
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

import pytest
import yaml
from hydra.utils import get_object

from flowkit import rules
from flowkit.rules import check, fits, rules_of
from tests.conftest import CONF

FILES = sorted(Path(CONF).rglob("*.yaml"))


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("int", [0, -3, 10**400], [1.0, "1", True, None, [1]]),
        ("int >= 1", [1, 2**40], [0, -1, 1.5, math.nan]),
        ("0 <= int < 2**32", [0, 2**32 - 1], [-1, 2**32]),
        ("float", [1, -0.5, 1e-9], [math.nan, math.inf, "1", True]),
        ("float > 0", [1e-300, 3], [0, -1e-300]),
        ("0 < float < 1", [0.5], [0, 1, 0.0, 1.0]),
        ("-1 <= float <= 1", [-1, 1, 0.3], [-1.01, 1.01]),
        ("bool", [True, False], [0, 1, "true", None]),
        ("text", ["a", "1"], ["", " ", 1, None, ["a"]]),
        ("null", [None], ["null ", 0, False, ""]),
        ("1 or 3", [1, 3], [2, True, 1.0]),
        ("float >= 0 or inf", [0, math.inf], [-math.inf, math.nan]),
        ("euclidean or inner", ["inner"], ["Inner", "euclid", None, ["inner"]]),
        ("[int >= 1]", [[1], [2, 3]], [[], [0], [1, 1.5], 1, "1", {"a": 1}]),
        ("[] or [text]", [[], ["a"]], [[1], "a", None]),
        ("[0 <= float < 1, 0 <= float < 1]", [[0.9, 0.99]], [[0.9], [0.9, 1.0], [0, 0, 0]]),
        ("[int >= 0 or text] or null", [[1, "cat"], None], [[None], "cat", [-1]]),
        ("[[0 <= int <= 255]]", [[[0, 255], [3]]], [[0], [[256]], [[]]]),
        ("{text or [text]}", [{"a": "b", "c": ["d"]}], [{}, {"a": 1}, ["a"], None]),
        ("{float}", [{"label": 10}], [{"label": "x"}]),
        ("part or null", [{"_target_": "a.B"}, None], [3, "a", []]),
    ],
)
def test_what_fits_a_rule(rule, good, bad):
    assert [value for value in good if not fits(rule, value)] == []
    assert [value for value in bad if fits(rule, value)] == []


def test_paths_and_devices_must_exist(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for kind, found in (("run folder", "run"), ("folder", "run"), ("file", "run/config.yaml")):
        assert fits(kind, str(tmp_path / found))
        assert not fits(kind, str(tmp_path / "nothing"))
    assert not fits("run folder", str(tmp_path))
    assert fits("device", "cpu")
    assert not any(fits("device", name) for name in ("foo", "cpu0", "cuda:99", "", None, 0))


def test_a_reference_is_checked_where_it_leads():
    config = {"data": {"_target_": "flowkit.data.Digits", "batch_size": "${batch_size}"}}
    with pytest.raises(ValueError, match=r"^batch_size must be int >= 1, got 0$"):
        check("encode", {**config, "batch_size": 0})


def test_keys_of_a_class_have_their_rule_wherever_it_is_built():
    node = {"_target_": "flowkit.nn.DiT", "heads": 0}
    for config in ({"model": node}, {"model": {"_target_": "my.Net", "inner": {"net": node}}}):
        with pytest.raises(ValueError, match=r"heads must be int >= 1, got 0$"):
            check("train", config)


RUN = "a run folder, hub:owner/name or flowkit:name"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("weights", "avraged", "averaged or raw, got avraged; did you mean averaged?"),
        ("labels", 3, "[int >= 0 or a text] or null, got 3; write [3]"),
        ("num_samples", 1e2, "int >= 1, got 100.0; write 100"),
        ("out", 2024, "a path or null, got 2024; write ./2024"),
        ("trust", "my.Net", "[] or [a text], got my.Net; write [my.Net]"),
        ("run", "typo", f"{RUN}, got typo; it does not exist"),
        ("run", ".", f"{RUN}, got .; it has no config.yaml"),
        ("device", "foo", "a device of this machine, such as cpu, got foo"),
        ("num_samples", "", "int >= 1, got an empty text"),
    ],
)
def test_messages_say_what_to_write(option, value, said):
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{option} must be {said}')}$"):
        check("sample", {option: value})


def test_of_several_runs_those_that_do_not_exist_are_named():
    runs = ["a", "hub:owner/name", "b"]
    with pytest.raises(ValueError, match=r"got \[a, hub:owner/name, b\]; a, b do not exist$"):
        check("report", {"run": runs})
    with pytest.raises(ValueError, match=r"^resume must be .*, got hub:owner/name$"):
        check("train", {"resume": "hub:owner/name"})


@pytest.mark.parametrize(("value", "fix"), [(0, ""), (4.0, "; write 4"), (-1.5, "")])
def test_a_number_that_may_stand_alone_is_not_put_in_a_list(value, fix):
    grid = {"_target_": "flowkit.sampling.ODESampler", "grid": value}
    with pytest.raises(ValueError, match=rf"sampler.grid must be int >= 1 .*, got {value}{fix}$"):
        check("sample", {"sampler": grid})


def test_options_that_do_not_exist_are_refused_unless_others_refer_to_them():
    with pytest.raises(ValueError, match=r"^option must exist, got sede; did you mean seed\?$"):
        check("sample", {"sede": 3})
    with pytest.raises(ValueError, match=r"^sampler must stay, got ~sampler$"):
        check("sample", {"steps": 3, "num_samples": "${steps}"})
    with pytest.raises(ValueError, match=r"^run must be given, as run=...$"):
        check("sample", {"run": "???"})


# --- agreement with the files -----------------------------------------------------------------


def _rules_in_files():
    for file in FILES:
        name = str(file.relative_to(CONF))[:-5]
        text = file.read_text()
        if not name.startswith("experiment/") and "# @package _global_" not in text:
            for place, rule in rules._declared(text).items():
                yield name, place, rule


def test_words_of_comments_are_no_rules_unless_they_name_a_kind():
    text = (
        "a: 1 # int >= 1; steps\nb: 2 # steps\nc: 3 # of each class\nd: x # x or y: words\ne: 4\n"
    )
    assert rules._declared(text) == {
        ("", "a"): "int >= 1",
        ("", "b"): "",
        ("", "c"): "",
        ("", "d"): "",
        ("", "e"): "",
    }


def test_every_option_has_a_rule():
    """A class may have its rules in one file for several files of its choices."""
    of_classes = {place for _, place, rule in _rules_in_files() if rule}
    for file in FILES:
        name, text = str(file.relative_to(CONF))[:-5], file.read_text()
        if name.startswith(("experiment/", "debug/")) or "@package _global_" in text:
            continue
        content = yaml.safe_load(text)
        content.pop("defaults", None)
        content.pop("hydra", None)
        top = "" if "/" not in name else f"{name.partition('/')[0]}."
        for key, rule, _ in rules._values(content, _as_reads(name)):
            known = rule or (content.get("_target_"), key) in of_classes
            inner = key.startswith(("inversions.", "edits.", "grids."))
            inner = inner or (name == "blockwise" and key.startswith("module"))
            private = key.rpartition(".")[2].startswith("_")
            assert known or inner or private, f"{top}{key} of {name}.yaml"


def _as_reads(name):
    """Rules by place, as if the file were the whole configuration."""
    if "/" not in name:
        return rules_of(name)
    group = name.partition("/")[0] + "."
    return {
        (cls, key.removeprefix(group) if not cls else key): rule
        for (cls, key), rule in rules._rules_of_parts().items()
    }


def test_a_key_of_a_class_has_one_rule():
    found = {}
    for name, (cls, key), rule in _rules_in_files():
        if cls and rule:
            assert found.setdefault((cls, key), rule) == rule, f"{cls}.{key} in {name}"


KINDS = {int: "int", float: "float", bool: "bool", NoneType: "null"}


def _annotated(cls, key):
    """The names of the kinds that a class takes, as far as rules know them."""
    parameters = inspect.signature(get_object(cls)).parameters
    hint = parameters[key].annotation if key in parameters else None
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {KINDS[kind] for kind in kinds if kind in KINDS and hint is not None}


def _ruled(rule):
    """The names of the kinds that fit a rule."""
    for one in rules._split(rule, " or "):
        number = rules.NUMBER.fullmatch(one)
        if number or one in ("bool", "null"):
            yield number[3] if number else one
        elif one.isdigit():
            yield "int"


def test_rules_agree_with_the_annotations_of_classes():
    """A whole number where the class takes whole numbers, null where it takes None, and so on."""
    compared, differ = 0, []
    for (cls, key), rule in rules._rules_of_parts().items():
        if (
            rule
            and cls.startswith("flowkit.")
            and "." not in key
            and (wanted := _annotated(cls, key))
        ):
            compared += 1
            if wanted != set(_ruled(rule)):
                differ.append((cls, key, rule, wanted))
    assert differ == []
    assert compared > 100
