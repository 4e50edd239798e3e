"""Train a flow, with a choice of data, network, method and all other parts.

flowkit train                                                   class-conditional digits
flowkit train experiment=fashion_mnist_cfm                      a named experiment
flowkit train data=folder data.root=photos data.image_size=32   your own images
flowkit train resume=runs/2026-01-31_12-00-00                   continue a stopped run
flowkit train resume=runs/mine trainer.max_steps=20000          ... with more steps
flowkit train trainer=ddp                                       on all devices of this machine
"""

import math
import os
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from omegaconf import DictConfig, ListConfig, OmegaConf

from flowkit.modules import FlowModule
from flowkit.modules.callbacks import StepProgress, StopOnInterrupt
from flowkit.modules.checkpoints import (
    CHECKPOINT,
    CONFIG,
    UNRESOLVED,
    newest_checkpoint,
    read_config,
    restore,
)
from flowkit.modules.flow import brings_start
from flowkit.modules.sharding import even_validation, shard_if_asked
from flowkit.runs.processes import quiet, say
from flowkit.runs.resuming import find_checkpoint, resumed, unfinished
from flowkit.runs.splits import prepared
from flowkit.symmetrical import LabelStates
from flowkit.symmetrical.inputs import check_labeled

RESOLVERS = {
    # A resumed run keeps its own folder; Hydra would make a new folder.
    "run_folder": lambda old, new: old if old is not None and Path(old).is_dir() else new,
    # Shapes of networks within other networks, see flowkit.symmetrical.networks.
    "flat": lambda image, state: ListConfig([math.prod(image) + state[0] - image[0]]),
    "one_more_channel": lambda state: ListConfig([state[0] + 1, *state[1:]]),
}
for name, resolver in RESOLVERS.items():
    OmegaConf.register_new_resolver(name, resolver, replace=True)


def train(cfg: DictConfig) -> FlowModule:
    """Train as configured; write a run folder for `load_run` and the other recipes."""
    quiet()
    _follow_start(cfg)
    composed = OmegaConf.to_yaml(cfg)  # now, since building parts resolves their references
    folder = Path(cfg.run_dir)
    checkpoint = _requeued(folder) if cfg.resume is None else find_checkpoint(Path(cfg.resume))
    state = None if checkpoint is None else unfinished(checkpoint, cfg.trainer.max_steps)
    _refuse_overwriting(folder, checkpoint)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data = prepared(instantiate(cfg.data))
    say(f"data      {data.summary()}")
    module = _module(cfg, data)
    if checkpoint is not None and state is not None:
        restore(module, state, checkpoint)  # refuses another model before any file is written
    averaged = state is not None and "current_model_state" in state
    del state

    callbacks = [*_parts(cfg.callback), StopOnInterrupt(folder)]
    _say_what_the_average_keeps(cfg)
    if averaged and not any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise ValueError(
            "callback.ema must stay for a run that averages its weights, got no average; the raw "
            "weights would be lost"
        )
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepProgress())
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=_parts(cfg.logger))
    shard_if_asked(module, trainer)
    even_validation(trainer, len(data.val), data.batch_size)
    if trainer.is_global_zero:
        _write(folder, {CONFIG: OmegaConf.to_yaml(cfg, resolve=True), UNRESOLVED: composed})
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=checkpoint and True)
    say(f"run       {folder}")
    return module


def _say_what_the_average_keeps(cfg: DictConfig) -> None:
    """Warn if a short training leaves much of the initial weights in the averaged weights."""
    decay, steps = OmegaConf.select(cfg, "callback.ema.decay"), cfg.trainer.max_steps
    averages = OmegaConf.select(cfg, "callback.ema._target_") and decay is not None and steps > 0
    if averages and (kept := decay**steps) > 0.05:
        say(
            f"warning   averaged weights will be {kept:.0%} the initial ones after {steps} steps; "
            f"lower callback.ema.decay = {decay}, or use callback=raw"
        )


