"""JSON records of the recipes' results. An earlier record is renamed, never overwritten."""

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

from flowkit.modules import FlowModule
from flowkit.provenance import tensor_hash


def weights(module: FlowModule) -> dict[str, Any]:
    """Return the kind (averaged or raw), the step and the hash of a module's weights."""
    return {**(module.weights or {}), "hash": tensor_hash(module.state_dict())}


def write_record(record: dict[str, Any], files: list[Path]) -> None:
    """Write a record to the first of ``files``, and rename the files of another record.

    An earlier record that differs in more than its seconds keeps its files under new names:
    ``metrics.json`` becomes ``metrics-1.json`` (or the next free number), and the other files get
    the same number.
    """
    file, text = files[0], json.dumps(record, indent=2) + "\n"
    if file.is_file() and _timeless(file.read_text()) != _timeless(text):
        number = next(n for n in count(1) if not file.with_stem(f"{file.stem}-{n}").exists())
        for earlier in filter(Path.is_file, files):
            earlier.rename(earlier.with_stem(f"{earlier.stem}-{number}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _timeless(text: str) -> str:
    """Remove all seconds from the text of a record."""
    return re.sub(r'"seconds": [\d.]+', "", text)


def file_name(name: str) -> str:
    """Return a name for a file: all characters but letters, digits and ``-_.`` become ``-``.

    >>> file_name("W-CFM 0.5")
    'W-CFM-0.5'
    """
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
