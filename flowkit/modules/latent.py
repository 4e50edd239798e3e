"""Flow matching on the latents of an autoencoder."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from flowkit import inpainting
from flowkit.autoencoders import Autoencoder
from flowkit.checks import check_at_least
from flowkit.couplings import Coupling, Independent
from flowkit.guidance import DropCond
from flowkit.losses import flow_matching_loss
from flowkit.modules.flow import FlowModule, Guidance
from flowkit.modules.resume import ADAMW, MakeOptimizer, MakeScheduler
from flowkit.paths import Linear, Path
from flowkit.sampling import ODESampler
from flowkit.times import Times, Uniform
from flowkit.types import Batch, Cond
from flowkit.velocity import Velocity


class LatentFlowMatching(FlowModule):
    """Flow matching on ``z = (E(x) − mean) / std``, drawn from the autoencoder's posterior.

    Batches hold images, or latents from a cache (``data=latents``), which say by the key
    ``encoded_by`` whose they are. With ``masks`` the flow learns to inpaint: every image gets a
    random hole, and the velocity, a `flowkit.nn.Inpainting`, is told what lies around it.

    The distance of generated images from data is bounded by two terms, of which the flow only
    governs the second: ``W2² ≤ Δ² + L² e^{1+2L̂} ∫ E‖v − v̂‖² dt``, with the autoencoder's
    reconstruction gap ``Δ`` and the Lipschitz constants ``L`` of the decoder and ``L̂`` of the
    velocity. So measure the gap (``flowkit autoencoder`` does) apart from the flow.

    At the start of a fit the log says how latents lie and, for the default path and coupling, what
    losses to expect, see `expected_losses`.

    Source: Dao, Phung, Nguyen, Tran, *Flow Matching in Latent Space*, 2023 (arXiv 2307.08698),
    whose time runs the other way; its ``σ_min = 1e-5`` is ``path=Linear(1e-5)``.

    Args:
        velocity: The network.
        autoencoder: Frozen; checkpoints hold its hash and config, and refuse another.
        path: Where pairs are at time ``t``.
        coupling: Which noise goes with which latents.
        times: Distribution of training times.
        masks: Draws the holes of inpainting.
        drop_cond: Conditions dropped in training, for classifier-free guidance; labels beside
            masks are named ``label``.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a scheduler, stepped every training step.

    >>> from flowkit.autoencoders import Identity
    >>> from flowkit.exact import GaussianFlow
    >>> module = LatentFlowMatching(GaussianFlow(2.0, 0.5), Identity())
    >>> module.loss({"x1": 2 + 0.5 * torch.randn(8, 4, 2, 2)}).keys()
    dict_keys(['loss', 'explained'])
    """

    def __init__(
        self,
        velocity: Velocity,
        autoencoder: Autoencoder,
        path: Path = Linear(),
        coupling: Coupling = Independent(),
        times: Times = Uniform(),
        masks: inpainting.RandomMasks | None = None,
        drop_cond: DropCond | None = None,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ):
        super().__init__(velocity, autoencoder, drop_cond, optimizer, lr_scheduler)
        self.path, self.coupling, self.times, self.masks = path, coupling, times, masks
        self._told = False

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return the flow-matching loss of a batch and the share of energy explained."""
        latents = self.encode(batch, generator)
        if self.masks is not None:
            latents["cond"] = self._hide(batch, generator)
        if self.training and not self._told:
            self._tell(latents["x1"])
        return flow_matching_loss(
            self.velocity,
            latents,
            path=self.path,
            coupling=self.coupling,
            times=self.times,
            drop_cond=self.drop_cond,
            generator=generator,
        )

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        num_samples: int = 1,
        sampler: ODESampler | None = None,
        labels: Tensor | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        guidance: Guidance = None,
        *,
        paste_back: bool = True,
    ) -> Tensor:
        """Fill holes, each several times.

        Args:
            images: ``(B, C, H, W)`` in [-1, 1].
            mask: ``(B, 1, H, W)``, 1 in the hole, 0 elsewhere.
            num_samples: Fillings of each hole.
            sampler: As for `sample`.
            labels: Classes ``(B,)`` of the images, for a network with classes; None leaves them
                open where labels were dropped in training.
            seeds: One for each filling, ``B · num_samples`` of them, image by image.
            guidance: Scale of classifier-free guidance towards the labels.
            paste_back: Take the known pixels from the images, exactly, not from the decoder.

        Returns:
            ``(B, num_samples, C, H, W)``.

        Raises:
            ValueError: If the mask does not fit, or numbers of seeds and labels do not, or guidance
                has no labels to lead to.
        """
        check_at_least(num_samples, 1, "num_samples")
        if labels is None and guidance not in (None, 1):
            raise ValueError(
                f"labels must be given for guidance towards them, got none and guidance {guidance}"
            )
        images, mask = images.to(self.device), mask.to(self.device)
        cond = inpainting.inpainting_cond(self.autoencoder, images, mask)
        null = None if self.drop_cond is None else self.drop_cond.null
        if labels is not None:
            cond["label"] = labels
        elif isinstance(null, dict) and "label" in null:
            cond["label"] = torch.full((len(images),), int(null["label"]))
        cond = {name: value.repeat_interleave(num_samples, 0) for name, value in cond.items()}
        drawn = self.sample(len(images) * num_samples, sampler, cond, seeds, guidance)
        if paste_back:
            images, mask = (x.repeat_interleave(num_samples, 0) for x in (images, mask))
            drawn = inpainting.paste_back(drawn, images, mask)
        return drawn.unflatten(0, (-1, num_samples))

    def _hide(self, batch: Batch, generator: torch.Generator | None) -> Cond:
        """The condition of a batch of images with random holes."""
        images = batch["x1"]
        if "encoded_by" in batch:
            raise ValueError(
                "x1 must hold images to be masked, got cached latents; train with the images' "
                "own data"
            )
        size = (images.shape[-2], images.shape[-1])
        mask = cast(inpainting.RandomMasks, self.masks)(len(images), size, generator, images.device)
        cond = inpainting.inpainting_cond(self.autoencoder, images, mask)
        labels = batch.get("cond")
        return cond if labels is None else {**cond, "label": cast(Tensor, labels)}

    def _tell(self, latents: Tensor) -> None:
        """Log what losses to expect, once a fit."""
        if self._trainer is None:
            return
        self._told = True
        expected = expected_losses(latents)
        if self.path != Linear() or not isinstance(self.coupling, Independent):
            expected = {name: expected[name] for name in ("mean", "std")}
        self.print(describe_latents(latents, expected))
        for logger in self.loggers:
            logger.log_metrics({f"latents/{k}": v for k, v in expected.items()}, step=0)


