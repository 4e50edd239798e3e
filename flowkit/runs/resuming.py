"""Resuming of a stopped run: its checkpoint, its configuration, and what it still lacks."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf

from flowkit.hub import is_pushed
from flowkit.modules.checkpoints import (
    CONFIG,
    UNRESOLVED,
    newest_checkpoint,
    read_checkpoint,
    read_config,
)
from flowkit.modules.logs import LOSSES
from flowkit.modules.trust import check, trusting
from flowkit.places import no_such_option
from flowkit.rules import NAMED, keys_of
from flowkit.runs.known_data import read_data_record
from flowkit.runs.splits import as_trained, located

# Options of these groups may change when a run is resumed.
CHANGEABLE = ("trainer.", "callback.", "logger.", "optimizer.", "lr_scheduler.", "data.root")


def find_checkpoint(resume: Path) -> Path:
    """Return the newest checkpoint of a run folder, or ``resume`` itself if it is a file.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is a shared model.
    """
    if NAMED.fullmatch(str(resume)) or is_pushed(resume):
        raise ValueError(
            f"resume must be a run folder or a checkpoint, got the shared model {resume}, which "
            "holds no optimizer; module=mean_flow, straightening or blockwise start from it by "
            "module.start="
        )
    file = newest_checkpoint(resume) if resume.is_dir() else resume
    if file is None or not file.is_file():
        begun = " without a checkpoint" if resume.is_dir() else ""
        raise FileNotFoundError(f"resume must be a run folder or a checkpoint, got {resume}{begun}")
    return file


def folder_of(checkpoint: Path) -> Path:
    """Return the run folder of a checkpoint, or the folder that the checkpoint lies in."""
    return next((f for f in checkpoint.parents[:2] if (f / CONFIG).is_file()), checkpoint.parent)


def continued(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint to continue.

    Raises:
        ValueError: If a callback would go on with files outside of the run.
    """
    state = read_checkpoint(checkpoint)
    _check_states(state.get("callbacks", {}), checkpoint)
    return state


def check_unfinished(checkpoint: Path, step: int, max_steps: int) -> None:
    """Require steps to make after that of a checkpoint; a negative ``max_steps`` is no limit.

    Raises:
        ValueError: If no step is left.
    """
    if 0 <= max_steps <= step:
        raise ValueError(
            f"trainer.max_steps must exceed the steps already made, got {max_steps}; {checkpoint} "
            f"is at step {step}: raise trainer.max_steps to resume"
        )


def lacks_its_end(cfg: DictConfig, step: int) -> bool:
    """Return True if a training has made its last step, but not the validation that follows.

    So it is after a kill between the last checkpoint and the end: a picture of this step or the
    plot of losses is not there, or no table of the training has a validation of this step.
    """
    if step != cfg.trainer.max_steps or cfg.trainer.get("limit_val_batches") == 0:
        return False
    groups = (cfg.get("callback") or {}, cfg.get("logger") or {})
    callbacks, loggers = ([node for node in group.values() if node] for group in groups)
    kinds = ("flowkit.modules.SampleGrid", "flowkit.modules.ConditionGrid")
    pictures = [
        Path(node.folder) / f"step-{step:06d}.png" for node in callbacks if node._target_ in kinds
    ]
    tables = [
        Path(node.save_dir, node.name).glob("*/metrics.csv")
        for node in loggers
        if node._target_ in ("flowkit.modules.MetricsTable", "lightning.pytorch.loggers.CSVLogger")
    ]
    if tables:
        plots = [node for node in callbacks if node._target_ == "flowkit.modules.LossPlot"]
        pictures += [Path(node.folder) / LOSSES for node in plots]
    shown = all(picture.is_file() for picture in pictures)
    return not shown or not all(any(_validated(t, step) for t in files) for files in tables)


def _validated(table: Path, step: int) -> bool:
    """Return True if a table of Lightning's has a validation after a step, which counts from 0."""
    with table.open(newline="", errors="replace") as lines:
        rows = list(csv.DictReader(lines))
    return any(row.get("val/loss") and row.get("step") == str(step - 1) for row in rows)


def _check_states(states: Mapping[str, Any], checkpoint: Path) -> None:
    """Require that paths in the states of callbacks lie in the run folder.

    Lightning's ``ModelCheckpoint`` deletes the files that its state names.

    Raises:
        ValueError: If a path lies elsewhere.
    """
    root = checkpoint.resolve().parent
    root = root.parent if root.name == "checkpoints" else root
    for name, state in states.items():
        for key, text in _texts(state):
            path = set(text) & {"/", "\\"}
            if path and ("://" in text or not Path(text).resolve().is_relative_to(root)):
                raise ValueError(
                    f"{name} in {checkpoint} must go on with files in {root}, got {key} = {text}; "
                    "leave out the callback, or start a new run"
                )


