"""Autoencoders: frozen maps from images to the latents of a flow, and back.

`Identity` leaves images as they are. The others hold a network of diffusers: `KLAutoencoder`,
`TinyAutoencoder`, `DCAutoencoder` and `RAEAutoencoder`.
"""

from flowkit.autoencoders.frozen import FrozenAutoencoder
from flowkit.autoencoders.interface import (
    Autoencoder,
    Identity,
    Posterior,
    check_identity,
    identity,
    mean_latents,
    pad_to_multiple,
)
from flowkit.autoencoders.networks import (
    DCAutoencoder,
    KLAutoencoder,
    RAEAutoencoder,
    TinyAutoencoder,
)

__all__ = [
    "Autoencoder",
    "DCAutoencoder",
    "FrozenAutoencoder",
    "Identity",
    "KLAutoencoder",
    "Posterior",
    "RAEAutoencoder",
    "TinyAutoencoder",
    "check_identity",
    "identity",
    "mean_latents",
    "pad_to_multiple",
]
