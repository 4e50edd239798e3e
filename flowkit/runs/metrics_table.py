"""A table over the records of several evaluations, with what makes them incomparable."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowkit.places import check_exist
from flowkit.provenance import read_json
from flowkit.runs.explaining import SEEN, Record, Setting, at, differ
from flowkit.runs.tables import markdown

Row = dict[str, Any]
NOT_METRICS = ("num_samples", "num_reference", "neighbors")
SAME = (*SEEN, Setting("test data", lambda r: at(r, "data", "test")))
"""Settings in which records agree whose numbers can be compared."""


def read_records(places: Sequence[str | Path]) -> dict[str, Record]:
    """Read records of ``flowkit evaluate`` by the names of their folders.

    Args:
        places: Run folders, or files. Folders of one name have their whole path as name.

    Raises:
        FileNotFoundError: If a place has no record.
        ValueError: If a file is no record.
    """
    files = record_files(places, "runs")
    found = {}
    for file in files:
        record = read_json(file)
        if not isinstance(at(record, "metrics") if isinstance(record, dict) else None, Mapping):
            raise ValueError(f"runs must have records of flowkit evaluate, got {file}")
        alone = file.name == "metrics.json"
        short = file.parent.name if alone else str(file)
        several = sum(f.parent.name == short for f in files) > 1
        found[str(file.parent) if alone and several else short] = record
    return found


def record_files(places: Sequence[str | Path], key: str) -> list[Path]:
    """Return the files of records: those of run folders, or files as they are given.

    Args:
        places: Run folders, or files.
        key: Name of their option, for the error.

    Raises:
        FileNotFoundError: If a place has no record.
    """
    check_exist(places, key)
    files = [Path(p) / "metrics.json" if Path(p).is_dir() else Path(p) for p in places]
    if missing := [file for file in files if not file.is_file()]:
        fix = "; ".join(f"flowkit evaluate run={file.parent}" for file in missing)
        names = ", ".join(map(str, missing))
        raise FileNotFoundError(f"{key} must be evaluated, got no {names}; {fix}")
    return files


def rows_of(records: Mapping[str, Record]) -> list[Row]:
    """Return a row for each record: its numbers, how they were made, and what differs.

    Returns:
        For each record ``name``, ``metrics`` with ``value``, ``interval`` and ``unreliable`` of
        each number, ``num_samples``, ``sampler``, ``steps``, ``nfe``, ``guidance``, ``weights`` and
        ``differs``: the names of settings for which its numbers cannot be compared with those of
        the first record.
    """
    first = next(iter(records.values()))
    return [{"name": name, **_row(first, record)} for name, record in records.items()]


def _row(first: Record, record: Record) -> Row:
    """Return the row of a record without its name."""
    metrics, sampling = record["metrics"], at(record, "sampling") or {}
    few = metrics.get("unreliable") or ()
    numbers = {
        name: {
            "value": value,
            "interval": metrics.get(f"{name}_interval"),
            "unreliable": name in few,
        }
        for name, value in metrics.items()
        if type(value) in (int, float) and name not in NOT_METRICS
    }
    weights = at(record, "weights")
    grid = sampling.get("grid")
    return {
        "metrics": numbers,
        "num_samples": metrics.get("num_samples"),
        "sampler": sampling.get("method"),
        "steps": None if grid is None else len(grid) - 1,
        "nfe": sampling.get("nfe"),
        "guidance": sampling.get("guidance"),
        "weights": weights and {key: weights.get(key) for key in ("kind", "step", "hash")},
        "differs": [one.name for one in SAME if _differs(one, first, record)],
    }


def _differs(setting: Setting, first: Record, record: Record) -> bool:
    """Return True if a setting is known in both records and differs."""
    a, b = setting.find(first), setting.find(record)
    return a is not None and b is not None and differ(first, record, a, b)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, and below them what cannot be compared."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    words = ("sampler", "steps", "nfe", "guidance")
    header = ["run", *map(_titled, names), "samples", *map(_titled, words), "weights"]
    lines = []
    for row in rows:
        told = ["" if row[word] is None else _plain(row[word]) for word in words]
        kind = row["weights"] and f"{row['weights']['kind']}, step {row['weights']['step']}"
        mark = " ≠" if row["differs"] else ""
        numbers = [_number(row["metrics"].get(name)) for name in names]
        samples = f"{row['num_samples']:,}" if row["num_samples"] else ""
        lines.append([row["name"] + mark, *numbers, samples, *told, kind or ""])
    text = markdown(header, lines, (0, len(names) + 2, len(header) - 1))
    notes = [
        f"≠ {row['name']} cannot be compared with {rows[0]['name']}: other "
        f"{', other '.join(row['differs'])}"
        for row in rows
        if row["differs"]
    ]
    if any(one["unreliable"] for row in rows for one in row["metrics"].values()):
        notes.append("* unreliable: of too few images")
    return "\n".join([text, *notes]).rstrip() + "\n"


TITLES = {"nfe": "NFE", "w2": "W2", "w2_squared": "W2²", "c2st": "C2ST", "cmmd": "CMMD"}


def _titled(name: str) -> str:
    """Return the name of a number or a setting as the title of a column."""
    return TITLES.get(name, name.replace("_", " ").replace("frechet", "Fréchet"))


def _plain(value: Any) -> str:
    """Return a setting as text."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _number(metric: Mapping[str, Any] | None) -> str:
    """Return a number and its interval with equal decimals, and a star if it is unreliable."""
    if metric is None:
        return ""
    value, ends, spec = metric["value"], metric["interval"], ".4g"
    if isinstance(value, float) and abs(value) < 1e9 and not 0 < abs(value) < 1e-3:
        spec = f".{max(0, 3 - math.floor(math.log10(abs(value) or 0.1)))}f"
    interval = "" if ends is None else f" [{', '.join(format(end, spec) for end in ends)}]"
    return f"{value:{spec}}{'*' if metric['unreliable'] else ''}{interval}"
