"""Train a flow, with a choice of data, network, method and all other parts.

flowkit train                                                   class-conditional digits
flowkit train experiment=fashion_mnist_cfm                      a named experiment
flowkit train data=folder data.root=photos data.image_size=32   your own images
flowkit train resume=runs/2026-01-31_12-00-00                   continue a stopped run
flowkit train resume=runs/mine trainer.max_steps=20000          ... with more steps
flowkit train trainer=ddp                                       on all devices of this machine
"""

import inspect
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import WeightAveraging
from omegaconf import DictConfig, OmegaConf

import flowkit.recipes._resolvers  # noqa: F401  # functions that configurations refer to
from flowkit.checks import check_choice
from flowkit.modules import (
    BlockwiseFlowMatching,
    ConditionGrid,
    FlowModule,
    LatentActions,
    LossPlot,
    MeanFlowMatching,
    MetricsTable,
    SampleGrid,
    Straightening,
    SymmetricalFlowMatching,
)
from flowkit.modules.callbacks import LastValidation, StepProgress, StopOnInterrupt
from flowkit.modules.checkpoints import (
    CONFIG,
    UNRESOLVED,
    newest_checkpoint,
    read_network,
    restore,
)
from flowkit.modules.flow import brings_start
from flowkit.modules.sharding import even_validation, shard_if_asked
from flowkit.modules.trust import check, trusting
from flowkit.places import shown
from flowkit.provenance import write_text
from flowkit.runs.epochs import count_in_steps
from flowkit.runs.known_data import record_of, write_data_record
from flowkit.runs.learning import follow_latents, sides_told_by_data, teach
from flowkit.runs.locks import locked
from flowkit.runs.logs import Settings, build_loggers, logging_to
from flowkit.runs.processes import check_trainer, quiet, say
from flowkit.runs.records import composed, recorded
from flowkit.runs.resuming import (
    check_unfinished,
    continued,
    find_checkpoint,
    folder_of,
    lacks_its_end,
    resumed,
)
from flowkit.runs.run import build_sampler
from flowkit.runs.splits import opened
from flowkit.runs.training_cost import TrainingCost
from flowkit.symmetrical import LabelStates
from flowkit.symmetrical.inputs import check_labeled

PREDICTIONS = {
    "velocity": None,
    "data": "flowkit.adapters.DataPrediction",
    "noise": "flowkit.adapters.NoisePrediction",
}
"""Modules that make velocities of what a network predicts."""

OF_THEIR_OWN = (MeanFlowMatching, SymmetricalFlowMatching, BlockwiseFlowMatching, LatentActions)
"""Methods whose networks do not give one velocity of one time."""

PAIRS = "flowkit.data.Pairs"  # what `flowkit pairs` makes, with a teacher or without


def train(cfg: DictConfig) -> FlowModule | LatentActions:
    """Train as configured; write a run folder for `load_run` and the other recipes."""
    with trusting(cfg.trust):  # also when the module loads the run in `start`
        return _train(cfg)


