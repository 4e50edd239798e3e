"""Flow matching on the latents of an autoencoder."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flowkit import inpainting
from flowkit.autoencoders import Autoencoder, mean_latents
from flowkit.checks import check_at_least, check_choice
from flowkit.couplings import Coupling, Independent
from flowkit.guidance import DropCond
from flowkit.losses import flow_matching_loss
from flowkit.modules.flow import FlowModule, Guidance
from flowkit.modules.resume import ADAMW, MakeOptimizer, MakeScheduler
from flowkit.paths import Linear, Path
from flowkit.sampling import Sampler, Solution
from flowkit.sampling.ode import Callback
from flowkit.times import Times, Uniform
from flowkit.types import Batch, Cond, to_device
from flowkit.velocity import Velocity


class LatentFlowMatching(FlowModule):
    """Flow matching on latents ``z = (E(x) − mean) / std`` of an autoencoder.

    ``E(x)`` is a draw from the posterior of the autoencoder. Batches hold images, or latents from a
    cache (``data=latents``) with the hash of their autoencoder as ``encoded_by``. With ``masks``
    the flow learns to inpaint: each image gets a random hole. The velocity is then a
    `flowkit.nn.Inpainting`, and its condition is the mask with the image around the hole.

    The distance of generated images from data has the bound
    ``W2² ≤ Δ² + L² e^{1+2L̂} ∫ E‖v − v̂‖² dt``, with the reconstruction error ``Δ`` of the
    autoencoder and the Lipschitz constants ``L`` of the decoder and ``L̂`` of the velocity. The flow
    changes the second term only. So measure ``Δ`` separately, by ``flowkit autoencoder``.

    At the start of a fit the module prints mean and std of the latents. For the default path and
    coupling it also prints the losses of `expected_losses`.

    Source: Dao, Phung, Nguyen, Tran, *Flow Matching in Latent Space*, 2023 (arXiv 2307.08698).
    Their time has the opposite direction. Their ``σ_min = 1e-5`` is ``path=Linear(1e-5)``.

    Args:
        velocity: The network.
        autoencoder: The autoencoder, which is not trained. A checkpoint holds its hash and config,
            and refuses another autoencoder.
        path: The path between noise and latents.
        coupling: The pairs of noise and latents.
        times: The distribution of training times.
        masks: Draws the holes of inpainting; None for a flow without inpainting.
        mask_resize: How a mask becomes one of latent cells, ``"max"`` or ``"nearest"``, see
            `flowkit.inpainting.inpainting_cond`. A checkpoint keeps the way of its training.
        drop_cond: Drops conditions in training, for classifier-free guidance. With masks, the
            labels have the name ``label``.
        optimizer: Creates the optimizer from parameters.
        lr_scheduler: Creates a learning-rate scheduler, called after every training step.
        encode_cond: Names of conditions that are data like ``x1``, such as the ``frames`` of a
            mixture of sounds. The network gets the means of their latents.

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
        mask_resize: str = "max",
        drop_cond: DropCond | None = None,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
        encode_cond: Sequence[str] = (),
    ) -> None:
        super().__init__(velocity, autoencoder, drop_cond, optimizer, lr_scheduler)
        check_choice(mask_resize, inpainting.RESIZES, "mask_resize")
        self.path, self.coupling, self.times, self.masks = path, coupling, times, masks
        self.mask_resize, self.encode_cond = mask_resize, tuple(encode_cond)
        self._told = False

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Compute the flow-matching loss of a batch.

        Args:
            batch: Images ``x1 (B, C, H, W)`` in [-1, 1] or cached latents, with conditions.
            generator: Draws latents, holes, noise and times; None means the global generator.

        Returns:
            ``loss`` and ``explained``, the share of the energy of the target that the velocity
            explains.

        Raises:
            ValueError: If latents have another autoencoder, or a flow with masks gets latents.
        """
        latents = self.encode(batch, generator)
        if self.masks is not None:
            latents["cond"] = self._hide(batch, generator)
        elif self.encode_cond:
            latents["cond"] = self._encoded(batch.get("cond"))
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
        """Carry given source samples along the flow; conditions are given as data are."""
        if self.encode_cond:
            cond = self._encoded(to_device(cond, self.device))
        options: Any = {"return_path": return_path, "callback": callback}
        return super().solve(x0, sampler, cond, guidance, **options)

    @torch.no_grad()
    def _encoded(self, cond: Cond) -> Cond:
        """Return a condition with the latents of those of its parts that are data."""
        if not isinstance(cond, Mapping) or not set(self.encode_cond) <= set(cond):
            raise TypeError(f"cond must be a mapping with {', '.join(self.encode_cond)}")
        found = {name: mean_latents(self.autoencoder, cond[name]) for name in self.encode_cond}
        return {**cond, **found}

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        num_samples: int = 1,
        sampler: Sampler | None = None,
        labels: Tensor | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        guidance: Guidance = None,
        *,
        paste_back: bool = True,
    ) -> Tensor:
        """Inpaint images: draw ``num_samples`` contents for the hole of each image.

        Args:
            images: Images ``(B, C, H, W)`` in [-1, 1].
            mask: Masks ``(B, 1, H, W)``: 1 in the hole, 0 elsewhere.
            num_samples: Samples of each image, at least 1.
            sampler: The solver and its grid, see `sample`.
            labels: Classes ``(B,)`` of the images, for a network with classes. None means unknown
                classes, for a network whose training drops labels.
            seeds: Seeds ``(B · num_samples,)`` of the samples, image by image.
            guidance: Scale of classifier-free guidance to the labels.
            paste_back: If True, the pixels outside of the hole are those of the images. If False,
                they come from the decoder.

        Returns:
            Images ``(B, num_samples, C, H, W)``.

        Raises:
            ValueError: If the mask has a wrong shape, the number of seeds or labels is wrong, or
                ``guidance`` is given without labels.
        """
        check_at_least(num_samples, 1, "num_samples")
        if labels is None and guidance not in (None, 1):
            raise ValueError(
                f"labels must be given with guidance, got labels None and guidance {guidance}"
            )
        images, mask = images.to(self.device), mask.to(self.device)
        cond = self._cond(images, mask)
        null = None if self.drop_cond is None else self.drop_cond.null
        if labels is not None:
            cond["label"] = labels
        elif isinstance(null, Mapping) and "label" in null:
            cond["label"] = torch.full((len(images),), int(null["label"]))
        cond = {name: value.repeat_interleave(num_samples, 0) for name, value in cond.items()}
        drawn = self.sample(len(images) * num_samples, sampler, cond, seeds, guidance)
        if paste_back:
            images, mask = (x.repeat_interleave(num_samples, 0) for x in (images, mask))
            drawn = inpainting.paste_back(drawn, images, mask)
        return drawn.unflatten(0, (-1, num_samples))

    def _cond(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the condition of inpainting for images with holes."""
        return inpainting.inpainting_cond(self.autoencoder, images, mask, self.mask_resize)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store also the way to resize masks, which the network has learnt."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["flowkit"]["mask_resize"] = self.mask_resize

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the way to resize masks; earlier versions took the nearest pixel."""
        super().on_load_checkpoint(checkpoint)
        self.mask_resize = checkpoint["flowkit"].get("mask_resize", "nearest")

    def _hide(self, batch: Batch, generator: torch.Generator | None) -> Cond:
        """Draw holes for a batch of images, and return the condition of inpainting."""
        images = batch["x1"]
        if "encoded_by" in batch:
            raise ValueError(
                "x1 must hold images for random masks, got cached latents; train with the data of "
                "the images"
            )
        size = (images.shape[-2], images.shape[-1])
        mask = cast(inpainting.RandomMasks, self.masks)(len(images), size, generator, images.device)
        cond = self._cond(images, mask)
        labels = batch.get("cond")
        return cond if labels is None else {**cond, "label": cast(Tensor, labels)}

    def _tell(self, latents: Tensor) -> None:
        """Print and log mean and std of the latents and the expected losses, once per fit."""
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
    """Compute reference values for the flow-matching loss on latents ``z (B, c, *)``.

    The values hold for independent standard normal noise and the path `flowkit.paths.Linear`:

    - ``zero = 1 + E[z²]`` is the loss of a network with the output 0: the energy of the target.
    - ``gaussian = π/2 · mean_c(s_c)``, with the std ``s_c`` of channel ``c``, is the smallest loss
      of a network that knows only mean and std of each channel. For independent normal latents no
      network has a smaller loss.
    - ``explained = 1 − gaussian / zero`` is the share of the energy that this network explains.

    Args:
        latents: Latents ``(B, c, *)``.

    Returns:
        ``mean`` and ``std`` of all latents, ``zero``, ``gaussian`` and ``explained``.

    >>> losses = expected_losses(torch.randn(4000, 4, 4, 4))
    >>> [round(losses[name], 1) for name in ("std", "zero", "gaussian", "explained")]
    [1.0, 2.0, 1.6, 0.2]
    """
    z = latents.detach().cpu().double()  # some devices have no float64
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
    """Describe latents and the losses of `expected_losses` in one line.

    Args:
        latents: Latents ``(B, c, *)``.
        expected: ``mean`` and ``std``, and for all losses also ``zero``, ``gaussian`` and
            ``explained``.

    >>> describe_latents(torch.zeros(1, 4, 8, 8), {"mean": 0.0, "std": 1.0})
    'latents   (4, 8, 8) have mean 0.00 and std 1.00'
    """
    text = (
        f"latents   {tuple(latents.shape[1:])} have mean {expected['mean']:z.2f} and std "
        f"{expected['std']:.2f}"
    )
    if "zero" in expected:
        text += (
            f": the loss of a zero network is {expected['zero']:.2f}, that of a network that knows "
            f"only mean and std is {expected['gaussian']:.2f} "
            f"(explained {expected['explained']:.2f}); a good run gets a smaller loss"
        )
    if not 0.5 <= expected["std"] <= 2:
        text += "; the std is far from 1: set the scale of the autoencoder by fit_scale"
    return text
