"""Autoencoders: between what users see (images) and what a flow runs on (latents)."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Autoencoder(Protocol):
    """A pair of maps on batches; frozen, and never stored with a flow."""

    def encode(self, images: Tensor) -> Tensor:
        """Return latents ``(B, *)`` of images ``(B, C, H, W)`` in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return images of latents."""
        ...


class Identity(nn.Module):
    """The autoencoder of a flow on the data itself.

    >>> import torch
    >>> x = torch.ones(1, 2)
    >>> Identity().decode(Identity().encode(x)) is x
    True
    """

    def encode(self, images: Tensor) -> Tensor:
        """Return ``images``."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Return ``latents``."""
        return latents
