"""Conditional flow matching (I-CFM, OT-CFM) and weighted flow matching (W-CFM)."""

import torch
from torch import Tensor

from flowkit.autoencoders import Autoencoder, Identity
from flowkit.couplings import Coupling, Gibbs, Independent
from flowkit.couplings.gibbs import Debias, Normalize
from flowkit.couplings.transport import Cost
from flowkit.guidance import DropCond
from flowkit.losses import flow_matching_loss
from flowkit.modules.flow import FlowModule
from flowkit.modules.resume import ADAMW, MakeOptimizer, MakeScheduler
from flowkit.paths import Linear, Path
from flowkit.times import Times, Uniform
from flowkit.types import Batch
from flowkit.velocity import Velocity


class ConditionalFlowMatching(FlowModule):
    """Train ``velocity(x_t, t, cond) ≈ u`` on pairs of noise and data.

    The defaults give I-CFM / rectified flow; ``coupling=MinibatchOT()`` gives OT-CFM.
    Sources: Lipman et al. 2022 (arXiv 2210.02747); Liu et al. 2022 (arXiv 2209.03003); Tong et al.
    2023 (arXiv 2302.00482). See `flowkit.losses.flow_matching_loss` for the loss.

    Args:
        velocity: The network.
        path: Gives the state of a pair at time ``t``, and its velocity.
        coupling: Pairs noise with data.
        times: Distribution of training times in [0, 1].
        autoencoder: Maps data to states of the flow.
        drop_cond: Drops conditions in training, for classifier-free guidance.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.

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
    ) -> None:
        super().__init__(velocity, autoencoder, drop_cond, optimizer, lr_scheduler)
        self.path, self.coupling, self.times = path, coupling, times

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the ``loss`` of a batch, and ``explained``, the explained share of energy."""
        return flow_matching_loss(
            self.velocity,
            self.encode(batch, generator),
            path=self.path,
            coupling=self.coupling,
            times=self.times,
            drop_cond=self.drop_cond,
            generator=generator,
        )


class WeightedFlowMatching(FlowModule):
    """Train ``velocity(x_t, t, cond) ≈ u`` on independent pairs, weighted by ``exp(−c/ε)``: W-CFM.

    ``loss = E[w(x0, x1) ‖v(x_t, t, cond) − u‖²] / Z``. The weights cost one distance per pair.
    Source: Calvo-Ordoñez et al. 2025 (arXiv 2507.22270). `flowkit.couplings.Gibbs` describes the
    weights, their bias and the ways to remove the bias. Other modules take a ``Gibbs`` as their
    coupling. This module also logs the telemetry of its ``Gibbs``: ``ess``,
    ``log_weight_variance``, ``interaction`` and ``tilt``.

    Args:
        velocity: The network.
        epsilon: Temperature ε in units of the cost; see `flowkit.couplings.suggest_epsilon`.
        cost: Cost ``c`` of a pair.
        normalize: Normalizer ``Z`` of the weights; see `flowkit.couplings.Gibbs`.
        debias: Method that removes the tilt; see `flowkit.couplings.Gibbs`.
        pool: Number of candidate pairs for each training pair.
        path: Gives the state of a pair at time ``t``, and its velocity.
        times: Distribution of training times in [0, 1].
        autoencoder: Maps data to states of the flow. The cost compares these states.
        drop_cond: Drops conditions in training, for classifier-free guidance.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.

    >>> from flowkit.exact import GaussianFlow
    >>> module = WeightedFlowMatching(GaussianFlow(0.0, 2.0), epsilon=4.0)
    >>> terms = module.loss({"x1": 2 * torch.randn(64, 2)})
    >>> sorted(terms)
    ['ess', 'explained', 'interaction', 'log_weight_variance', 'loss', 'tilt']
    """

    def __init__(
        self,
        velocity: Velocity,
        epsilon: float,
        cost: Cost = "euclidean",
        normalize: Normalize = "batch",
        debias: Debias = None,
        pool: int = 1,
        path: Path = Linear(),
        times: Times = Uniform(),
        autoencoder: Autoencoder = Identity(),
        drop_cond: DropCond | None = None,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(velocity, autoencoder, drop_cond, optimizer, lr_scheduler)
        self.coupling = Gibbs(epsilon, cost, normalize, debias, pool)
        self.path, self.times = path, times

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the weighted ``loss``, ``explained`` and, in steps that are logged, telemetry."""
        return flow_matching_loss(
            self.velocity,
            self.encode(batch, generator),
            path=self.path,
            coupling=self.coupling,
            times=self.times,
            drop_cond=self.drop_cond,
            generator=generator,
            observe=self.coupling.telemetry if self.terms_are_seen else None,
        )
