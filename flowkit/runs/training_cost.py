"""The cost of a training: measured while it trains, kept as ``training.json`` in the run folder."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flowkit.distributed import mean_over_ranks
from flowkit.hub import folder_of
from flowkit.modules.checkpoints import CONFIG, load_module
from flowkit.provenance import read_json, write_json
from flowkit.runs.records import weights

RECORD, VERSION = "training.json", 1
COSTS = ("seconds", "processor_seconds")
NOTHING = {"version": VERSION, "steps": 0, "seconds": 0.0, "processor_seconds": 0.0, "machines": []}
Cost = dict[str, float]


class TrainingCost(Callback):
    """Measure the time of training steps, and write ``training.json`` with every checkpoint.

    Validation, its pictures and the start of the command do not count. The record also lies in the
    checkpoint, so a resumed training adds to what its checkpoint has cost. Steps that were lost by
    a crash do not count. A training that continues a checkpoint without a record has no record.

    Processor time is that of all processes of the training, without those that load data.

    Args:
        folder: The run folder.
        sources: What the training learns from, by name: runs, and folders of ``flowkit pairs``;
            None is left out. Their places, the weights' hashes and the costs become parts of the
            record.
    """

    def __init__(self, folder: Path, sources: Mapping[str, str | None]) -> None:
        self.folder = folder
        self.sources = {name: place for name, place in sources.items() if place is not None}
        self.earlier: dict[str, Any] | None = None
        self.known = True
        self.spent, self.began = (0.0, 0.0), None

    spent: tuple[float, float]
    began: tuple[float, float] | None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the record of the steps before."""
        found = checkpoint.get("training_cost")
        self.earlier = None if found is None else _checked(found, "the checkpoint")
        self.known = found is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks. The record of a new training takes up the costs of its sources."""
        if self.earlier is None and self.known and trainer.is_global_zero:
            found = {name: origin(place, _hash(place)) for name, place in self.sources.items()}
            self.earlier = {**NOTHING, **found}
        self.began = clocks()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks."""
        self.spent, self.began = self._so_far(), None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks again."""
        self.began = None if trainer.sanity_checking else clocks()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the record to the checkpoint, and write it to the run folder."""
        seconds, own = self._so_far()
        shared = mean_over_ranks(torch.tensor(own, device=pl_module.device))  # of all processes
        processor = own if trainer.world_size == 1 else shared.item() * trainer.world_size
        if self.earlier is None:
            return
        machine = _machine(pl_module.device, trainer.world_size)
        record = _added(self.earlier, (seconds, processor), machine)
        record |= {"steps": trainer.global_step}
        checkpoint["training_cost"] = record
        if trainer.is_global_zero:
            write_json(self.folder / RECORD, record)

    def _so_far(self) -> tuple[float, float]:
        """Return the seconds of this process in this fit: of the wall clock and of processors."""
        if self.began is None:
            return self.spent
        now = clocks()
        wall, processor = (now[k] - self.began[k] + self.spent[k] for k in range(2))
        return wall, processor


def _hash(place: str) -> str | None:
    """Return the hash of a run's weights; None for a folder of pairs."""
    if not (folder_of(place) / CONFIG).is_file():
        return None
    return weights(load_module(place)[0])["hash"]


def clocks() -> tuple[float, float]:
    """Return the wall clock and the processor time of this process, all threads together."""
    return time.perf_counter(), time.process_time()


def write_cost(
    folder: Path, began: tuple[float, float], device: torch.device, sources: Mapping[str, Any]
) -> None:
    """Write the time since ``began`` (see `clocks`) to a folder, added to its earlier record."""
    spent = tuple(now - then for now, then in zip(clocks(), began, strict=True))
    earlier = read_cost(folder) or {**NOTHING, **sources}
    write_json(folder / RECORD, _added(earlier, spent, _machine(device, 1)))


def _added(
    earlier: Mapping[str, Any], spent: Sequence[float], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a record with more seconds on a machine."""
    more = dict(zip(COSTS, spent, strict=True))
    known = earlier["machines"]
    return {
        **earlier,
        **{name: round(earlier[name] + more[name], 3) for name in COSTS},
        "machines": known if machine in known else [*known, machine],
    }


def _machine(device: torch.device, processes: int) -> dict[str, Any]:
    """Return the device, the cores that this process may use, and the number of processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    free = getattr(os, "sched_getaffinity", None)
    return {
        "device": name,
        "cores": len(free(0)) if free else os.cpu_count(),
        "processes": processes,
    }


def origin(folder: str | Path, weights_hash: str | None = None) -> dict[str, Any]:
    """Return the record of a source: its folder, its cost, and of a run the hash of its weights."""
    whose = {} if weights_hash is None else {"hash": weights_hash}
    return {"folder": str(folder), **whose, "training": read_cost(folder)}


def read_cost(folder: str | Path) -> dict[str, Any] | None:
    """Return the record of a run folder or of a folder of pairs; None for a folder without one.

    Raises:
        ValueError: If the file is not such a record.
    """
    file = Path(folder) / RECORD
    return _checked(read_json(file), file) if file.is_file() else None


def _checked(record: Any, place: str | Path) -> dict[str, Any]:
    """Return the record of a cost after a check."""
    try:
        total_cost(record)
        machines_of(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} must hold the cost of a training, got {error!r}") from error
    return record


def machines_of(record: Mapping[str, Any]) -> str:
    """Return the machines of a record in words.

    >>> machines_of({"machines": [{"device": "cpu", "cores": 2, "processes": 1}]})
    'cpu, 2 cores'
    """
    words = []
    for machine in record["machines"]:
        several = f", {machine['processes']} processes" if machine["processes"] > 1 else ""
        words.append(f"{machine['device']}, {machine['cores']} cores{several}")
    return "; ".join(words)


def own_cost(record: Mapping[str, Any]) -> Cost:
    """Return the seconds of a record without those of its sources."""
    return {name: float(record[name]) for name in COSTS}


def total_cost(record: Mapping[str, Any]) -> Cost | None:
    """Return the seconds of a record and of all its sources; None if one of them is not known.

    Its sources are those of its parts that are mappings; see `origin`. A run that is the source of
    several parts counts once.

    >>> teacher = {"seconds": 10.0, "processor_seconds": 20.0}
    >>> start = {"folder": "runs/teacher", "hash": "1f", "training": teacher}
    >>> pairs = {"seconds": 2.0, "processor_seconds": 3.0, "start": start}
    >>> made = {"folder": "pairs", "training": pairs}
    >>> total_cost({"seconds": 1.0, "processor_seconds": 2.0, "start": start, "pairs": made})
    {'seconds': 13.0, 'processor_seconds': 25.0}
    """
    costs = _costs(record)
    if None in costs.values():
        return None
    return {name: sum(cost[name] for cost in costs.values() if cost) for name in COSTS}


def _costs(record: Mapping[str, Any] | None, key: str = "") -> dict[str, Cost | None]:
    """Return the own cost of a record and of all its sources, by the hash or folder of each."""
    if record is None:
        return {key: None}
    found: dict[str, Cost | None] = {key: own_cost(record)}
    for source in record.values():
        if isinstance(source, Mapping):
            found |= _costs(source["training"], source.get("hash", source["folder"]))
    return found
