"""Regression of data by the network of a flow: what a flow is compared with."""

from typing import Any

import torch
from torch import Tensor

from flowkit.autoencoders import Autoencoder, Identity
from flowkit.losses import flow_matching_loss
from flowkit.modules.flow import FlowModule, Guidance
from flowkit.modules.resume import ADAMW, MakeOptimizer, MakeScheduler
from flowkit.sampling import ODESampler, Sampler, Solution
from flowkit.sampling.ode import Callback
from flowkit.times import Device
from flowkit.types import Batch, Cond
from flowkit.velocity import Velocity


class Regression(FlowModule):
    """Train ``velocity(0, 0, cond) ≈ x1`` by the mean squared error.

    It is flow matching whose source is 0 and whose only time is 0: the network sees its condition
    alone, and one Euler step from 0 gives its answer. So a flow and the regression of the same
    network differ in nothing else. The answer is the mean of all data under a condition, and where
    several are right, their mean.

    Args:
        velocity: The network.
        autoencoder: Maps data to states of the flow.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.

    >>> module = Regression(lambda x, t, cond: cond + x)
    >>> module.loss({"x1": torch.ones(4, 2), "cond": torch.zeros(4, 2)})["loss"]
    tensor(1.)
    """

    default_sampler = ODESampler(1, "euler")

    def __init__(
        self,
        velocity: Velocity,
        autoencoder: Autoencoder = Identity(),
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(velocity, autoencoder, None, optimizer, lr_scheduler)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the ``loss`` of a batch, and ``explained``, the explained share of energy."""
        states = self.encode(batch, generator)
        states["x0"] = torch.zeros_like(states["x1"])
        return flow_matching_loss(self.velocity, states, times=_at_zero, generator=generator)

    def solve(
        self,
        x0: Tensor,
        sampler: Sampler | None = None,
        cond: Cond = None,
        guidance: Guidance = None,
        *,
        return_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Return the answer: one Euler step from 0, whatever noise and sampler are given."""
        start = torch.zeros_like(x0)
        options: Any = {"return_path": return_path, "callback": callback}
        return super().solve(start, self.default_sampler, cond, guidance, **options)


def _at_zero(batch: int, device: Device = None, generator: torch.Generator | None = None) -> Tensor:
    """Return times 0."""
    return torch.zeros(batch, device=device)
