"""Go on from a trained run: its feature residual, one of its stacks, or blocks of a plain network.

flowkit blockwise run=runs/stage1 hydra.run.dir=runs/stage2               the feature residual
flowkit blockwise run=runs/stage1 stage=flow segments=[3]                 one stack alone
flowkit blockwise run=runs/plain stage=flow edges=6                       six equal blocks
flowkit blockwise run=runs/plain stage=flow edges=6 equal_burden=true     ... of equal burden

Data, path and network are the run's; trainer, optimizer and callbacks are configured anew, and the
weights are taken from the run at the start. The new run holds all blocks, and is resumed, sampled
and evaluated like any other.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from flowkit.blockwise import equal_burden, loss_by_time
from flowkit.modules import FlowModule, load_run
from flowkit.modules.checkpoints import read_config
from flowkit.recipes.train import train
from flowkit.runs.splits import prepared

KEPT = ("data", "path", "coupling", "autoencoder", "guidance")  # of the run


def blockwise(cfg: DictConfig) -> FlowModule:
    """Train as configured, from the run's weights."""
    stored = read_config(cfg.run)
    with open_dict(cfg):
        for name in KEPT:
            cfg[name] = stored.get(name)
        for name in ("batch_size", "seed"):
            if name in cfg.data:
                cfg.data[name] = cfg[name]
        cfg.module.drop_cond = stored["module"].get("drop_cond")
        cfg.model = network(stored["module"]["velocity"], cfg)
    return train(cfg)


def network(stored: dict[str, Any], cfg: DictConfig) -> dict[str, Any]:
    """The run's network, with a feature residual in the second stage, or blocks of a plain one.

    Raises:
        ValueError: If the second stage is asked of a network without a trunk, or edges of one that
            has them.
    """
    if cfg.stage == "fra" and (
        "edges" not in stored or ("trunk" in stored and not stored["trunk"])
    ):
        raise ValueError(
            f"run must be of blocks with a trunk for stage fra, got {stored['_target_']} without; "
            "stage=flow makes blocks of a plain network, or trains them on"
        )
    if "edges" in stored:
        if cfg.equal_burden or cfg.edges is not None:
            raise ValueError(
                f"edges must be left to the run, which has blocks already, got edges={cfg.edges} "
                f"equal_burden={cfg.equal_burden}; start from a plain run to choose them"
            )
        if cfg.stage != "fra":  # a trunk that is trained on leaves its feature residual behind
            left = {"residual_depth": None, "feature_mode": "full"}
            return stored if cfg.segments else {**stored, **left}
        residual = stored.get("residual_depth") or cfg.residual_depth
        return {**stored, "residual_depth": residual, "feature_mode": "fra"}
    ends = edges(cfg)
    return {
        "_target_": "flowkit.blockwise.Blockwise",
        "trunk": None,
        "stacks": {
            "_target_": "flowkit.blockwise.copies",
            "velocity": stored,
            "num_segments": len(ends) - 1,
        },
        "edges": ends,
    }


def edges(cfg: DictConfig) -> list[float]:
    """Ends of the segments, as given or of equal burden."""
    given = edges_of(6 if cfg.edges is None else cfg.edges)
    if not cfg.equal_burden:
        return given
    run, data = load_run(cfg.run), prepared(instantiate(cfg.data))
    path, coupling = instantiate(cfg.path), instantiate(cfg.coupling)
    generator = torch.Generator().manual_seed(cfg.seed)
    batch = run.encode(data.val[:2000], generator)
    times, loss = loss_by_time(
        run.velocity, batch, path=path, coupling=coupling, generator=generator
    )
    ends = equal_burden(times, loss, len(given) - 1).tolist()
    print(f"edges     {[round(end, 4) for end in ends]}")
    return ends


def edges_of(value: int | Sequence[float]) -> list[float]:
    """A number of equal segments, or their ends, as a list of ends."""
    if isinstance(value, int):
        return [k / value for k in range(value + 1)]
    return [float(end) for end in value]


@hydra.main(version_base="1.3", config_path="../conf", config_name="blockwise")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit blockwise``."""
    warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # what is frozen
    blockwise(cfg)


if __name__ == "__main__":
    main()