def expected_losses(latents: Tensor) -> dict[str, float]:
    """What a flow-matching loss on latents ``(B, c, *)`` means.

    It is that of independent standard normal noise on straight paths; see `flowkit.paths.Linear`.

    A zero network's loss is the target's energy, ``zero = 1 + E[z²]``. One that knows mean and
    std ``s`` of each channel and nothing else reaches ``gaussian = π/2 · mean s``, which is the
    least possible for independent normal latents, and so explains ``explained`` of the energy.

    Returns:
        ``mean``, ``std``, ``zero``, ``gaussian``, ``explained``.

    >>> losses = expected_losses(torch.randn(4000, 4, 4, 4))
    >>> [round(losses[name], 1) for name in ("std", "zero", "gaussian", "explained")]
    [1.0, 2.0, 1.6, 0.2]
    """
    z = latents.detach().double()
    channels = z.transpose(0, 1).flatten(1) if z.ndim > 1 else z[None]
    zero = 1 + z.square().mean().item()
    gaussian = math.pi / 2 * channels.std(1, correction=0).mean().item()
    return {
        "mean": z.mean().item(),
        "std": z.std(correction=0).item(),
        "zero": zero,
        "gaussian": gaussian,
        "explained": 1 - gaussian / zero,
    }


def describe_latents(latents: Tensor, expected: dict[str, float]) -> str:
    """Put `expected_losses` into words."""
    text = (
        f"latents   {tuple(latents.shape[1:])} have mean {expected['mean']:z.2f} and std "
        f"{expected['std']:.2f}"
    )
    if "zero" in expected:
        text += (
            f": a zero network's loss is {expected['zero']:.2f}, one that knows only their mean "
            f"and std ends at {expected['gaussian']:.2f} (explained {expected['explained']:.2f}); "
            "a healthy run falls below that"
        )
    if not 0.5 <= expected["std"] <= 2:
        text += "; the std is far from 1: set the autoencoder's scale by fit_scale"
    return text
