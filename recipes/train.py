"""Train a flow: data, network, method and everything else by choice.

flowkit train                                      class-conditional digits
flowkit train experiment=fashion_mnist_cfm         a named experiment
flowkit train data=folder data.root=photos data.image_size=32   your own images
flowkit train resume=runs/2026-01-31_12-00-00      go on where a run stopped
"""

import warnings
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from flowkit.modules import FlowModule
from flowkit.modules.callbacks import StepProgress
from flowkit.modules.runs import CHECKPOINT, CONFIG


def train(cfg: DictConfig) -> FlowModule:
    """Train as configured; the run folder then holds all that `load_run` and recipes need."""
    checkpoint = None if cfg.resume is None else _checkpoint(Path(cfg.resume))
    seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup()
    cfg.shape, cfg.num_classes = list(data.shape), data.num_classes
    if data.num_classes is None and "drop_cond" in cfg.module:
        cfg.module.drop_cond = None
    if "mixed" in str(cfg.trainer.precision) and "fused" in cfg.optimizer:
        cfg.optimizer.fused = False  # Lightning clips no gradients of a fused one there
    module = instantiate(cfg.module)
    module.guided(cfg.guidance)  # refuses a scale that pictures would stumble on later

    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(OmegaConf.to_yaml(cfg, resolve=True))
    parameters = sum(p.numel() for p in module.parameters())
    print(
        f"{type(module).__name__} of {type(module.velocity).__name__} ({parameters:,} parameters) "
        f"on {len(data.train):,} samples of shape {tuple(data.shape)}"
    )
    callbacks = _parts(cfg.callback)
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepProgress())
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=_parts(cfg.logger))
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=checkpoint and True)
    print(f"run       {folder}")
    return module


def _parts(group: DictConfig | None) -> list:
    return [] if group is None else [instantiate(node) for node in group.values() if node]


def _checkpoint(resume: Path) -> Path:
    file = resume / CHECKPOINT if resume.is_dir() else resume
    if not file.is_file():
        raise FileNotFoundError(f"resume must be a run folder or a checkpoint, got {resume}")
    return file


def resumed(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Return the configuration of a run folder to resume, with value overrides applied."""
    folder = Path(cfg.resume)
    stored = OmegaConf.load(folder / CONFIG)
    values = [o.lstrip("+") for o in overrides if not o.startswith(("resume=", "hydra."))]
    for override in values:
        key = override.split("=", 1)[0]
        if not key.startswith(("trainer.", "callback.", "logger.")):
            raise ValueError(
                f"{key} must stay as it is when a run is resumed, got {override}; "
                "trainer.*, callback.* and logger.* may change"
            )
    here = {"resume": str(folder), "run_dir": str(folder)}
    return cast(DictConfig, OmegaConf.merge(stored, OmegaConf.from_dotlist(values), here))


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit train``."""
    # Lightning's own use of an old name of torch's; nothing that a user could do about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    if cfg.resume is not None and Path(cfg.resume).is_dir():
        cfg = resumed(cfg, list(HydraConfig.get().overrides.task))
    train(cfg)


if __name__ == "__main__":
    main()
