"""Training of latent actions from episodes without actions."""

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.modules.checkpoints import load_module
from flowkit.modules.resume import ADAMW, ExactResume, MakeOptimizer, MakeScheduler
from flowkit.policies import LatentActionModel
from flowkit.types import Batch


class LatentActions(ExactResume):
    """Train a `flowkit.policies.LatentActionModel` on pairs of observations, without actions.

        loss = ‖o′ − o − forward(o, q)‖² + ‖sg(z) − q‖² + β ‖z − sg(q)‖² − log p(codes | o)

    ``z`` are the latent vectors, ``q`` those of their codes, and ``sg`` stops gradients, also those
    of the prior's codes. Observations are normalized. A code that no sample of a batch used moves
    to a latent vector of the batch, so that none is lost.

    Give the trained ``model`` to `flowkit.policies.PolicyVelocity`: in training the decoder sees
    the codes between the observations, in a rollout codes that the prior draws. `load_latents`
    reads it from a run.

    Args:
        model: The model.
        commitment: Weight β, at least 0.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.

    Raises:
        TypeError: If the model is of another class.
        ValueError: If ``commitment`` is negative.

    Source: stage 1 of Routray et al., *ViPRA: Video Prediction for Robot Actions*, 2025 (arXiv
    2511.07732), and the prior of its stage 2, for observations in place of videos.

    >>> model = LatentActionModel(obs_size=4)
    >>> now = torch.randn(32, 4)
    >>> module = LatentActions(model)
    >>> module.learn(now)
    >>> sorted(module.loss({"x1": torch.randn(32, 4), "cond": {"vector": now}}))
    ['explained', 'loss', 'prior', 'used']
    """

    def __init__(
        self,
        model: LatentActionModel,
        commitment: float = 0.25,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        check_at_least(commitment, 0, "commitment")
        if not isinstance(model, LatentActionModel):
            raise TypeError(
                "model must be a LatentActionModel (model=latent_actions) for latent actions, got "
                f"{type(model).__name__}"
            )
        self.model, self.commitment = model, commitment

    def learn(self, observations: Tensor) -> None:
        """Take the statistics of observations ``(N, O)``."""
        fitted = type(self.model.observations).fit(observations)
        self.model.observations.take(*fitted.buffers())

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the ``loss`` and what it consists of.

        Args:
            batch: The later observation as ``x1 (B, O)``, the earlier as ``cond["vector"]``, see
                ``predict="future"`` of `flowkit.data.Demonstrations`.
            generator: Chooses the vectors that unused codes move to.

        Returns:
            ``loss``; ``explained``, the share of the energy of changes that the codes explain;
            ``prior``, the loss of the prior in nats a code; ``used``, the share of used codes.
        """
        normal = self.model.observations.normalize
        now = normal(cast(Any, batch.get("cond"))["vector"])
        later = normal(batch["x1"])
        found = self.model.quantize(now, later)
        change = later - now
        error = (self.model.predict(now, found.quantized) - change).square().mean()
        vectors = self.model.embed(found.codes)
        book = (vectors - found.latents.detach()).square().mean()
        near = (found.latents - vectors.detach()).square().mean()
        logits = self.model.logits(now, found.codes).flatten(0, 1)
        prior = F.cross_entropy(logits, found.codes.flatten())
        counts = torch.bincount(found.codes.flatten(), minlength=self.model.num_codes)
        if self.training and torch.is_grad_enabled():
            self._revive(counts, found.latents.detach().flatten(0, 1), generator)
        return {
            "loss": error + book + self.commitment * near + prior,
            "explained": 1 - (error / change.square().mean()).detach(),
            "prior": prior.detach(),
            "used": (counts > 0).float().mean(),
        }

    @torch.no_grad()
    def _revive(self, counts: Tensor, latents: Tensor, generator: torch.Generator | None) -> None:
        """Move codes without a sample to latent vectors of the batch."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        unused = counts == 0
        rows = torch.randint(len(latents), (len(counts),), generator=generator)
        moved = latents[rows.to(latents.device)]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(moved, 0)  # all processes keep the same book
        self.model.book.copy_(torch.where(unused[:, None], moved, self.model.book))


def load_latents(folder: str | Path) -> LatentActionModel:
    """Load the model of a run of `LatentActions`.

    Raises:
        FileNotFoundError: If the folder is not a run, or has no weights yet.
        ValueError: If the run trains something else, or as `load_run`.
        RuntimeError: If the weights are damaged or belong to another model.
    """
    module, _ = load_module(folder)
    if not isinstance(module, LatentActions):
        raise ValueError(
            "latents must be a run of latent actions (module=latent_actions), got one of "
            f"{type(module).__name__} in {folder}"
        )
    return module.model
