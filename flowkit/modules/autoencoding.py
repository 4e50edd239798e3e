"""Training of a KL autoencoder, with an optional perceptual term."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.autoencoders import Posterior, pad_to_multiple
from flowkit.checks import at_least_float32, check_at_least
from flowkit.modules.resume import ADAMW, ExactResume, MakeOptimizer, MakeScheduler
from flowkit.types import Batch

Perceptual = Callable[[Tensor, Tensor], Tensor]


class Autoencoding(ExactResume, frozen=("perceptual",)):
    """Train an ``AutoencoderKL``: absolute error, divergence and, if given, a perceptual term.

    Per pixel and channel the loss is ``|x̂ − x| + kl_weight · KL / n + perceptual_weight · P``,
    where ``x̂ = D(z)`` and ``z ~ N(μ(x), σ(x)²)``. ``KL`` is the divergence of the image's
    posterior from ``N(0, I)`` in nats. ``n`` is the number of pixels times channels of an image.

    Source: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022
    (arXiv 2112.10752), appendix G; without its adversarial term.

    Args:
        vae: The network; see `flowkit.nn.autoencoder_kl`.
        kl_weight: At least 0. With a small weight the latents stay informative, and their scale is
            arbitrary.
        perceptual: ``(x̂, x) -> scalar``, both in [-1, 1]. A module is frozen.
        perceptual_weight: Weight of the perceptual term, at least 0.
        optimizer: Makes the optimizer from parameters.
        lr_scheduler: Makes a learning-rate scheduler, which steps after every training step.

    >>> from flowkit.nn.diffusers import autoencoder_kl
    >>> module = Autoencoding(autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2)))
    >>> sorted(module.loss({"x1": torch.zeros(2, 1, 8, 8)}))
    ['kl', 'l1', 'loss']
    """

    def __init__(
        self,
        vae: nn.Module,
        kl_weight: float = 1e-6,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 1.0,
        optimizer: MakeOptimizer = ADAMW,
        lr_scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        check_at_least(kl_weight, 0, "kl_weight")
        check_at_least(perceptual_weight, 0, "perceptual_weight")
        self.vae, self.kl_weight = vae, kl_weight
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight

    def loss(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return ``loss`` and its terms: ``l1``, ``kl`` in nats per image, ``perceptual``."""
        images, vae = batch["x1"], cast(Any, self.vae)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        law = vae.encode(pad_to_multiple(images, factor)).latent_dist
        decoded = vae.decode(Posterior(law.mean, law.std).sample(generator)).sample
        decoded = decoded[..., : images.shape[-2], : images.shape[-1]]
        # Sums are in float32 at least: those of float16 overflow.
        wide = at_least_float32(images.dtype)
        mean, log_var = law.mean.to(wide), law.logvar.to(wide)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).flatten(1).sum(1)
        terms = {"l1": F.l1_loss(decoded.to(wide), images.to(wide)), "kl": kl.mean()}
        loss = terms["l1"] + self.kl_weight * terms["kl"] / images[0].numel()
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(decoded, images)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return {"loss": loss, **terms}


class FeatureError(nn.Module):
    """Perceptual term from the layers of a given convolutional network.

    The term is the mean over layers of ``‖f̂ − f‖²``. At each pixel the features of a layer are
    scaled to length 1 over channels. Source: Zhang et al., *The Unreasonable Effectiveness of Deep
    Features as a Perceptual Metric*, 2018 (arXiv 1801.03924), equation 1, with unit weights.

    Args:
        trunk: Layers applied in turn. The outputs ``(B, C, H, W)`` of its convolutions count.

    Raises:
        ValueError: If the trunk has no convolution.

    >>> trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3))
    >>> x = torch.randn(2, 1, 8, 8)
    >>> bool(FeatureError(trunk)(x, x) == 0), bool(FeatureError(trunk)(-x, x) > 0)
    (True, True)
    """

    def __init__(self, trunk: nn.Sequential) -> None:
        super().__init__()
        if not any(isinstance(layer, nn.Conv2d) for layer in trunk):
            raise ValueError("trunk must have convolutions among its layers, got none")
        self.trunk = trunk

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of two batches of images ``(B, C, H, W)``, a scalar."""
        errors = []
        for layer in self.trunk:
            a, b = layer(a), layer(b)
            if isinstance(layer, nn.Conv2d):
                wide = at_least_float32(a.dtype)
                square = (F.normalize(a.to(wide), dim=1) - F.normalize(b.to(wide), dim=1)).square()
                errors.append(square.sum(1).mean())
        return torch.stack(errors).mean()
