"""Processes of a recipe: their start, their devices and their printed lines."""

import logging
import warnings

from hydra.utils import instantiate
from lightning.fabric import Fabric
from lightning.fabric.utilities import rank_zero_only
from omegaconf import DictConfig

from flowkit.checks import check_at_least, usable_device

say = rank_zero_only(print)  # prints once for all processes


def quiet() -> None:
    """Hide a warning about Lightning's own code, which a user cannot avoid."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)


def check_trainer(node: DictConfig) -> None:
    """Require that this machine has the devices of a trainer, before any work.

    Raises:
        hydra.errors.InstantiationException: If Lightning refuses the trainer.
    """
    logging.disable(logging.INFO)  # the training says the same
    try:
        instantiate(node, logger=False, enable_progress_bar=False, val_check_interval=1)
    finally:
        logging.disable(logging.NOTSET)


def launch(cfg: DictConfig) -> Fabric:
    """Start the processes of a recipe: ``devices`` processes on each of ``num_nodes`` machines.

    Under torchrun or SLURM the processes have been started already. With one device on one
    machine no process is started.

    Raises:
        ValueError: If this machine has no such device, or if a numbered device is given for several
            processes.
    """
    check_at_least(cfg.devices, 1, "devices")
    check_at_least(cfg.num_nodes, 1, "num_nodes")
    several = cfg.devices * cfg.num_nodes > 1
    if several and ":" in cfg.device:
        raise ValueError(f"device must have no number with devices={cfg.devices}, got {cfg.device}")
    device = usable_device(cfg.device)
    fabric = Fabric(
        accelerator=device.type,
        devices=cfg.devices if device.index is None else [device.index],
        num_nodes=cfg.num_nodes,
        strategy="ddp" if several else "auto",
    )
    fabric.launch()
    return fabric
