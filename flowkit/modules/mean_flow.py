"""Mean flows: one network for any number of steps, one included."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from flowkit.adapters import DataPrediction, NoisePrediction
from flowkit.autoencoders import Autoencoder, Identity
from flowkit.checks import check_at_least, check_between, check_choice, check_number, expand_like
from flowkit.couplings import Coupling, Independent
from flowkit.guidance import DropCond, combine, is_null, replace_cond
from flowkit.losses import Draw, mean_flow_loss
from flowkit.modules.checkpoints import load_run
from flowkit.modules.flow import FlowModule, Guidance
from flowkit.modules.resume import ADAMW, MakeOptimizer, MakeScheduler
from flowkit.paths import Linear
from flowkit.paths import Path as ProbabilityPath
from flowkit.sampling import MeanVelocity, ODESampler
from flowkit.times import Times, Uniform
from flowkit.types import Batch
from flowkit.velocity import Velocity


class MeanFlowMatching(FlowModule):
    """Train a network on the mean velocity between any two times: one network, any number of steps.

    Euler steps of any size then carry noise to data, also a single one; see
    `flowkit.sampling.MeanVelocity` for the velocity and `flowkit.losses.mean_flow_loss` for the
    loss. Other solvers, inversion and likelihood use the instantaneous velocity of the network.

    With ``start`` the network begins as the trained flow of a run, exactly: its second time has no
    effect yet. It then has to learn only the means. A ``guidance_scale`` ω replaces the velocities
    of the pairs by ``ω (x1 − x0) + (1 − ω) u(x, t, t | null)``. Guidance that is learnt costs
    nothing in sampling, and cannot be added again.

    Sources: Geng et al., *Mean Flows for One-step Generative Modeling*, 2025 (arXiv 2505.13447);
    Geng et al., *Improved Mean Flows*, 2025 (arXiv 2512.02012).

    Args:
        velocity: The network, called as ``net(x, t, cond)`` with ``t (B, 2)``: the start and the
            end of a step. The networks of `flowkit.nn` have ``num_times=2`` for this.
        tangent: ``"network"`` or ``"conditional"``, see `flowkit.losses.mean_flow_loss`.
        flow_share: Share of a batch that trains the instantaneous velocity, in [0, 1].
        guidance_scale: Scale of the classifier-free guidance that is learnt; None for none.
        power: Exponent of the adaptive weights of pairs, at least 0. With 1, as published for
            images, the mean is biased where errors differ much from pair to pair, as they do in few
            dimensions: take 0 for points.
        start: Run folder of a flow, the source of the initial weights (the averaged ones).
        path: Gives the state of a pair at time ``t``, and its velocity.
        coupling: Pairs noise with data.
        times: Distribution of both training times in [0, 1].
        autoencoder: Maps data to states of the flow.
        drop_cond: Drops conditions in training, for classifier-free guidance.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.

    Raises:
        TypeError: If the network predicts data or noise.
        ValueError: If an option is out of its range, the network takes one time, or guidance is to
            be learnt without dropped conditions.

    >>> from flowkit.nn import MLP
    >>> module = MeanFlowMatching(MLP((2,), num_times=2))
    >>> sorted(module.loss({"x1": torch.randn(8, 2)}))
    ['explained', 'explained_mean', 'loss']
    >>> module.sample(3, seeds=[0, 1, 2]).shape
    torch.Size([3, 2])
    """

    default_sampler = ODESampler(4)

    def __init__(
        self,
        velocity: nn.Module,
        tangent: Literal["network", "conditional"] = "network",
        flow_share: float = 0.5,
        guidance_scale: float | None = None,
        power: float = 1.0,
        start: str | Path | None = None,
        path: ProbabilityPath = Linear(),
        coupling: Coupling = Independent(),
        times: Times = Uniform(),
        autoencoder: Autoencoder = Identity(),
        drop_cond: DropCond | None = None,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        if isinstance(velocity, DataPrediction | NoisePrediction):
            raise TypeError(
                "velocity must be a network whose result is a mean velocity, got "
                f"{type(velocity).__name__}"
            )
        if (found := getattr(velocity, "num_times", 2)) != 2:
            raise ValueError(
                f"velocity must take two times, got num_times={found}; build it with num_times=2"
            )
        super().__init__(MeanVelocity(velocity), autoencoder, drop_cond, optimizer, lr_scheduler)
        check_choice(tangent, ("network", "conditional"), "tangent")
        check_between(flow_share, 0, 1, "flow_share")
        check_at_least(power, 0, "power")
        if guidance_scale is not None:
            check_number(guidance_scale, "guidance_scale")
            if drop_cond is None or drop_cond.prob == 0:
                raise ValueError(
                    "guidance_scale must be None for a network that never trains without its "
                    f"condition, got {guidance_scale}; train it on data with classes and "
                    "module.drop_cond.prob=0.1"
                )
        self.tangent, self.flow_share, self.power = tangent, flow_share, power
        self.guidance_scale, self.start = guidance_scale, start
        self.path, self.coupling, self.times = path, coupling, times

    @property
    def net(self) -> nn.Module:
        """The network of two times."""
        return cast(nn.Module, cast(MeanVelocity, self.velocity).net)

    def take_start(self, place: str | Path) -> None:
        """Load the averaged weights of the run."""
        self.begin(load_run(place))

    def begin(self, flow: FlowModule) -> None:
        """Copy the weights of a flow to the network.

        Raises:
            ValueError: If the flow is more than its network, or has another path or network.
        """
        if flow.guided(None) is not flow.velocity or isinstance(flow, MeanFlowMatching):
            raise ValueError(
                "start must be a run whose network is the velocity of its states, got "
                f"{type(flow).__name__}"
            )
        if (path := getattr(flow, "path", Linear())) != self.path:
            raise ValueError(f"path must be that of the run in start, {path}, got {self.path}")
        given = cast(nn.Module, flow.velocity).state_dict()
        try:
            self.net.load_state_dict(cast(Any, self.net).with_second_time(given))
        except (AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"velocity must be the network of the run {self.start} with num_times=2, got "
                f"{type(self.net).__name__} with other parameters"
            ) from error
        self.sample_shape = flow.sample_shape

    def guided(self, guidance: Guidance) -> Velocity:
        """Return the mean velocity under guidance.

        Raises:
            TypeError: If guidance is neither a number nor a function.
            ValueError: If guidance is given that is learnt already, or that the training forbids.
        """
        if self.guidance_scale not in (None, 1) and guidance not in (None, 1):
            raise ValueError(
                f"guidance must be null or 1 for a network that has learnt guidance "
                f"{self.guidance_scale}, got {guidance}"
            )
        return super().guided(guidance)

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the ``loss`` of a batch, and the explained shares of energy of both its parts."""
        return mean_flow_loss(
            self.net,
            self.encode(batch, generator),
            path=self.path,
            coupling=self.coupling,
            times=self.times,
            drop_cond=self.drop_cond,
            generator=generator,
            tangent=self.tangent,
            flow_share=self.flow_share,
            power=self.power,
            field=None if self.guidance_scale is None else self._guided_field,
        )

    def _guided_field(self, draw: Draw) -> Tensor:
        """Return the velocities of pairs under the guidance that is learnt.

        Without a condition there is nothing to guide to: the velocity is that of the pair.
        """
        null = cast(DropCond, self.drop_cond).null
        unguided = self.velocity(draw.x_t, draw.t, replace_cond(draw.cond, null))
        guided = combine(draw.u, unguided.to(draw.u), cast(float, self.guidance_scale))
        return torch.where(expand_like(is_null(draw.cond, null), guided), draw.u, guided)
