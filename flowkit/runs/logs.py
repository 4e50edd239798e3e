"""Loggers of a training: how they continue a resumed run, and what they are told about it."""

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig

from flowkit.extras import install
from flowkit.modules import MetricsTable
from flowkit.provenance import read_json, write_json

IDS = "loggers.json"
WANDB, MLFLOW = (f"lightning.pytorch.loggers.{n}Logger" for n in ("Wandb", "MLFlow"))
OFFLINE = "WANDB_MODE=offline, or no MLFLOW_TRACKING_URI, logs to the run folder alone"
PACKAGES = {WANDB: "wandb", MLFLOW: "mlflow"}


def build_loggers(group: DictConfig | None, folder: Path, first_step: int) -> list[Logger]:
    """Build the loggers of a training, so that they continue the logs of a resumed run.

    Steps from ``first_step`` on are taken out of the table and of TensorBoard, since they are
    logged again. Weights & Biases and MLflow continue the run that ``loggers.json`` names; they
    cannot remove what they have.

    Args:
        group: The parts of ``conf/logger``; parts that are null are left out.
        folder: The run folder.
        first_step: Steps that are made already; 0 begins new logs.

    Raises:
        ImportError: If the package of a logger is not installed. The error names the extra.
        ValueError: If ``loggers.json`` holds no names of runs.
    """
    ids = read_ids(folder) if first_step else {}
    loggers = []
    for node in [] if group is None else [node for node in group.values() if node]:
        kind = node._target_
        if (package := PACKAGES.get(kind)) and find_spec(package) is None:
            raise ImportError(
                f"{package} must be installed for logger={package}, got none; {install(package)}"
            )
        more: dict[str, Any] = {}
        if kind == WANDB:
            more = {"id": ids.get("wandb", secrets.token_hex(4))}
            more |= {"name": node.get("name") or folder.name}
        elif kind == MLFLOW:
            more = {"run_id": ids.get("mlflow"), "run_name": node.get("run_name") or folder.name}
            if not os.environ.get("MLFLOW_TRACKING_URI") and not node.get("tracking_uri"):
                # MLflow refuses folders without this; the small package has no data base.
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        elif kind == "lightning.pytorch.loggers.TensorBoardLogger":
            more = {"purge_step": first_step}
        logger = instantiate(node, **more)
        if isinstance(logger, MetricsTable):
            logger.first_step = first_step
        loggers.append(logger)
    return loggers


def read_ids(folder: Path) -> dict[str, str]:
    """Return the names of the runs in which loggers of other programs continue.

    Raises:
        ValueError: If the file holds other things.
    """
    if not (folder / IDS).is_file():
        return {}
    found = read_json(folder / IDS)
    values = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(one, str) and re.fullmatch(r"[0-9a-z]{1,64}", one) for one in values):
        raise ValueError(f"{IDS} must hold names of runs, got others in {folder}; delete the file")
    return cast(dict[str, str], found)


@contextmanager
def logging_to(loggers: list[Logger]) -> Iterator[None]:
    """Close the runs of loggers at the end, and tell their own errors in a line.

    Raises:
        RuntimeError: If a logger cannot reach its server.
    """
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in PACKAGES.values():
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"logger={package} must reach its server, got: {reason}; {OFFLINE}"
        ) from error
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger._experiment.finish()  # else it stays open until the process ends


class Settings(Callback):
    """Tell the configuration to all loggers that show it: TensorBoard, Weights & Biases, MLflow.

    TensorBoard also gets the last losses beside it; the others take the last value of each number.
    The names of runs that a resumed training continues go to ``loggers.json``. MLflow never changes
    a setting of a run: those that a resumed training changes become tags.

    Args:
        folder: The run folder.
        config: The resolved configuration, without secrets.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, flat(config)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the settings, and keep the names of runs."""
        if not trainer.is_global_zero:
            return
        ids: dict[str, str] = {}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(self.settings)
                ids["wandb"] = str(logger.version)
            elif isinstance(logger, MLFlowLogger):
                self._tell_mlflow(logger)
                ids["mlflow"] = str(logger.run_id)
        if ids:
            write_json(self.folder / IDS, ids)

    def _tell_mlflow(self, logger: MLFlowLogger) -> None:
        """Send settings that the run does not have, and the changed ones as tags."""
        run, client = str(logger.run_id), logger.experiment
        known = client.get_run(run).data.params
        logger.log_hyperparams({k: v for k, v in self.settings.items() if k not in known})
        for name, value in self.settings.items():
            if name in known and known[name] != str(value)[:250]:
                client.set_tag(run, name, str(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send settings and last losses to TensorBoard."""
        losses = ("train/loss", "val/loss", "val/explained")
        found = {name: trainer.callback_metrics.get(name) for name in losses}
        last = {f"last/{name}": float(value) for name, value in found.items() if value is not None}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.log_hyperparams(self.settings, last, trainer.global_step - 1)


def flat(config: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted names; lists become texts.

    >>> flat({"a": {"b": 1, "c": [1, 2]}, "d": None})
    {'a.b': 1, 'a.c': '[1, 2]', 'd': 'None'}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{place}{name}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            found[f"{place}{name}"] = value if plain else str(value)
    return found
