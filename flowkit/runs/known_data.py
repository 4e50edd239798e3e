"""The data of a run: recorded at training, and compared with the data that a later call opens.

The record ``data.json`` lies in the run folder, and beside latents and pairs for the images that
they were made of.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flowkit.data import SplitData
from flowkit.hub import folder_of, is_pushed
from flowkit.modules.checkpoints import DATA, read_config
from flowkit.provenance import read_json, write_text
from flowkit.runs.processes import say

RECORD = DATA
FIELDS = {
    "kind": (str, "a text"),
    "root": (str | None, "a path or null"),
    "classes": (list | None, "a list or null"),
    "num_classes": (int | None, "a number or null"),
    "preprocessing": (dict, "a mapping"),
    "splits": (dict, "a mapping"),
    "files": (dict, "a mapping"),
}
Record = Mapping[str, Any]
Places = str | Path | Mapping[str, Any] | None


def place_of(cfg: DictConfig) -> dict[str, Any]:
    """Return the options of a recipe on the data of its run, as arguments of `Run.load`."""
    data = {"root": cfg.data.get("root")} if "_target_" in cfg.data else cfg.data  # of other data
    return {"data_root": dict(_given(data, "data")), "data_changed": cfg.data_changed}


def _given(node: Mapping[Any, Any], key: str) -> Iterator[tuple[str, str]]:
    """Yield the options with a value."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _given(value, f"{key}.{name}")
        elif value is not None:
            yield f"{key}.{name}", str(value)


def write_data_record(folder: Path, data: SplitData, config: Any = None) -> None:
    """Write the record of the data to a folder.

    Args:
        folder: The folder.
        data: The data, set up.
        config: Their configuration as a file may hold it. If it refers to a variable of the
            environment, which may be secret, the record does not hold the place of the data.
    """
    record = data.record()
    if "${oc.env:" in str(config):
        record["root"] = None
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def read_data_record(folder: str | Path) -> Record | None:
    """Return the record of a folder; None if the folder has none.

    The record of a shared model holds no files and no place.

    Raises:
        ValueError: If the file is not such a record.
    """
    folder = folder_of(folder)
    file, shared = folder / RECORD, is_pushed(folder)
    if not shared and not file.is_file():
        return None
    record = read_config(folder)["data_record"] if shared else read_json(file)
    if shared and record is None:
        return None
    if not isinstance(record, dict):
        raise ValueError(f"{file} must be a mapping, got {type(record).__name__}")
    for name, (kind, words) in FIELDS.items():
        if name not in record or not isinstance(record[name], kind):
            raise ValueError(f"{name} in {file} must be {words}, got {record.get(name)!r}")
    files = record["files"].values()
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in files):
        raise ValueError(f"files in {file} must each have a hash and a split")
    return record


def record_of(folder: str | Path | None) -> Record | None:
    """Return the record of a folder; say so if the folder has none."""
    record = None if folder is None else read_data_record(folder)
    if folder is not None and record is None:
        say(f"data      changes since the training are not seen: no {RECORD} in {folder}")
    return record


def copy_data_record(source: Path, folder: Path) -> None:
    """Copy the record of a run's data to the folder of what the run made, if there is a record."""
    if (record := read_data_record(source)) is not None:
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def changes(then: Record, now: Record) -> list[str]:
    """Return what differs between two records, a text for each kind of difference.

    >>> old = {"kind": "Folder", "classes": ["a"], "num_classes": 1, "preprocessing": {},
    ...        "splits": {}, "files": {"a/1.png": ["0", "train"], "a/2.png": ["1", "test"]}}
    >>> changes(old, {**old, "files": {"a/1.png": ["5", "train"], "b/2.png": ["1", "test"]}})
    ['1 file changed (a/1.png)', '1 file renamed (b/2.png)']
    """
    told = []
    if then["kind"] != now["kind"]:
        told.append(f"{now['kind']} instead of {then['kind']}")
    if (then["classes"], then["num_classes"]) != (now["classes"], now["num_classes"]):
        told.append(f"classes {classes_of(now)} instead of {classes_of(then)}")
    for name, value in then["preprocessing"].items():
        if (other := now["preprocessing"].get(name)) != value:
            told.append(f"{name} {other} instead of {value}")
    if then["files"]:
        told += _changed_files(then["files"], now["files"], then["classes"] or [])
    if not told:
        prints = {
            name: [record["splits"].get(name, {}).get("fingerprint") for record in (then, now)]
            for name in {**then["splits"], **now["splits"]}
        }
        if differing := [name for name, (old, new) in prints.items() if old != new]:
            told.append(f"other content of {' and '.join(differing)}")
    return told


def _changed_files(
    then: Mapping[str, Sequence], now: Mapping[str, Sequence], classes: Sequence[str]
) -> list[str]:
    """Return which classes are gone, and how many files are new, gone, changed or elsewhere."""
    gone, new = then.keys() - now.keys(), now.keys() - then.keys()
    contents = {then[name][0] for name in gone}
    renamed = {name for name in new if now[name][0] in contents}
    found = {now[name][0] for name in renamed}
    both = then.keys() & now.keys()
    changed = {name for name in both if then[name][0] != now[name][0]}
    moved = {name for name in both - changed if then[name][1] != now[name][1]}
    removed = {name for name in gone if then[name][0] not in found}
    members: dict[str, set[str]] = {name: set() for name in classes}
    for name in then:
        for part in members.keys() & set(name.split("/")[:-1]):
            members[part].add(name)
    lost = {name: files for name, files in members.items() if files and files <= removed}
    removed = removed.difference(*lost.values())
    kinds = {
        "added": new - renamed,
        "removed": removed,
        "changed": changed,
        "renamed": renamed,
        "in another split": moved,
    }
    told = [f"class {name} removed, with {len(files):,} files" for name, files in lost.items()]
    return told + [
        f"{len(names):,} {'file' if len(names) == 1 else 'files'} {kind} ({_some(sorted(names))})"
        for kind, names in kinds.items()
        if names
    ]


def _some(names: list[str]) -> str:
    """Return the first three names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def classes_of(record: Record) -> str:
    """Return the classes of a record in words."""
    names = record["classes"]
    if names is None:
        return str(record["num_classes"] or "none")
    return ", ".join(map(str, names[:10])) + (", …" if len(names) > 10 else "")
