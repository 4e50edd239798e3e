"""The cost of a training: measured while it trains, kept as ``training.json`` in the run folder."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from flowkit.distributed import mean_over_ranks
from flowkit.modules import load_run
from flowkit.provenance import read_json, write_json
from flowkit.runs.records import weights

RECORD, VERSION = "training.json", 1
COSTS = ("seconds", "processor_seconds")
Cost = dict[str, float]


class TrainingCost(Callback):
    """Measure the time of training steps, and write ``training.json`` with every checkpoint.

    Validation, its pictures and the start of the command do not count. The record also lies in the
    checkpoint, so a resumed training adds to what its checkpoint has cost. Steps that were lost by
    a crash do not count. A training that continues a checkpoint without a record has no record.

    Processor time is that of all processes of the training, without those that load data.

    Args:
        folder: The run folder.
        sources: What the training learns from, by the names ``start`` (a run folder) and ``pairs``
            (a folder of ``flowkit pairs``). Their own cost becomes a part of the record.
    """

    def __init__(self, folder: Path, sources: Mapping[str, str | Path | None]) -> None:
        self.folder, self.sources = folder, sources
        self.earlier: dict[str, Any] | None = None
        self.known = True
        self.spent, self.began = (0.0, 0.0), None

    spent: tuple[float, float]
    began: tuple[float, float] | None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the record of the steps before."""
        self.earlier = checkpoint.get("training_cost")
        self.known = self.earlier is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks. The record of a new training takes up the costs of its sources."""
        if self.earlier is None and self.known and trainer.is_global_zero:
            origins = {name: _origin(name, folder) for name, folder in self.sources.items()}
            self.earlier = dict.fromkeys(COSTS, 0.0) | {"machines": [], **origins}
        self.began = _clocks()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks."""
        self.spent, self.began = self._so_far(), None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks again."""
        self.began = None if trainer.sanity_checking else _clocks()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the record to the checkpoint, and write it to the run folder."""
        seconds, own = self._so_far()
        shared = mean_over_ranks(torch.tensor(own, device=pl_module.device))  # of all processes
        processor = own if trainer.world_size == 1 else shared.item() * trainer.world_size
        if self.earlier is None:
            return
        machine, known = _machine(trainer, pl_module), self.earlier["machines"]
        record = {
            "version": VERSION,
            "steps": trainer.global_step,
            "seconds": round(self.earlier["seconds"] + seconds, 3),
            "processor_seconds": round(self.earlier["processor_seconds"] + processor, 3),
            "machines": known if machine in known else [*known, machine],
            **{name: self.earlier[name] for name in self.sources},
        }
        checkpoint["training_cost"] = record
        if trainer.is_global_zero:
            write_json(self.folder / RECORD, record)

    def _so_far(self) -> tuple[float, float]:
        """Return the seconds of this process in this fit: of the wall clock and of processors."""
        if self.began is None:
            return self.spent
        now = _clocks()
        wall, processor = (now[k] - self.began[k] + self.spent[k] for k in range(2))
        return wall, processor


def _clocks() -> tuple[float, float]:
    """Return the wall clock and the processor time of this process, all threads together."""
    return time.perf_counter(), time.process_time()


def _machine(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return the device, the cores that this process may use, and the number of processes."""
    cuda = module.device.type == "cuda"
    name = torch.cuda.get_device_name(module.device) if cuda else module.device.type
    free = getattr(os, "sched_getaffinity", None)
    cores = len(free(0)) if free else os.cpu_count()
    return {"device": name, "cores": cores, "processes": trainer.world_size}


def _origin(name: str, folder: str | Path | None) -> dict[str, Any] | None:
    """Return the record of a source: its folder and cost, and of a run the hash of its weights."""
    if folder is None:
        return None
    whose = {} if name == "pairs" else {"hash": weights(load_run(folder))["hash"]}
    return {"folder": str(folder), **whose, "training": read_cost(folder)}


def read_cost(folder: str | Path) -> dict[str, Any] | None:
    """Return the record of a run folder or of a folder of pairs; None for a folder without one.

    Raises:
        ValueError: If the file is not such a record.
    """
    file = Path(folder) / RECORD
    if not file.is_file():
        return None
    record = read_json(file)
    try:
        total_cost(record)
        machines_of(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold the cost of a training, got {error!r}") from error
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

    A run that is the source of several parts counts once.

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
    for source in (record.get("start"), record.get("pairs")):
        if source is not None:
            found |= _costs(source["training"], source.get("hash", source["folder"]))
    return found
