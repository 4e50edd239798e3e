"""Going on with a run that was stopped."""

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

CHANGEABLE = ("trainer.", "callback.", "logger.", "optimizer.", "lr_scheduler.")


def find_checkpoint(resume: Path) -> Path:
    """Return the checkpoint of a run folder, or the one that ``resume`` itself is."""
    file = newest_checkpoint(resume) if resume.is_dir() else resume
    if file is None or not file.is_file():
        raise FileNotFoundError(f"resume must be a run folder or a checkpoint, got {resume}")
    return file


def unfinished(checkpoint: Path, max_steps: int) -> dict[str, Any]:
    """Read a checkpoint that has steps left to make."""
    state = read_checkpoint(checkpoint)
    step = state["global_step"]
    if 0 <= max_steps <= step:
        raise ValueError(
            f"trainer.max_steps must exceed the steps already made, got {max_steps}; {checkpoint} "
            f"is at step {step}: raise trainer.max_steps to go on"
        )
    return state


def resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the configuration of a run folder to resume, with value overrides applied.

    It keeps its references: a new ``trainer.max_steps`` also stretches a learning-rate schedule.

    Raises:
        FileNotFoundError: If the folder is not a run.
        ValueError: If an override would change what is trained.
    """
    folder = Path(cfg.resume)
    if not (folder / UNRESOLVED).is_file():
        raise FileNotFoundError(f"resume must be a run folder with {UNRESOLVED}, got {folder}")
    stored = OmegaConf.create(read_config(folder, UNRESOLVED))
    if missing := set(cfg) - set(stored):
        raise ValueError(
            f"resume must be a run of the same recipe, got {folder}, which knows no "
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
                f"values of {', '.join(f'{part}*' for part in CHANGEABLE)} may change"
            )
        OmegaConf.update(stored, key, override.value(), force_add=override.is_add())
    stored.resume = stored.run_dir = str(folder)
    return stored
