"""Conditional flow matching."""

import torch
from torch import Tensor

from flowkit.autoencoders import Autoencoder, Identity
from flowkit.couplings import Coupling, Independent
from flowkit.guidance import DropCond
from flowkit.losses import flow_matching_loss
from flowkit.modules.flow import FlowModule
from flowkit.modules.resume import ADAMW, MakeOptimizer, MakeScheduler
from flowkit.paths import Linear, Path
from flowkit.times import Times, Uniform
from flowkit.types import Batch, Velocity


class ConditionalFlowMatching(FlowModule):
    """Train ``velocity(x_t, t, cond) ≈ u`` on pairs of noise and data.

    With the defaults this is I-CFM / rectified flow; ``coupling=MinibatchOT()`` makes it OT-CFM.
    Sources: Lipman et al. 2022 (arXiv 2210.02747); Liu et al. 2022 (arXiv 2209.03003); Tong et al.
    2023 (arXiv 2302.00482). See `flowkit.losses.flow_matching_loss` for the loss.

    Args:
        velocity: The network.
        path: Where pairs are at time ``t``.
        coupling: Which noise goes with which data.
        times: Distribution of training times.
        autoencoder: Maps data to what the flow runs on.
        drop_cond: Conditions dropped in training, for classifier-free guidance.
        optimizer: Makes the optimiser from parameters.
        lr_scheduler: Makes a scheduler, stepped every training step.

    >>> from flowkit.exact import GaussianFlow
    >>> module = ConditionalFlowMatching(GaussianFlow(2.0, 0.5))
    >>> module.loss({"x1": 2 + 0.5 * torch.randn(8, 2)}).keys()
    dict_keys(['loss', 'explained'])
    >>> module.sample(3, seeds=[0, 1, 2]).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        velocity: Velocity,
        path: Path = Linear(),
        coupling: Coupling = Independent(),
        times: Times = Uniform(),
        autoencoder: Autoencoder = Identity(),
        drop_cond: DropCond | None = None,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ):
        super().__init__(velocity, autoencoder, drop_cond, optimizer, lr_scheduler)
        self.path, self.coupling, self.times = path, coupling, times

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the flow-matching loss of a batch and the share of energy explained."""
        return flow_matching_loss(
            self.velocity,
            self.encode(batch, generator),
            path=self.path,
            coupling=self.coupling,
            times=self.times,
            drop_cond=self.drop_cond,
            generator=generator,
        )
