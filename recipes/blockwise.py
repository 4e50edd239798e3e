"""Train a feature residual, one stack, or blocks of a plain network, from a run.

flowkit blockwise run=runs/stage1 hydra.run.dir=runs/stage2               the feature residual
flowkit blockwise run=runs/stage1 stage=flow segments=[3]                 one stack alone
flowkit blockwise run=runs/plain stage=flow edges=6                       six equal blocks
flowkit blockwise run=runs/plain stage=flow edges=6 equal_burden=true     ... of equal burden
flowkit blockwise run=runs/stage1 data.root=photos                        data that have moved

Data, path, network and initial weights come from the run. Trainer, optimizer and callbacks come
from the options. The new run holds all blocks, and is resumed, sampled and evaluated like any other
run.
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
from flowkit.modules.checkpoints import read_network
from flowkit.modules.trust import check, trusting
from flowkit.recipes.train import train
from flowkit.runs.known_data import read_data_record
from flowkit.runs.processes import check_trainer
from flowkit.runs.splits import as_trained, check_given, check_known, located, prepared

KEPT = ("data", "path", "coupling", "autoencoder", "guidance")  # taken from the run


def blockwise(cfg: DictConfig) -> FlowModule:
    """Train as configured, from the run's weights.

    Raises:
        ValueError: If a run is given to resume; its settings would be lost.
    """
    if cfg.resume is not None:
        raise ValueError(
            f"resume must be null in blockwise, got {cfg.resume}; a stopped run of blockwise "
            f"continues with flowkit train resume={cfg.resume}"
        )
    check_trainer(cfg.trainer)
    stored = read_network(cfg.run)
    check_known(stored["data"], cfg.run)
    record = read_data_record(cfg.run)
    stored["data"] = located(as_trained(stored["data"], record), record, cfg.data.get("root"))
    check_given(stored["data"])
    with trusting(cfg.trust):
        check({name: stored.get(name) for name in (*KEPT, "module")}, f"{cfg.run}")
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
    """Return the configuration of the new network.

    A network of blocks stays, in the second stage with a feature residual. A plain network is
    copied to blocks.

    Raises:
        ValueError: If the second stage is chosen for a network without a trunk, or if edges are
            given for a network that has blocks.
    """
    if cfg.stage == "fra" and (
        "edges" not in stored or ("trunk" in stored and not stored["trunk"])
    ):
        raise ValueError(
            f"run must be of blocks with a trunk for stage fra, got {stored['_target_']} without; "
            "stage=flow makes blocks of a plain network, or trains the blocks of the run"
        )
    if "edges" in stored:
        if cfg.equal_burden or cfg.edges is not None:
            raise ValueError(
                f"edges must be null for a run with blocks, got edges={cfg.edges} "
                f"equal_burden={cfg.equal_burden}; start from a plain run to choose edges"
            )
        if cfg.stage != "fra":  # the feature residual does not fit a trunk that changes
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
    """Return the ends of the segments: as given, or with equal burden."""
    given = edges_of(6 if cfg.edges is None else cfg.edges)
    if not cfg.equal_burden:
        return given
    run, data = load_run(cfg.run, trust=cfg.trust), prepared(instantiate(cfg.data))
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
    """Return the ends of segments, given these ends or a number of equal segments.

    >>> edges_of(4)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if isinstance(value, int):
        return [k / value for k in range(value + 1)]
    return [float(end) for end in value]


@hydra.main(version_base="1.3", config_path="../conf", config_name="blockwise")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit blockwise``."""
    warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # frozen parts
    blockwise(cfg)


if __name__ == "__main__":
    main()
