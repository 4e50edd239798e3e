"""Records of what recipes made: which weights, and files that are never overwritten."""

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

from flowkit.modules import FlowModule
from flowkit.provenance import tensor_hash


def weights(module: FlowModule) -> dict[str, Any]:
    """Return which weights a loaded module holds: averaged or raw, their step and hash."""
    return {**(module.weights or {}), "hash": tensor_hash(module.state_dict())}


def write_record(record: dict[str, Any], files: list[Path]) -> None:
    """Write a record to the first of its files, setting aside an earlier one that says otherwise.

    Then ``metrics.json`` becomes ``metrics-1.json`` (or the next number that is free), and its
    other files move likewise.
    """
    file, text = files[0], json.dumps(record, indent=2) + "\n"
    if file.is_file() and _timeless(file.read_text()) != _timeless(text):
        number = next(n for n in count(1) if not file.with_stem(f"{file.stem}-{n}").exists())
        for earlier in filter(Path.is_file, files):
            earlier.rename(earlier.with_stem(f"{earlier.stem}-{number}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _timeless(text: str) -> str:
    """A record without how long it took."""
    return re.sub(r'"seconds": [\d.]+', "", text)