def _follow_start(cfg: DictConfig) -> None:
    """Give a student of straightening the network and the autoencoder of its teacher.

    Blocks that start from a run keep their own network, which may differ from the run's network.
    """
    student = cfg.module._target_.endswith(".Straightening")
    if student and (start := cfg.module.get("start")) is not None:
        taught = read_config(start)["module"]
        cfg.model, cfg.autoencoder = taught["velocity"], taught["autoencoder"]


def _module(cfg: DictConfig, data: Any) -> FlowModule:
    """Build the module, and fill in the values of the configuration that depend on the data."""
    autoencoder = instantiate(cfg.autoencoder)
    tell(cfg, data, autoencoder)
    drop_cond = cfg.module.get("drop_cond")
    null = {} if drop_cond is None else drop_cond.get("null")
    if null is None or (OmegaConf.is_dict(null) and None in null.values()):
        cfg.module.drop_cond = None  # without labels there is no null label
    if data.coupling is not None and "coupling" in cfg.module:
        cfg.module.coupling = {
            "_target_": "flowkit.couplings.Independent"
        }  # the data loader makes the pairs
    if "mixed" in str(cfg.trainer.precision) and "fused" in cfg.optimizer:
        cfg.optimizer.fused = False  # Lightning cannot clip its gradients in mixed precision
    module = instantiate(cfg.module, autoencoder=autoencoder)
    if cfg.compile:
        module.velocity.compile()  # in place, so that names in checkpoints stay the same
    module.guided(cfg.guidance)  # refuses a wrong scale now and not at the first picture
    parameters = sum(p.numel() for p in module.parameters())
    name = f"{type(module).__name__} of {type(module.velocity).__name__}"
    say(f"model     {name}, {parameters:,} parameters")
    return module


@torch.no_grad()
def tell(cfg: DictConfig, data: Any, autoencoder: Any) -> None:
    """Fill in the values that parts of the configuration take from the data."""
    batch = data.stream()[0]
    x1 = batch["x1"][:1]
    x1 = x1 if "encoded_by" in batch else autoencoder.encode(x1)  # cached latents are states
    cfg.shape, cfg.num_classes = list(x1.shape[1:]), data.num_classes
    cfg.image_shape = list(getattr(data, "image_shape", data.shape))
    cfg.needs_data = brings_start(data.train[:1], data)
    net = cfg.network
    net.shape, net.num_classes = list(cfg.shape), cfg.num_classes
    if "codec" in cfg.module:
        labels, codec = check_labeled(batch), cfg.module.codec
        codec = instantiate(codec) if OmegaConf.is_config(codec) else codec
        code = LabelStates(codec, autoencoder).encode(labels[:1])
        net.shape[0] += code.shape[1]
        net.num_classes, net.num_times = None, 1 if cfg.module.times == "symmetric" else 2


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write text files to the run folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise ValueError(
            f"hydra.run.dir must be a writable folder, got {folder}: {error}"
        ) from error


def _parts(group: DictConfig | None) -> list:
    """Build the parts of a group. Parts that are null or have no class are left out."""
    nodes = [] if group is None else [node for node in group.values() if node]
    return [instantiate(node) for node in nodes if node._target_]


def _requeued(folder: Path) -> Path | None:
    """Return the checkpoint of a job that SLURM has started again in the same folder, or None."""
    started_again = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    return newest_checkpoint(folder) if started_again else None


def _refuse_overwriting(folder: Path, resumed: Path | None) -> None:
    """Raise if the folder holds another run than the resumed one."""
    trained = folder / CHECKPOINT
    own = resumed is not None and resumed.resolve().is_relative_to(folder.resolve())
    if trained.exists() and not own:
        raise FileExistsError(
            f"hydra.run.dir must hold no trained run, got {folder}; continue this run by "
            f"resume={folder}, delete the folder, or choose another folder"
        )


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit train``."""
    if cfg.resume is not None and Path(cfg.resume).is_dir():
        cfg = resumed(cfg, list(HydraConfig.get().overrides.task))
    train(cfg)


if __name__ == "__main__":
    main()