def _train(cfg: DictConfig) -> FlowModule | LatentActions:
    """Train as configured, with the trust of the user."""
    quiet()
    check_trainer(cfg.trainer)
    folder = Path(cfg.run_dir)
    checkpoint = _requeued(folder) if cfg.resume is None else find_checkpoint(Path(cfg.resume))
    _follow_start(cfg, checkpoint)
    latents = follow_latents(cfg, checkpoint)
    unresolved = composed(cfg)  # now, since building parts resolves their references
    state = None if checkpoint is None else continued(checkpoint)
    ended = _ended(cfg, checkpoint, state)
    _refuse_overwriting(folder, checkpoint, cfg.resume)
    if checkpoint is not None and state is not None:
        say(f"resuming  {shown(folder_of(checkpoint))} from step {state['global_step']:,}")
    seed_everything(cfg.seed, workers=True, verbose=False)
    origin = cfg.get("run") if checkpoint is None else folder_of(checkpoint)
    data = opened(instantiate(cfg.data), record_of(origin), cfg.data_changed)
    say(f"data      {data.summary()}")
    count_in_steps(cfg, data)
    ended = ended or _ended(cfg, checkpoint, state)  # by a number of epochs
    with sides_told_by_data(cfg.data):
        module = _module(cfg, data, latents)
    if checkpoint is None and cfg.get("sampler") is not None:  # of the pictures
        build_sampler(cfg.sampler, _is_a(cfg, BlockwiseFlowMatching))
    if checkpoint is not None and state is not None:
        restore(module, state, checkpoint)  # refuses another model before any file is written
    averaged = state is not None and "current_model_state" in state
    progress = state["loops"]["fit_loop"] if state is not None and ended else None
    loggers = build_loggers(cfg.logger, folder, 0 if state is None else state["global_step"])
    del state

    pairs = cfg.data.root if cfg.data._target_ == PAIRS else None
    sources = {"start": cfg.module.get("start"), "pairs": pairs, "latents": latents}
    cost = TrainingCost(folder, sources)
    told = Settings(folder, recorded(cfg))
    callbacks = [*_parts(cfg.callback), cost, told, LastValidation(), StopOnInterrupt(folder)]
    if averaged and not any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise ValueError(
            "callback.ema must stay for a run that averages its weights, got no average; the raw "
            "weights would be lost"
        )
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepProgress())
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    shard_if_asked(module, trainer)
    even_validation(trainer, len(data.val), data.batch_size)
    fresh = not folder.exists() or not any(folder.iterdir())
    with locked(folder) if trainer.is_global_zero else nullcontext():
        if trainer.is_global_zero:
            _refuse_overwriting(folder, checkpoint, cfg.resume)  # another may just have ended
            write_text(folder / CONFIG, OmegaConf.to_yaml(recorded(cfg)))
            write_text(folder / UNRESOLVED, unresolved)
            write_data_record(folder, data, recorded(cfg)["data"])
        try:
            with logging_to(loggers), sides_told_by_data(cfg.data):
                _fit(trainer, module, data, checkpoint, progress)
        except Exception:
            if fresh and trainer.is_global_zero and trainer.global_step == 0:
                _empty(folder)  # a training that could not start
            raise
    say(f"run       {shown(folder)}")
    _report(trainer)
    return module


def _fit(
    trainer: Trainer,
    module: FlowModule | LatentActions,
    data: Any,
    checkpoint: Path | None,
    progress: dict[str, Any] | None,
) -> None:
    """Train; with the progress of a training that has ended, make its last validation alone."""
    if progress is not None:
        trainer.fit_loop.load_state_dict(progress)  # for the step in names and tables
        trainer.validate(module, data, verbose=False)
    else:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=checkpoint and True)


def _ended(cfg: DictConfig, checkpoint: Path | None, state: dict[str, Any] | None) -> bool:
    """Return True if only the validation after the last step is left to make.

    Raises:
        ValueError: If nothing is left to make.
    """
    if checkpoint is None or state is None:
        return False
    step = state["global_step"]
    ended = lacks_its_end(cfg, step)
    if not ended:
        check_unfinished(checkpoint, step, cfg.trainer.max_steps)
    return ended


def _report(trainer: Trainer) -> None:
    """Print the last validation, and the files that hold it."""
    loss = trainer.callback_metrics.get("val/loss")
    if loss is not None:
        say(f"held out  loss {loss:.4f} at step {trainer.global_step}")
    for callback in cast(Any, trainer).callbacks:
        if isinstance(callback, SampleGrid | ConditionGrid):
            picture = callback.folder / f"step-{trainer.global_step:06d}.png"
            if picture.is_file():
                say(f"picture   {picture}")
        if isinstance(callback, LossPlot) and callback.file.is_file():
            say(f"losses    {callback.file}")
    for logger in trainer.loggers:
        if isinstance(logger, MetricsTable):
            say(f"numbers   {logger.file}")


def _follow_start(cfg: DictConfig, checkpoint: Path | None) -> None:
    """Give a student the network and the autoencoder of the run it starts from.

    A resumed student has them in its own run, and needs the other only as a teacher that makes
    its batches. Blocks that start from a run keep their own network, which may differ from the
    run's network.
    """
    start, place, name = cfg.module.get("start"), cfg.module.get("start"), "module.start"
    if start is None or not _is_a(cfg, (Straightening, MeanFlowMatching)):
        return
    if checkpoint is not None and (folder_of(checkpoint) / CONFIG).is_file():
        if _is_a(cfg, Straightening) and cfg.data._target_ != PAIRS:
            read_network(start, name)
        place, name = folder_of(checkpoint), "resume"
    taught = read_network(place, name)["module"]
    check(taught, f"module of {place}")
    cfg.model, cfg.autoencoder = taught["velocity"], taught.get("autoencoder", cfg.autoencoder)
    if _is_a(cfg, MeanFlowMatching):
        OmegaConf.update(cfg, "model.num_times", 2, force_add=True)


