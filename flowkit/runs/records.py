"""JSON records of the recipes' results. An earlier record is renamed, never overwritten."""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from flowkit.modules.resume import ExactResume
from flowkit.provenance import read_json, tensor_hash, write_text


def weights(module: ExactResume) -> dict[str, Any]:
    """Return the kind (averaged or raw), the step and the hash of a module's weights."""
    return {**(module.weights or {}), "hash": tensor_hash(module.state_dict())}


@contextmanager
def recording(record: dict[str, Any], files: list[Path]) -> Iterator[None]:
    """Write a record to the first of ``files``, after the body has written the other files.

    So a record stands for all its files. An earlier record that differs in more than its times
    keeps its files under new names, see `set_aside`.
    """
    file, text = files[0], json.dumps(record, indent=2) + "\n"
    if file.is_file() and _timeless(file.read_text(errors="replace")) != _timeless(text):
        set_aside(files)
    file.parent.mkdir(parents=True, exist_ok=True)
    yield
    write_text(file, text)


def set_aside(files: Sequence[Path], folder: str | None = None) -> None:
    """Give the files of an earlier call new names, so that a new call overwrites none of them.

    ``metrics.json`` becomes ``metrics-1.json`` (or the next free number), and the other files get
    the same number. If numbers in their names mean something else, the files go to a folder with
    the number instead, under their own names.

    Args:
        files: The files, the record first. It is renamed last: if a kill comes between, the next
            call finds it still, and renames the rest.
        folder: Name of the folder, which lies beside the record, without the number.
    """

    def renamed(file: Path, number: int) -> Path:
        if folder is None:
            return file.with_stem(f"{file.stem}-{number}")
        return file.with_name(f"{folder}-{number}") / file.name

    there = [file for file in files if file.exists()]
    taken = lambda n: any(renamed(f, n).exists() for f in (files[0], *there))  # noqa: E731
    number = next(n for n in count(1) if not taken(n))
    for file in reversed(there):
        new = renamed(file, number)
        new.parent.mkdir(exist_ok=True)
        file.rename(new)


def kept_record(file: Path) -> dict[str, Any]:
    """Return the record of an earlier call, to continue it; empty if there is none.

    A damaged file is named in a warning, and its results are made again.
    """
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
    except ValueError as error:
        found = error
    if isinstance(found, dict):
        return found
    warnings.warn(f"record must be JSON, got {file}: {found}; it is made again", stacklevel=2)
    return {}


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """Return a resolved configuration as a file may hold it.

    Texts with variables of the environment, which may be secrets, keep their references
    ``${oc.env:NAME}``. The option ``trust`` is left out: a file never trusts its own content.

    >>> cfg = OmegaConf.create({"a": 1, "b": "${a}", "c": "${oc.env:HOME}/data", "trust": []})
    >>> recorded(cfg)
    {'a': 1, 'b': 1, 'c': '${oc.env:HOME}/data'}
    """
    resolved = OmegaConf.to_container(cfg, resolve=True)
    OmegaConf.register_new_resolver("oc.env", _reference, replace=True)
    try:
        kept = OmegaConf.to_container(cfg, resolve=True)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    found = _with_references(resolved, kept)
    return {key: value for key, value in found.items() if key != "trust"}


def composed(cfg: DictConfig) -> str:
    """Return a configuration with its references as YAML, without the option ``trust``."""
    return OmegaConf.to_yaml(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "trust"])
    )


def _reference(*arguments: Any) -> str:
    """Return the reference to a variable of the environment, in place of its value."""
    return f"${{oc.env:{','.join(map(str, arguments))}}}"


def _with_references(value: Any, kept: Any) -> Any:
    """Return a value, with the texts of ``kept`` where these hold references."""
    if isinstance(value, dict):
        return {key: _with_references(item, kept[key]) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_references(*items) for items in zip(value, kept, strict=True)]
    return kept if isinstance(value, str) and "${oc.env:" in str(kept) else value


def _timeless(text: str) -> str:
    """Remove all seconds, rates and latencies from the text of a record."""
    return re.sub(r'"(seconds|real_time_factor|\w+_hz|latency_ms_\d+)": [\d.e+-]+', "", text)


def file_names(names: Iterable[str]) -> list[str]:
    """Return a different file name for each name.

    All characters but letters, digits and ``-_.`` become ``-``. Of equal names, all but the first
    get a number.

    >>> file_names(["W-CFM 0.5", "W-CFM-0.5", "OT"])
    ['W-CFM-0.5', 'W-CFM-0.5-2', 'OT']
    """
    found: list[str] = []
    for name in names:
        plain = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
        free = (f"{plain}-{number}" for number in count(2))
        found.append(next(one for one in chain([plain], free) if one not in found))
    return found
