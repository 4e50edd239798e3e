"""Data modules of configurations, with their splits loaded."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowkit.checks import check_choice
from flowkit.data import EDMLatents, SplitData
from flowkit.data.cache import INDEX
from flowkit.data.pairs import RECORD as PAIRS
from flowkit.metrics.comparison import FEW
from flowkit.modules.checkpoints import build
from flowkit.modules.earlier import current
from flowkit.modules.pushed import PLACES, asked
from flowkit.modules.trust import trusting
from flowkit.runs.known_data import Places, Record, changes, classes_of, record_of
from flowkit.runs.processes import say

SINCE_RECORDS = ("flowkit.data.Folder", "flowkit.data.MaskFolder")  # by content since then
LATER = ("flowkit.data.Hub", "flowkit.data.Shards")  # since records say so


def stored_data(
    node: dict[str, Any],
    trust: Sequence[str] = (),
    folder: str | Path = ".",
    root: str | Path | None = None,
    changed: str = "refuse",
    place: str = "data",
    through: bool = True,
) -> SplitData:
    """Load the data of a stored configuration, with their test split.

    For cached latents and for pairs, the result is the data they were made of.

    Args:
        node: The configuration.
        trust: Names of classes that it may name beside those that flowkit lists.
        folder: The folder of the configuration, which may hold a record of the data.
        root: The place of the data, if they have moved.
        changed: ``"refuse"`` or ``"accept"`` data that differ from the record.
        place: Name of the configuration, for errors.
        through: False for the latents or the pairs themselves.

    Raises:
        ValueError: If the configuration names a class that is neither listed nor trusted, or the
            data differ from the record.
    """
    check_known(node, folder)
    record = record_of(folder)
    node = as_trained(current(node), record)
    made = node.get("_target_") in ("flowkit.data.Latents", "flowkit.data.Pairs")
    moved = root is not None and any((Path(root) / name).is_file() for name in (INDEX, PAIRS))
    here = root if moved or not made else None
    node = located(node, record, here)
    check_given(node)
    with trusting(trust):
        found = build(node, place)
        data = opened(found, record, changed, "test")
    if isinstance(data, EDMLatents):
        raise ValueError(
            "data must be images to compare with, got latents without their images; draw samples "
            "with flowkit sample, then flowkit evaluate samples=... "
            f"reference={data.root / 'images'}"
        )
    source = getattr(data, "source", None)
    if not (through and isinstance(source, dict)):
        return data
    cache, rest = getattr(data, "root", folder), None if moved else root
    return stored_data(source, trust, cache, rest, changed, f"source in {cache}")


def check_known(node: Any, folder: str | Path) -> None:
    """Require a configuration of data, which some shared models lack.

    Raises:
        ValueError: If there is none.
    """
    if node is None:
        raise ValueError(
            f"data must be known for this, got a shared model without a configuration of data in "
            f"{folder}"
        )


def check_given(data: Any) -> None:
    """Require all places of data, which a shared model does not name.

    Raises:
        ValueError: If one is missing. The error holds the options that give them.
    """
    if missing := asked(data):
        raise ValueError(
            f"{' and '.join(missing)} must be given for a shared model, which holds neither its "
            "data nor encoders of texts or voices in files of their own, got null; "
            f"{' '.join(f'{option}=<path>' for option in missing)}"
        )


def placed(config: dict[str, Any], places: Places) -> tuple[dict[str, Any], Any]:
    """Return the configuration of a run with new places in its data, and the place of the data.

    Args:
        config: The configuration.
        places: The place of the data, or places by their options, see `flowkit.runs.Run.load`.

    Raises:
        ValueError: If the data have no such place.
    """
    if not isinstance(places, Mapping):
        return config, places
    rest = {option: place for option, place in places.items() if option != "data.root"}
    if rest:
        config = {**config, "data": copy.deepcopy(config["data"])}
    for option, place in rest.items():
        *parts, last = option.split(".")
        node: Any = config
        for part in parts:
            node = node.get(part) if isinstance(node, Mapping) else None
        if not isinstance(node, dict) or last not in node:
            raise ValueError(f"{option} must be null for data without this place, got {place}")
        node[last] = str(place)
    return config, places.get("data.root")


def as_trained(node: dict[str, Any], record: Record | None) -> dict[str, Any]:
    """Return the configuration of data with the splits of its training.

    Splits once depended on the order of all samples. Then there was no record, or it does not say
    how tar files and data of the hub were divided.
    """
    earlier = (() if record else SINCE_RECORDS) + (() if record and "split_by" in record else LATER)
    if node.get("_target_") in earlier:
        return {"split_by": "order", **node}
    inner = node.get("images")
    return {**node, "images": as_trained(inner, record)} if isinstance(inner, dict) else node


def located(
    node: Mapping[str, Any], record: Record | None, root: str | Path | None
) -> dict[str, Any]:
    """Return the configuration of data with their place.

    The place is ``root``. Without it, a relative path of the configuration is the one that the
    record remembers, if it exists.

    Raises:
        ValueError: If ``root`` is given for data without a folder or file.
    """
    node = dict(node)
    if isinstance(node.get("images"), Mapping):
        return {**node, "images": located(node["images"], record, root)}
    key = next((name for name in PLACES if name in node), None)
    if key is None:
        if root is not None:
            raise ValueError(f"data.root must be null for data without a folder, got {root}")
        return node
    kept = None if record is None else record["root"]
    if root is not None:
        node[key] = str(root)
    elif kept and node[key] and not Path(str(node[key])).is_absolute() and Path(kept).is_dir():
        node[key] = kept
    return node


def opened(
    data: SplitData, record: Record | None, changed: str, stage: str | None = None
) -> SplitData:
    """Return data with loaded splits, which are those of a record.

    Files and classes keep the splits and the numbers that they have in the record.

    Args:
        data: The data module.
        record: The record of the data; None takes all data.
        changed: ``"refuse"`` or ``"accept"`` data that differ from the record.
        stage: The splits to load, see `prepared`.

    Raises:
        ValueError: If the data differ from the record and that is not accepted, or if they have
            more classes.
    """
    check_choice(changed, ("refuse", "accept"), "data_changed")
    if record is not None:
        data.known = record
    prepared(data, stage)
    now = None if record is None else data.record()
    if record is None or now is None or not (told := "; ".join(changes(record, now))):
        return data
    if (data.num_classes or 0) > (record["num_classes"] or 0):
        raise ValueError(
            f"data must have no other classes than the run, {classes_of(record)}, got "
            f"{classes_of(now)}; take the others away, or train anew"
        )
    if changed == "refuse":
        raise ValueError(
            f"data must be those of the run's training, got {told}; if this is right: "
            "data_changed=accept"
        )
    say(f"data      changed since the training: {told}")
    say("data      no number of before can be compared with those of now: classifier, floor and")
    say("          test images follow the data")
    data.changes = told
    return data


def prepared(data: SplitData, stage: str | None = None) -> SplitData:
    """Return the data module with loaded splits: the splits of a stage, or all.

    Raises:
        TypeError: If it is no data module of flowkit.
    """
    if not isinstance(data, SplitData):
        raise TypeError(
            f"data must be a subclass of flowkit.data.SplitData, got {type(data).__name__}; derive "
            "a class from it, with a method load that returns splits such as flowkit.data.Arrays"
        )
    data.prepare_data()
    data.setup(stage)
    if (count := data.sizes().get("test", FEW)) < FEW:
        fix = "; images need 4 for flowkit evaluate: raise data.test_fraction" if count < 4 else ""
        say(f"data      a test split of {count}: measures against it are uncertain{fix}")
    return data
