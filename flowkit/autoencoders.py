"""Autoencoders: frozen maps from images to the latents of a flow, and back."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.checks import check_at_least, check_finite
from flowkit.nn.frozen import Frozen
from flowkit.paths import noise_like
from flowkit.provenance import content_hash, located, write_atomically

if TYPE_CHECKING:
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]


@runtime_checkable
class Autoencoder(Protocol):
    """The interface of an autoencoder: two frozen maps, which are not stored with a flow."""

    def encode(self, images: Tensor) -> Tensor:
        """Return latents ``(B, *)`` of images ``(B, C, H, W)`` in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` of latents ``(B, *)``."""
        ...


class Identity(nn.Module):
    """The identity as an autoencoder, for a flow on the data itself.

    >>> import torch
    >>> x = torch.ones(1, 2)
    >>> Identity().decode(Identity().encode(x)) is x
    True
    """

    hash = "identity"

    def encode(self, images: Tensor) -> Tensor:
        """Return ``images``."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Return ``latents``."""
        return latents


class Posterior(NamedTuple):
    """A normal distribution of latents: ``mean`` and ``std``, each ``(B, c, h, w)``.

    >>> Posterior(torch.ones(1, 2), torch.zeros(1, 2)).sample()
    tensor([[1., 1.]])
    """

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents ``mean + std ε`` with standard normal ``ε``."""
        return self.mean + self.std * noise_like(self.mean, generator)


class KLAutoencoder(Frozen, frozen=("vae",)):
    """A frozen ``AutoencoderKL`` of diffusers, between images ``x`` and scaled latents ``z``.

    ``z = (E(x) − mean) / std`` and ``x = D(mean + std z)``, where ``E(x)`` is drawn from the
    posterior. The scale, a mean and a standard deviation per channel, is read from the config of
    the network: ``mean`` is ``latents_mean`` or ``shift_factor``, and ``std`` is ``latents_std``
    divided by ``scaling_factor``. `fit_scale` estimates the scale from images. Source: Rombach et
    al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022 (arXiv 2112.10752),
    appendix G.

    The weights of the network are not parameters of this module. They follow the module from device
    to device, but no optimizer, average of weights, ``train()`` or ``state_dict`` sees the weights.
    Both maps compute outside of autocast regions, so that latents are not rounded.

    Images must have the network's number of channels, and its ``factor`` must divide their sides.
    With ``image_shape``, other images are allowed. Their last row and column are repeated until
    ``factor`` divides the sides, and gray images become color images. `decode` reverses both
    changes.

    Args:
        vae: The network. It is put in ``eval`` mode, without gradients.
        image_shape: ``(C, H, W)`` of all images. None takes the shape from the network's config if
            the config holds both sides (see `flowkit.nn.autoencoder_kl`). Otherwise images of all
            sizes that ``factor`` divides are allowed.

    Raises:
        TypeError: If ``vae`` is not an ``AutoencoderKL``.
        ValueError: If the scale of ``vae`` is not finite and positive, or ``image_shape`` does not
            fit its channels.

    >>> from flowkit.nn.diffusers import autoencoder_kl
    >>> autoencoder = KLAutoencoder(autoencoder_kl((1, 9, 9), width=8, multipliers=(1, 2)))
    >>> autoencoder.factor, autoencoder.encode(torch.zeros(3, 1, 9, 9)).shape
    (2, torch.Size([3, 4, 5, 5]))
    >>> autoencoder.decode(torch.zeros(3, 4, 5, 5)).shape
    torch.Size([3, 1, 9, 9])
    """

    vae: Any
    mean: Tensor
    std: Tensor
    hash: str
    """SHA-256 of weights, architecture, scale and ``image_shape``."""

    def __init__(self, vae: "AutoencoderKL", image_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if not (hasattr(vae, "config") and "latent_channels" in vae.config):
            raise TypeError(f"vae must be an AutoencoderKL of diffusers, got {type(vae).__name__}")
        self.vae = vae
        config = self.vae.config
        if image_shape is None and not isinstance(config.sample_size, int):
            image_shape = (config.in_channels, *config.sample_size)
        self.image_shape = None if image_shape is None else tuple(int(n) for n in image_shape)
        if self.image_shape is not None and (
            len(self.image_shape) != 3 or self.image_shape[0] not in (1, config.in_channels)
        ):
            raise ValueError(
                f"image_shape must be (1 or {config.in_channels}, H, W), got {self.image_shape}"
            )
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._read_config()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, image_shape: Sequence[int] | None = None, **options: Any
    ) -> "KLAutoencoder":
        """Read an autoencoder that `save_pretrained` or diffusers wrote.

        Args:
            path: A folder, or ``hub:owner/name`` for a model of the Hugging Face hub.
            image_shape: See the class.
            **options: Other arguments of diffusers' ``from_pretrained``, e.g. ``subfolder="vae"``.

        Raises:
            ImportError: If diffusers is not installed.
            OSError: If there is no such folder, or it holds no ``AutoencoderKL``.
        """
        from diffusers import AutoencoderKL  # type: ignore[attr-defined]

        place, on_hub = located(path, "path")
        if not on_hub:
            options["local_files_only"] = True
        try:
            vae = AutoencoderKL.from_pretrained(place, **options)
        except OSError as error:
            raise OSError(f"path must hold an AutoencoderKL, got {path}: {error}") from error
        return cls(vae, image_shape)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, config and scale to a folder, in diffusers' format.

        Every file is written atomically, the config last. So a folder with a ``config.json`` holds
        a whole network.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as made:
            self.vae.save_pretrained(made)
            files = sorted(Path(made).iterdir(), key=lambda file: file.name == "config.json")
            for file in files:
                write_atomically(folder / file.name, partial(copyfile, file))

    @property
    def factor(self) -> int:
        """Number of pixels per latent cell along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def config(self) -> dict[str, Any]:
        """Architecture and scale of the network, and ``image_shape``, as plain types."""
        public = {k: v for k, v in self.vae.config.items() if not k.startswith("_")}
        return json.loads(json.dumps({**public, "image_shape": self.image_shape}))

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

    def posterior(self, images: Tensor) -> Posterior:
        """Return the distribution from which `encode` draws; it raises the same errors."""
        raw = self._posterior(images)
        return Posterior((raw.mean - self.mean) / self.std, raw.std / self.std)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw scaled latents ``(B, c, h, w)`` of images ``(B, C, H, W)`` in [-1, 1].

        Raises:
            TypeError: If the images are not floats.
            ValueError: If the shape of the images does not fit.
        """
        return self.posterior(images).sample(generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` of scaled latents ``(B, c, h, w)``.

        Raises:
            ValueError: If the shape of the latents does not fit.
        """
        self._check_latents(latents)
        with _without_autocast(latents.device):
            raw = latents.to(self.mean) * self.std + self.mean
            images = self.vae.decode(raw).sample.to(latents.dtype)
        if self.image_shape is None:
            return images
        channels, height, width = self.image_shape
        images = images[..., :height, :width]
        return images if images.shape[1] == channels else images.mean(1, keepdim=True)

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the shape ``(c, h, w)`` of the latents of images ``(C, H, W)``."""
        height, width = (-(-side // self.factor) for side in image_shape[1:])
        return self.vae.config.latent_channels, height, width

    def pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column of images until ``factor`` divides both sides."""
        return pad_to_multiple(images, self.factor)

    def _posterior(self, images: Tensor) -> Posterior:
        """Return the distribution of the unscaled latents of images ``(B, C, H, W)``."""
        self._check_images(images)
        if images.shape[1] != self.vae.config.in_channels:
            images = images.expand(-1, self.vae.config.in_channels, -1, -1)
        with _without_autocast(images.device):
            law = self.vae.encode(self.pad(images).to(self.mean)).latent_dist
        return Posterior(law.mean.to(images.dtype), law.std.to(images.dtype))

    def _check_images(self, images: Tensor) -> None:
        """Require floats of a shape that the network, or ``image_shape``, allows."""
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in [-1, 1], got {images.dtype}")
        shape, channels, factor = tuple(images.shape), self.vae.config.in_channels, self.factor
        if self.image_shape is not None:
            if shape[1:] != self.image_shape:
                raise ValueError(
                    f"images must have shape (B, {', '.join(map(str, self.image_shape))}), "
                    f"got {shape}"
                )
        elif len(shape) != 4 or shape[1] != channels or shape[2] % factor or shape[3] % factor:
            raise ValueError(
                f"images must have shape (B, {channels}, H, W) with sides divisible by {factor}, "
                f"got {shape}; image_shape={shape[1:]} pads and crops, and turns gray into color"
            )

    def _check_latents(self, latents: Tensor) -> None:
        """Require latents of a shape that the network, or ``image_shape``, allows."""
        channels, shape = self.vae.config.latent_channels, tuple(latents.shape)
        if self.image_shape is None:
            fits, rule = len(shape) == 4 and shape[1] == channels, f"{channels}, h, w"
        else:
            expected = self.latent_shape(self.image_shape)
            fits, rule = shape[1:] == expected, ", ".join(map(str, expected))
        if not fits:
            raise ValueError(f"latents must have shape (B, {rule}), got {shape}")

    def _read_config(self) -> None:
        """Set ``mean``, ``std`` and ``hash`` from the network and its config."""
        config = self.vae.config
        channels = config.latent_channels
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
        std = [s / config.scaling_factor for s in config.get("latents_std") or [1.0] * channels]
        if not (len(mean) == len(std) == channels):
            raise ValueError(
                f"latents_mean and latents_std of vae must hold {channels} numbers, "
                f"got {len(mean)} and {len(std)}"
            )
        if not all(0 < s < math.inf for s in std):
            raise ValueError(f"the std of latents must be positive and finite, got {std}")
        like = next(self.vae.parameters())
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(values).to(like)[None, :, None, None]
            check_finite(tensor, f"the {name} of latents")
            setattr(self, name, tensor)
        # A later change of type or device does not make another autoencoder.
        self.hash = content_hash(self.vae.state_dict(), _text(self.config))


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast. Where there is none, exported graphs get no region."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def pad_to_multiple(images: Tensor, factor: int) -> Tensor:
    """Repeat the last row and column of ``(B, C, H, W)`` until ``factor`` divides both sides."""
    extra = [-side % factor for side in images.shape[-2:]]
    return F.pad(images, (0, extra[1], 0, extra[0]), "replicate") if any(extra) else images


def mean_latents(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Encode images without drawing noise: to the mean of the posterior, if there is a posterior.

    Args:
        autoencoder: One with ``posterior(images)``, or one whose ``encode`` draws no noise.
        images: Images ``(B, C, H, W)`` in [-1, 1]. The result has the shape ``(B, *)``.

    >>> mean_latents(Identity(), torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    posterior = getattr(autoencoder, "posterior", None)
    return autoencoder.encode(images) if posterior is None else posterior(images).mean


def identity(autoencoder: Autoencoder) -> dict[str, Any]:
    """Return the record of an autoencoder in checkpoints and caches: its ``hash`` and ``config``.

    If a network has no attribute ``hash``, the hash is that of its weights. Other missing values
    are None.

    >>> identity(Identity())
    {'hash': 'identity', 'config': None}
    """
    found = {name: getattr(autoencoder, name, None) for name in ("hash", "config")}
    if found["hash"] is None and isinstance(autoencoder, nn.Module):
        found["hash"] = content_hash(autoencoder.state_dict(), _text({}))
    return found


def _text(config: Mapping[str, Any]) -> str:
    """Write a config as text with sorted keys."""
    return json.dumps(config, sort_keys=True)


def check_identity(stored: Mapping[str, Any], autoencoder: Autoencoder, made: str) -> None:
    """Require an autoencoder with the same hash as a record.

    Args:
        stored: The record, a result of `identity`; its hash may be None.
        autoencoder: The autoencoder to compare with the record.
        made: Name, for the error, of the object made with the recorded autoencoder.

    Raises:
        ValueError: If the hashes differ. The error says how the configs differ.
    """
    ours = identity(autoencoder)
    if stored["hash"] == ours["hash"]:
        return
    a, b = (record.get("config") or {} for record in (stored, ours))
    differ = [f"{k} {a.get(k)} and {b.get(k)}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]
    known = a and b and differ
    fix = f"they differ in {', '.join(differ)}" if known else "give the folder of the recorded one"
    raise ValueError(
        f"autoencoder must be the one that {made} was made with, hash {stored['hash']}, got "
        f"{ours['hash']}; {fix}"
    )
