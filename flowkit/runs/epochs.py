"""Epochs as numbers of steps, since the stream of training batches has no end."""

import math

from hydra.utils import instantiate
from omegaconf import DictConfig

from flowkit.data import SplitData


def count_in_steps(cfg: DictConfig, data: SplitData) -> None:
    """Replace epochs and shares of an epoch in ``cfg.trainer`` by numbers of steps.

    ``max_epochs`` lowers ``max_steps``, and a float ``val_check_interval`` is a share of an epoch,
    as in Lightning. An epoch has as many batches as hold the training samples once.

    Raises:
        ValueError: If a learning-rate schedule follows the number of steps, but there is no limit.
    """
    node = cfg.trainer
    share, epochs = node.get("val_check_interval"), node.get("max_epochs") or -1
    if epochs > 0 or isinstance(share, float):
        alone = {"logger": False, "enable_progress_bar": False, "val_check_interval": 1}
        world_size = instantiate(node, **alone).world_size
        batches = math.ceil(len(data.train) / (data.batch_size * world_size))
        if isinstance(share, float):
            node.val_check_interval = max(1, int(share * batches))
        if epochs > 0:
            steps = math.ceil(epochs * batches / node.accumulate_grad_batches)
            node.max_steps = steps if node.max_steps < 0 else min(steps, node.max_steps)
            node.max_epochs = -1
    schedule = cfg.lr_scheduler
    if node.max_steps < 0 and schedule is not None and node.max_steps in schedule.values():
        raise ValueError(
            f"trainer.max_steps must be given for a learning-rate schedule, got {node.max_steps}"
        )