def _module(cfg: DictConfig, data: Any, latents: str | None) -> FlowModule | LatentActions:
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
    _check_null(cfg, data)
    _convert_prediction(cfg)
    if _is_a(cfg, LatentActions):
        module = instantiate(cfg.module)
        network = module.model
    else:
        module = instantiate(cfg.module, autoencoder=autoencoder)
        _check_kinds(module)
        network = module.net if _is_a(cfg, MeanFlowMatching) else module.velocity
        module.guided(cfg.guidance)  # refuses a wrong scale now and not at the first picture
    teach(network, data, latents)
    if cfg.compile:
        network.compile()  # in place, so that names in checkpoints stay the same
    parameters = sum(p.numel() for p in module.parameters())
    name = f"{type(module).__name__} of {type(network).__name__}"
    say(f"model     {name}, {parameters:,} parameters")
    return module


def _convert_prediction(cfg: DictConfig) -> None:
    """Make a velocity of a network that predicts data or noise."""
    prediction = cfg.get("prediction", "velocity")
    check_choice(prediction, PREDICTIONS, "prediction")
    wrapper = PREDICTIONS[prediction]
    if wrapper is None:
        return
    if _is_a(cfg, OF_THEIR_OWN):
        name = cfg.module._target_.rpartition(".")[2]
        raise ValueError(
            f"prediction must be velocity for {name}, whose network gives something of its own, "
            f"got {prediction}"
        )
    node = {"_target_": wrapper, "net": "${model}", "path": "${path}"}
    OmegaConf.update(cfg, "module.velocity", node, merge=False)


def _is_a(cfg: DictConfig, methods: type | tuple[type, ...]) -> bool:
    """Say whether the configured module is of one of these classes or derived from them."""
    try:
        found = get_object(cfg.module._target_)
    except ImportError:  # the error of building the module says more
        return False
    return isinstance(found, type) and issubclass(found, methods)


def _check_null(cfg: DictConfig, data: Any) -> None:
    """Refuse a class as the label that means no label; training would lose this class."""
    null = (cfg.module.get("drop_cond") or {}).get("null")
    labels = cast(Any, null).values() if OmegaConf.is_dict(null) else [null]
    classes = data.num_classes or 0
    if any(label in range(classes) for label in labels):
        raise ValueError(
            f"module.drop_cond.null must be no class, got {null}; the classes are 0 to "
            f"{classes - 1}, so {classes} can mean no class"
        )


def _check_kinds(module: Any) -> None:
    """Require a module of flows, and a network that is called as one."""
    if not isinstance(module, FlowModule):
        raise TypeError(
            f"module must be a subclass of flowkit.modules.FlowModule, got {type(module).__name__};"
            " derive the class from it, with a method loss(batch, generator)"
        )
    network = module.velocity
    try:
        inspect.signature(getattr(network, "forward", network)).bind("x", "t", "cond")
    except TypeError as error:
        raise TypeError(
            f"model must be callable as model(x, t, cond), got {type(network).__name__}: {error}"
        ) from error


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
    if isinstance(cond := batch.get("cond"), Mapping):
        for name, axis in (("frames", 1), ("vector", 1), ("tokens", 2)):
            size = cond[name].shape[axis] if name in cond else None
            OmegaConf.update(cfg, f"network.{name}", size, force_add=True)
    if _is_a(cfg, MeanFlowMatching):
        net.num_times, net.time_scale = 2, 10
    if "codec" in cfg.module:
        labels, codec = check_labeled(batch), cfg.module.codec
        codec = instantiate(codec) if OmegaConf.is_config(codec) else codec
        code = LabelStates(codec, autoencoder).encode(labels[:1])
        net.shape[0] += code.shape[1]
        net.num_classes, net.num_times = None, 1 if cfg.module.times == "symmetric" else 2


def _empty(folder: Path) -> None:
    """Remove the content of a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _parts(group: DictConfig | None) -> list:
    """Build the parts of a group. Parts that are null or have no class are left out."""
    nodes = [] if group is None else [node for node in group.values() if node]
    return [instantiate(node) for node in nodes if node._target_]


def _requeued(folder: Path) -> Path | None:
    """Return the checkpoint of a job that SLURM has started again in the same folder, or None."""
    started_again = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    return newest_checkpoint(folder) if started_again else None


def _refuse_overwriting(folder: Path, resumed: Path | None, resume: str | None) -> None:
    """Raise if the folder holds another run than the resumed one.

    A checkpoint file of the folder has no part in the settings, so these would be lost.
    """
    trained = newest_checkpoint(folder)
    own = resumed is not None and resumed.resolve().is_relative_to(folder.resolve())
    given_as_file = resume is not None and Path(resume).is_file()
    if trained is not None and (not own or given_as_file):
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
