"""The common part of autoencoders that hold a network of diffusers."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from flowkit.autoencoders.interface import (
    Posterior,
    as_text,
    pad_to_multiple,
    without_autocast,
)
from flowkit.checks import check_finite
from flowkit.extras import install
from flowkit.hub import folder_of
from flowkit.nn.frozen import Frozen
from flowkit.provenance import content_hash, located, write_atomically


class FrozenAutoencoder(Frozen, frozen=("vae",)):
    """A frozen network of diffusers, between images ``x`` and scaled latents ``z``.

    ``z = (E(x) − mean) / std`` and ``x = D(mean + std z)``. The scale, a mean and a standard
    deviation per channel, is read from the config of the network: ``mean`` is ``latents_mean`` or
    ``shift_factor``, and ``std`` is ``latents_std`` divided by ``scaling_factor``.

    The weights of the network are not parameters of this module. They follow the module from device
    to device, but no optimizer, average of weights, ``train()`` or ``state_dict`` sees the weights.
    Both maps compute outside of autocast regions, so that latents are not rounded.

    Images must have the network's number of channels, and its ``factor`` must divide their sides.
    With ``image_shape``, other images are allowed. Their last row and column are repeated until
    ``factor`` divides the sides, and gray images become color images. `decode` reverses both
    changes.

    A subclass says which network it holds, and how it encodes.

    Args:
        vae: The network. It is put in ``eval`` mode, without gradients.
        image_shape: ``(C, H, W)`` of all images. None takes the shape from the network's config if
            the config holds both sides (see `flowkit.nn.autoencoder_kl`). Otherwise images of all
            sizes that ``factor`` divides are allowed.

    Raises:
        TypeError: If ``vae`` is another network.
        ValueError: If the scale of ``vae`` is not finite and positive, or ``image_shape`` does not
            fit its channels.
    """

    kind: ClassVar[str]
    """Class of the network in diffusers."""
    vae: Any
    mean: Tensor
    std: Tensor
    hash: str
    """SHA-256 of weights, architecture, scale and ``image_shape``."""

    def __init__(self, vae: Any, image_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        if self.kind not in [one.__name__ for one in type(vae).__mro__]:
            article = "an" if self.kind[0] == "A" else "a"
            raise TypeError(
                f"vae must be {article} {self.kind} of diffusers, got {type(vae).__name__}"
            )
        self.vae = vae
        if image_shape is None:
            image_shape = self._own_shape()
        self.image_shape = None if image_shape is None else tuple(int(n) for n in image_shape)
        if self.image_shape is not None:
            self._check_shape(self.image_shape)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._read_config()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, image_shape: Sequence[int] | None = None, **options: Any
    ) -> Self:
        """Read an autoencoder that `save_pretrained` or diffusers wrote.

        Args:
            path: A folder, ``hub:owner/name`` for a model of the Hugging Face hub, or
                ``flowkit:name``. Of a shared flow on latents it is the flow's autoencoder.
            image_shape: See the class.
            **options: Other arguments of diffusers' ``from_pretrained``, e.g. ``subfolder="vae"``.

        Raises:
            ImportError: If diffusers does not have the network, or needs another package for it.
            OSError: If there is no such folder, or it holds no network.
            ValueError: If it holds a network of another class.
        """
        import diffusers

        path = folder_of(path) if str(path).startswith("flowkit:") else path
        place, on_hub = located(path, "path")
        if not on_hub:
            inner = Path(place) / "autoencoder"
            place = str(inner) if (inner / "config.json").is_file() else place
            options["local_files_only"] = True
        try:
            network = getattr(diffusers, cls.kind)
        except (AttributeError, RuntimeError) as error:
            raise ImportError(
                f"diffusers must have {cls.kind}, got {diffusers.__version__}: {error}; "
                f"{install('dinov2')}"
            ) from error
        try:
            config = network.load_config(place, **options)
        except OSError as error:
            raise OSError(f"path must hold an {cls.kind}, got {path}: {error}") from error
        stored = config.get("_class_name", cls.kind)
        if stored != cls.kind or "quantization_config" in config:
            kind = f"an {stored}" if stored != cls.kind else "a quantized one"
            raise ValueError(f"path must hold an {cls.kind}, got {kind} in {path}")
        try:
            return cls(network.from_pretrained(place, **options), image_shape)
        except OSError as error:
            raise OSError(f"path must hold an {cls.kind}, got {path}: {error}") from error
        except Exception as error:  # a stranger's config can hold anything
            words = " ".join(str(error).split())[:300]
            raise ValueError(f"path must hold a whole {cls.kind}, got {path}: {words}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, config and scale to a folder, in diffusers' format.

        Every file is written atomically, the config last. So a folder with a ``config.json`` holds
        a whole network.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as made:
            self.vae.save_pretrained(made)
            forget_place(Path(made) / "config.json")
            files = sorted(Path(made).iterdir(), key=lambda file: file.name == "config.json")
            for file in files:
                write_atomically(folder / file.name, partial(copyfile, file))

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return self.vae.config.in_channels

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents."""
        return self.vae.config.latent_channels

    @property
    def factor(self) -> int:
        """Number of pixels per latent cell along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def config(self) -> dict[str, Any]:
        """Architecture and scale of the network, and ``image_shape``, as plain types."""
        public = {k: v for k, v in self.vae.config.items() if not k.startswith("_")}
        return json.loads(json.dumps({**public, "image_shape": self.image_shape}))

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
        with without_autocast(latents.device):
            raw = latents.to(self.mean) * self.std + self.mean
            images = self._decoded(raw).to(latents.dtype)
        if self.image_shape is None:
            return images
        channels, height, width = self.image_shape
        images = images[..., :height, :width]
        return images if images.shape[1] == channels else images.mean(1, keepdim=True)

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the shape ``(c, h, w)`` of the latents of images ``(C, H, W)``."""
        height, width = (-(-side // self.factor) for side in image_shape[1:])
        return self.latent_channels, height, width

    def pad(self, images: Tensor) -> Tensor:
        """Repeat the last row and column of images until ``factor`` divides both sides."""
        return pad_to_multiple(images, self.factor)

    def _posterior(self, images: Tensor) -> Posterior:
        """Return the distribution of the unscaled latents of images ``(B, C, H, W)``."""
        self._check_images(images)
        if images.shape[1] != self.channels:
            images = images.expand(-1, self.channels, -1, -1)
        with without_autocast(images.device):
            law = self._encoded(self.pad(images).to(self.mean))
        return Posterior(law.mean.to(images.dtype), law.std.to(images.dtype))

    def _encoded(self, images: Tensor) -> Posterior:
        """Return the network's distribution of latents; without one, its latents and zeros."""
        found = self.vae.encode(images)
        latents = found.latent if "latent" in found else found.latents
        return Posterior(latents, torch.zeros_like(latents))

    def _decoded(self, latents: Tensor) -> Tensor:
        """Return the network's images of unscaled latents."""
        return self.vae.decode(latents).sample

    def _own_shape(self) -> Sequence[int] | None:
        """Return the shape of images that the network's config states, or None."""
        sides = self.vae.config.get("sample_size")
        return (self.channels, *sides) if isinstance(sides, list | tuple) else None

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Require an ``image_shape`` that the network can take."""
        if len(shape) != 3 or shape[0] not in (1, self.channels):
            raise ValueError(f"image_shape must be (1 or {self.channels}, H, W), got {shape}")

    def _check_images(self, images: Tensor) -> None:
        """Require floats of a shape that the network, or ``image_shape``, allows."""
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in [-1, 1], got {images.dtype}")
        shape, channels, factor = tuple(images.shape), self.channels, self.factor
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
        channels, shape = self.latent_channels, tuple(latents.shape)
        if self.image_shape is None:
            fits, rule = len(shape) == 4 and shape[1] == channels, f"{channels}, h, w"
        else:
            expected = self.latent_shape(self.image_shape)
            fits, rule = shape[1:] == expected, ", ".join(map(str, expected))
        if not fits:
            raise ValueError(f"latents must have shape (B, {rule}), got {shape}")

    def _scale(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of the latents by channel, from the config."""
        config, channels = self.vae.config, self.latent_channels
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
        return mean, [
            s / config.scaling_factor for s in config.get("latents_std") or [1.0] * channels
        ]

    def _read_config(self) -> None:
        """Set ``mean``, ``std`` and ``hash`` from the network and its config."""
        mean, std = self._scale()
        if not (len(mean) == len(std) == self.latent_channels):
            raise ValueError(
                f"latents_mean and latents_std of vae must hold {self.latent_channels} numbers, "
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
        self.hash = content_hash(self.vae.state_dict(), as_text(self.config))


def forget_place(file: Path) -> None:
    """Take the place that a network was read from out of its stored config."""
    config = json.loads(file.read_text())
    config.pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
