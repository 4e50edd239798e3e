"""Autoencoders that hold a network of diffusers, one class for each of its classes."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flowkit.autoencoders.frozen import FrozenAutoencoder
from flowkit.autoencoders.interface import Posterior
from flowkit.checks import check_at_least


class KLAutoencoder(FrozenAutoencoder):
    """A frozen ``AutoencoderKL`` of diffusers, see `FrozenAutoencoder`.

    ``E(x)`` is drawn from the posterior. `fit_scale` estimates the scale from images. Source:
    Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022 (arXiv
    2112.10752), appendix G.

    >>> from flowkit.nn.diffusers import autoencoder_kl
    >>> autoencoder = KLAutoencoder(autoencoder_kl((1, 9, 9), width=8, multipliers=(1, 2)))
    >>> autoencoder.factor, autoencoder.encode(torch.zeros(3, 1, 9, 9)).shape
    (2, torch.Size([3, 4, 5, 5]))
    >>> autoencoder.decode(torch.zeros(3, 4, 5, 5)).shape
    torch.Size([3, 1, 9, 9])
    """

    kind = "AutoencoderKL"

    @torch.no_grad()
    def fit_scale(self, images: Tensor | Iterable[Tensor], batch_size: int = 64) -> "KLAutoencoder":
        """Set ``mean`` and ``std`` so that every channel of the images' latents is standard.

        The moments are those of the posteriors, ``Var z = Var E[z|x] + E Var[z|x]``; no latent is
        drawn. They replace the scale in the network's config, which `save_pretrained` writes.

        Args:
            images: Images ``(N, C, H, W)`` in [-1, 1], or batches of images.
            batch_size: Number of images that are encoded at once.

        Returns:
            The autoencoder itself.

        Raises:
            ValueError: If there are fewer than 2 latents, or a variance is not positive and finite.
        """
        count, total, square = 0, 0.0, 0.0
        for batch in [images] if isinstance(images, Tensor) else images:
            for part in batch.split(batch_size):
                # The sums are on the CPU, since some devices have no float64.
                raw, mean = self._posterior(part.to(self.mean.device)), self.mean.cpu().double()
                centered = raw.mean.cpu().double() - mean  # centered, against cancellation
                count += centered.numel() // centered.shape[1]
                total = total + centered.sum((0, 2, 3))
                square = square + (centered.square() + raw.std.cpu().double().square()).sum(
                    (0, 2, 3)
                )
        check_at_least(count, 2, "the number of latents in images")
        offset = torch.as_tensor(total) / count
        std = (torch.as_tensor(square) / count - offset.square()).clamp(min=0).sqrt()
        self.vae.register_to_config(
            latents_mean=(self.mean.cpu().double().flatten() + offset).tolist(),
            latents_std=std.tolist(),
            scaling_factor=1.0,
            shift_factor=None,
        )
        self._read_config()
        return self

    def _encoded(self, images: Tensor) -> Posterior:
        """Return the posterior of unscaled latents."""
        law = self.vae.encode(images).latent_dist
        return Posterior(law.mean, law.std)


class TinyAutoencoder(FrozenAutoencoder):
    """A frozen ``AutoencoderTiny`` of diffusers (TAESD), see `FrozenAutoencoder`.

    It is distilled from a KL autoencoder, and draws nothing: an image has one latent. Source: the
    network of diffusers, after Bohan, *Tiny AutoEncoder for Stable Diffusion*, 2023.
    """

    kind = "AutoencoderTiny"

    @property
    def factor(self) -> int:
        """Number of pixels per latent cell along each side."""
        return 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)


class DCAutoencoder(TinyAutoencoder):
    """A frozen ``AutoencoderDC`` of diffusers, with up to 64×64 pixels per latent cell.

    It draws nothing: an image has one latent. See `FrozenAutoencoder`. Source: Chen et al., *Deep
    Compression Autoencoder for Efficient High-Resolution Diffusion Models*, 2024 (arXiv
    2410.10733).
    """

    kind = "AutoencoderDC"


class RAEAutoencoder(FrozenAutoencoder):
    """A frozen ``AutoencoderRAE`` of diffusers: features of a pretrained encoder as latents.

    It draws nothing: an image has one latent. Images have the size of the decoder, which is fixed.
    The network scales its latents itself, by the moments it was trained with, so ``mean`` is 0 and
    ``std`` is 1 here. It takes images in [0, 1]; this class takes them in [-1, 1] as all others do.
    See `FrozenAutoencoder`. Source: Zheng et al., *Diffusion Transformers with Representation
    Autoencoders*, 2025 (arXiv 2510.11690).
    """

    kind = "AutoencoderRAE"

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return self.vae.config.num_channels

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents."""
        return self.vae.config.encoder_hidden_size

    @property
    def factor(self) -> int:
        """Number of pixels per latent cell along each side."""
        return self.vae.config.patch_size

    def _encoded(self, images: Tensor) -> Posterior:
        """Return the latents of images in [-1, 1], and zeros."""
        return super()._encoded((images + 1) / 2)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Return images in [-1, 1]."""
        return 2 * super()._decoded(latents) - 1

    def _own_shape(self) -> Sequence[int]:
        """Return the only shape of images."""
        return self.channels, *[self.vae.decoder_image_size] * 2

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Require images of the decoder's size, and latents with rows and columns."""
        channels, *sides = self._own_shape()
        if list(shape[1:]) != sides or shape[0] not in (1, channels):
            raise ValueError(
                f"image_shape must be (1 or {channels}, {sides[0]}, {sides[1]}) for this "
                f"{self.kind}, got {shape}"
            )
        if not self.vae.config.reshape_to_2d:
            raise ValueError("reshape_to_2d of vae must be true, got false")

    def _scale(self) -> tuple[list[float], list[float]]:
        """Return the scale of latents that are scaled already."""
        return [0.0] * self.latent_channels, [1.0] * self.latent_channels
