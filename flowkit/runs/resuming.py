"""Resuming of a stopped run: its checkpoint and its configuration."""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from flowkit.modules.checkpoints import (
    UNRESOLVED,
    newest_checkpoint,
    read_checkpoint,
    read_config,
)

# Options of these groups may change when a run is resumed.
CHANGEABLE = ("trainer.", "callback.", "logger.", "optimizer.", "lr_scheduler.")


def find_checkpoint(resume: Path) -> Path:
    """Return the newest checkpoint of a run folder, or ``resume`` itself if it is a file.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    file = newest_checkpoint(resume) if resume.is_dir() else resume
    if file is None or not file.is_file():
        raise FileNotFoundError(f"resume must be a run folder or a checkpoint, got {resume}")
    return file


def unfinished(checkpoint: Path, max_steps: int) -> dict[str, Any]:
    """Read a checkpoint whose step is below ``max_steps``; a negative ``max_steps`` is no limit.

    Raises:
        ValueError: If no step is left.
    """
    state = read_checkpoint(checkpoint)
    step = state["global_step"]
    if 0 <= max_steps <= step:
        raise ValueError(
            f"trainer.max_steps must exceed the steps already made, got {max_steps}; {checkpoint} "
            f"is at step {step}: raise trainer.max_steps to resume"
        )
    return state


def resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the configuration of a run folder to resume, with overrides of values applied.

    The configuration keeps its references, so a new ``trainer.max_steps`` also stretches the
    learning-rate schedule.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If the run is a run of another recipe, or if an override is not of `CHANGEABLE`.
    """
    folder = Path(cfg.resume)
    if not (folder / UNRESOLVED).is_file():
        raise FileNotFoundError(f"resume must be a run folder with {UNRESOLVED}, got {folder}")
    stored = OmegaConf.create(read_config(folder, UNRESOLVED))
    if missing := set(cfg) - set(stored):
        raise ValueError(
            f"resume must be a run of the same recipe, got {folder} without the options "
            f"{', '.join(sorted(missing))}"
        )
    OmegaConf.set_struct(stored, True)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key == "resume" or key.startswith("hydra."):
            continue
        if not key.startswith(CHANGEABLE) or key.endswith("._target_") or override.is_delete():
            raise ValueError(
                f"{key} must stay as it is when a run is resumed, got {override.input_line}; "
                f"only values of {', '.join(f'{part}*' for part in CHANGEABLE)} may change"
            )
        OmegaConf.update(stored, key, override.value(), force_add=override.is_add())
    stored.resume = stored.run_dir = str(folder)
    return stored
