"""Processes, their devices, and what they say."""

import warnings

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities import rank_zero_only
from omegaconf import DictConfig

from flowkit.checks import check_at_least

say = rank_zero_only(print)  # once, whatever the number of processes


def quiet() -> None:
    """Leave out what Lightning warns about in its own code: a user can do nothing about it."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)


def usable_device(name: str | torch.device) -> torch.device:
    """Return a device of this machine.

    Raises:
        ValueError: If there is no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device must be one of this machine's, such as cpu, got {name}: {reason}"
        ) from error
    return device


def launch(cfg: DictConfig) -> Fabric:
    """Start ``devices`` processes on each of ``num_nodes`` machines, of which this is the first.

    Under torchrun or SLURM they have been started already. One process is left alone.

    Raises:
        ValueError: If this machine has no such device.
    """
    check_at_least(cfg.devices, 1, "devices")
    check_at_least(cfg.num_nodes, 1, "num_nodes")
    several = cfg.devices * cfg.num_nodes > 1
    if several and ":" in cfg.device:
        raise ValueError(
            f"device must be a kind of device with devices={cfg.devices}, got {cfg.device}"
        )
    device = usable_device(cfg.device)
    fabric = Fabric(
        accelerator=device.type,
        devices=cfg.devices if device.index is None else [device.index],
        num_nodes=cfg.num_nodes,
        strategy="ddp" if several else "auto",
    )
    fabric.launch()
    return fabric
