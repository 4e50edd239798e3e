"""Explain why the numbers of two evaluations differ.

flowkit explain runs/a runs/b                                   the metrics.json of both
flowkit explain runs/a/metrics.json runs/a/metrics-1.json value=precision
flowkit explain runs/a runs/b samples=runs/a/drawn reference=runs/a

The table holds the settings that differ, the largest effect first. With the samples of the first
record, these are measured again, as the first record says, with one setting of the second record at
a time. Without them, the sizes are those that docs/evaluation.md measured, as ranges.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import hydra
import torch
from hydra import compose
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf, open_dict

from flowkit.data.pixels import Resize
from flowkit.data.sample_sets import SampleSet
from flowkit.metrics import Pixels
from flowkit.places import choices_of
from flowkit.provenance import read_json
from flowkit.rules import CONF, did_you_mean
from flowkit.runs.explaining import (
    CHANCE,
    COUNT,
    FILE,
    REFERENCE,
    SEEN,
    Difference,
    Record,
    at,
    by_size,
    differences,
    in_words,
    listed,
    same_draw,
    splits_of,
    verdict,
)
from flowkit.runs.given import of_samples
from flowkit.runs.metrics_table import record_files
from flowkit.runs.processes import launch
from flowkit.runs.sources import Reading, open_source
from flowkit.runs.tables import markdown


def explain(cfg: DictConfig) -> list[Difference]:
    """Explain as configured; print a table and a sentence.

    Returns:
        The differences, the largest first.
    """
    first, second = _records(cfg)
    found = differences(first, second, cfg.value)
    if cfg.samples is not None:
        found = _measured(cfg, first, second, found)
    numbers = [at(record, "metrics", cfg.value) for record in (first, second)]
    name = cfg.value.replace("_", " ").replace("frechet", "Fréchet")
    print(f"{name}: {numbers[0]:.4g} and {numbers[1]:.4g}{_unreliable(cfg.value, first, second)}\n")
    if found:
        print(
            markdown(
                ["what differs", "first", "second", "adds", "from"], map(_row, found), range(5)
            )
        )
    print(verdict(first, second, cfg.value, found))
    if cfg.samples is None and (names := [one.name for one in found if _measurable(one)]):
        place = at(first, "samples", "name")
        place = place if Path(str(place)).exists() else "<images of the first record>"
        print(f"samples={place} measures {listed(names)}")
    return found


def _unreliable(value: str, first: Record, second: Record) -> str:
    """Return in words which of the numbers depend too much on the number of images."""
    few = [value in (at(record, "metrics", "unreliable") or ()) for record in (first, second)]
    which = {(True, True): "both", (True, False): "the first", (False, True): "the second"}
    return f" ({which[few[0], few[1]]} unreliable: of too few images)" if any(few) else ""


def _measurable(one: Difference) -> bool:
    """Return True for a setting of no known size that samples at hand can take."""
    return one.change is None and any(s.name == one.name and s.options for s in SEEN)


def _records(cfg: DictConfig) -> tuple[Record, Record]:
    """Return both records.

    Raises:
        FileNotFoundError: If there is no such record.
        ValueError: If there are not two, or one is no record with the number.
    """
    if len(cfg.records) != 2:
        raise ValueError(
            f"records must be two run folders or files, got {len(cfg.records)}; write "
            "flowkit explain runs/a runs/b"
        )
    files = record_files(list(cfg.records), "records")
    found = [read_json(file) for file in files]
    for file, record in zip(files, found, strict=True):
        metrics = at(record, "metrics") if isinstance(record, dict) else None
        if metrics is None:
            raise ValueError(f"records must be written by flowkit evaluate, got {file}")
        numbers = [name for name, number in metrics.items() if type(number) in (int, float)]
        if cfg.value not in numbers:
            fix = did_you_mean(cfg.value, numbers, f"; there are {', '.join(numbers)}")
            raise ValueError(f"value must be a number of {file}, got {cfg.value}{fix}")
    return found[0], found[1]


def _measured(
    cfg: DictConfig, first: Record, second: Record, found: list[Difference]
) -> list[Difference]:
    """Measure the samples again, with one setting of the second record at a time.

    Settings that the samples at hand cannot take keep the range that is known.

    Raises:
        ValueError: If the number of the first record does not come out again.
    """
    one_process = {"device": cfg.device, "devices": 1, "num_nodes": 1}
    fabric = launch(OmegaConf.create(one_process))
    resize = at(first, "samples", "resize")
    reading = Reading(trust=tuple(cfg.trust), resize=None if resize is None else Resize(**resize))
    samples = open_source(cfg.samples, "samples", reading).images
    count = at(first, "metrics", "num_samples")
    if samples is None or len(samples) < count:
        raise ValueError(
            f"samples must be those of the first record, {count} images, got {cfg.samples}"
        )
    stored = samples.stored
    able = [s for s in SEEN if s.options and (s.name != "quantization" or stored["kind"] == "pt")]
    places, own = _places(cfg, first, second), _reading_of(first, samples)
    metric = _metric(cfg, first)

    def number(taken: str | None) -> float:
        """Return the number with one setting of the second record."""
        options = list(own)
        for setting in able:
            record = second if setting.name == taken else first
            if setting != FILE or not _as_stored(record, stored):
                options += setting.options(record)
        return _number(cfg, metric, options, places[taken == REFERENCE.name], fabric)

    base, recorded = number(None), at(first, "metrics", cfg.value)
    if not math.isclose(base, recorded, rel_tol=1e-3):
        raise ValueError(
            "samples, reference and metric must be those of the first record, whose number is "
            f"{recorded:.6g}, got {base:.6g}"
        )
    names = {setting.name for setting in able}
    if at(second, "metrics", "num_samples") > len(samples):
        names -= {COUNT.name}
    if places[1] is None:
        names -= {REFERENCE.name}
    if not (FILE.options(second) or _as_stored(second, stored)):
        names -= {FILE.name}  # the samples are JPEG files, those of the second record are not
    again = []
    for one in found:
        if one.name in names:
            change = number(one.name) - base
            one = one._replace(change=(change, change), how="measured")
        again.append(one)
    known = all(one.how == "measured" or one.name == CHANCE for one in again)
    if known and same_draw(first, second):
        again = [one for one in again if one.name != CHANCE]  # it is in what was measured
    return by_size(again)


def _reading_of(first: Record, samples: SampleSet) -> list[str]:
    """Return the options of a record with which its samples and their features were read."""
    recorded = at(first, "samples", "classes") is not None
    folder = samples.stored["kind"] == "folder"
    classes = recorded and folder and samples.read(torch.arange(1)).labels is None
    return [f"class_folders={str(classes).lower()}"]


def _as_stored(record: Record, stored: Mapping[str, Any]) -> bool:
    """Say whether samples were measured as their files are, without a JPEG in between."""
    return FILE.find(record) == FILE.find({"samples": stored})


def _places(cfg: DictConfig, first: Record, second: Record) -> list[str | None]:
    """Return the references of both records; None for one of no known place.

    Raises:
        ValueError: If the first is not known.
    """
    place = cfg.reference or at(first, "reference", "name")
    if not (Path(str(place)).exists() or place in choices_of("data")):
        raise ValueError(
            f"reference must be given, since that of the first record is no place: {place}"
        )
    return [place, cfg.other_reference or (splits_of(first, second) and place)]


def _metric(cfg: DictConfig, first: Record) -> DictConfig:
    """Return the features to measure again; pixels where nothing else is asked for."""
    of_pixels = at(first, "metrics", "features", "name") == Pixels.name
    if of_pixels and cfg.metric == OmegaConf.load(CONF / "metric" / "auto.yaml"):
        return cast(DictConfig, OmegaConf.load(CONF / "metric" / "pixels.yaml"))
    return cfg.metric


def _number(
    cfg: DictConfig, metric: DictConfig, options: list[str], place: str | None, fabric: Fabric
) -> float:
    """Return the number of ``flowkit evaluate`` with these options and this reference."""
    named = place in choices_of("data")
    options = [*options, f"extrapolate={str(cfg.value.endswith('_infinity')).lower()}"]
    node = compose("evaluate", [*options, *([f"data@reference={place}"] if named else [])])
    with open_dict(node), TemporaryDirectory() as folder:
        node.metric = metric
        keys = ("samples", "trust", "data_changed", "batch_size")
        node.update({key: cfg[key] for key in keys} | ({} if named else {"reference": place}))
        found = of_samples(node, fabric, Path(folder))
    return (found.metrics if found else {})[cfg.value]


def _row(one: Difference) -> list[str]:
    """Return a row of the table."""
    change = "not known" if one.change is None else in_words(one.change)
    return [one.name, one.first, one.second, change, one.how]


@hydra.main(version_base="1.3", config_path="../conf", config_name="explain")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit explain``."""
    explain(cfg)


if __name__ == "__main__":
    main()
