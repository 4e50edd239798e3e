"""The interface of autoencoders, which of them made given latents, and the identity as one."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.paths import noise_like
from flowkit.provenance import content_hash


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


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast. Where there is none, exported graphs get no region."""
    known = torch.amp.is_autocast_available(device.type)
    if not (known and torch.is_autocast_enabled(device.type)):
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
        found["hash"] = content_hash(autoencoder.state_dict(), as_text({}))
    return found


def as_text(config: Mapping[str, Any]) -> str:
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