ADDED = {"prediction": "velocity"}
"""Options that runs of earlier versions do not have, and what those runs did."""


def resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the configuration of a run folder to resume, with overrides of values applied.

    The configuration keeps its references, so a new ``trainer.max_steps`` also stretches the
    learning-rate schedule.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If the run is a run of another recipe, if an override is not of `CHANGEABLE` or
            no option of the run, or if the stored configuration names a class that is neither
            listed nor trusted, or a place outside of the run folder to write to.
    """
    folder = Path(cfg.resume)
    if is_pushed(folder):
        find_checkpoint(folder)  # refuses it in words
    if not (folder / UNRESOLVED).is_file():
        raise FileNotFoundError(f"resume must be a run folder with {UNRESOLVED}, got {folder}")
    try:
        content = read_config(folder, UNRESOLVED)
    except ValueError as error:
        raise ValueError(
            f"{error}; copy {CONFIG} to {UNRESOLVED} to resume: a schedule then keeps its length"
        ) from error
    now = {"trust": cfg.trust, "data_changed": cfg.data_changed}  # never those of an earlier call
    added = {key: value for key, value in ADDED.items() if key in cfg}
    stored = OmegaConf.create({**added, **content, **now})
    if missing := set(cfg) - set(stored):
        raise ValueError(
            f"resume must be a run of the same recipe, got {folder} without the options "
            f"{', '.join(sorted(missing))}"
        )
    record = read_data_record(folder)
    node = OmegaConf.to_container(stored.data)
    stored.data = located(as_trained(cast(dict, node), record), record, None)
    OmegaConf.set_struct(stored, True)
    known = list(keys_of(cast(dict, OmegaConf.to_container(stored))))
    for override in OverridesParser.create().parse_overrides(overrides):
        key, given = override.key_or_group, str(override.input_line).lstrip("+")
        if key in ("resume", "trust", "data_changed") or key.startswith("hydra."):
            continue
        if not key.startswith(CHANGEABLE) or key.endswith("._target_") or override.is_delete():
            raise ValueError(
                f"{key} must stay as it is when a run is resumed, got {given}; "
                "only values of trainer.*, callback.*, logger.*, optimizer.*, lr_scheduler.* and "
                "data.root may change"
            )
        if not override.is_add() and key not in known:
            raise ValueError(no_such_option(key, known))
        OmegaConf.update(stored, key, override.value(), force_add=override.is_add())
    stored.resume = stored.run_dir = str(folder)
    with trusting(cfg.trust):  # after the overrides, which may remove a part
        check(OmegaConf.to_container(stored), str(folder), resolved=False)
    changed = [override.partition("=")[0].lstrip("+~") for override in overrides]
    _check_places(stored, folder, changed)
    return stored


# Arguments of Lightning's and flowkit's callbacks, loggers and trainer that say where to write.
PLACES = {"default_root_dir", "dirpath", "folder", "log_dir", "save_dir"}
PARTS = {"filename", "name", "sub_dir", "version"}  # of a path within such a place


def _check_places(stored: DictConfig, folder: Path, changed: list[str]) -> None:
    """Require that what a stored configuration writes lies in the run folder.

    Raises:
        ValueError: If a place that the user has not changed lies elsewhere.
    """
    root = folder.resolve()
    for file in folder.rglob("*"):
        if file.name == "debug-core.log" and file.relative_to(folder).parts[0] == "wandb":
            continue  # wandb's link to a log of its own, to which nothing here writes
        if file.is_symlink() and not file.resolve().is_relative_to(root):
            raise ValueError(
                f"files of a resumed run must lie in its folder, got the link {file}; replace it "
                "by the file itself"
            )
    parts = {part: stored.get(part) for part in ("callback", "logger", "trainer")}
    for key, value in _texts(parts):
        last = key.rpartition(".")[2]
        if "._args_" in key:
            raise ValueError(f"{key.partition('._args_')[0]} must name its arguments, got {value}")
        if key in changed or last not in PLACES | PARTS:
            continue
        if not (Path(value) if last in PLACES else root / value).resolve().is_relative_to(root):
            raise ValueError(
                f"{key} must lie in the run folder {folder} when a run is resumed, got {value}; "
                f"if you want this, give {key}={value}"
            )


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts of a configuration with their keys; keys count as texts, too."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping | DictConfig):
        for name in node:
            if isinstance(name, str):
                yield key, name
            yield from _texts(node[name], f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | ListConfig):
        for item in node:
            yield from _texts(item, key)
