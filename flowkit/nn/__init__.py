"""Networks that are velocities, ``net(x, t, cond)``, and belong to no single method.

`MLP` and `ResidualMLP` serve points and small images. `DiT` is the diffusion transformer for images
and latents (Peebles and Xie, 2023), `SequenceDiT` for sequences of any length. `unet2d` and
`autoencoder_kl` build networks of the diffusers library, and `DiffusersVelocity` reads any network
of that library as a velocity. `Conditioned`, with `Inpainting` and `SemanticMap`, adds conditions
pixel by pixel, and `Patches` makes channels of squares of pixels. Train a new network with these
classes; use `flowkit.adapters` for pretrained networks.
"""

from flowkit.nn.companions import Conditioned, Inpainting, Patches, SemanticMap
from flowkit.nn.diffusers import DiffusersVelocity, autoencoder_kl, unet2d
from flowkit.nn.dit import DiT
from flowkit.nn.mlp import MLP, ResidualMLP
from flowkit.nn.sequence import SequenceDiT

__all__ = [
    "MLP",
    "Conditioned",
    "DiT",
    "DiffusersVelocity",
    "Inpainting",
    "Patches",
    "ResidualMLP",
    "SemanticMap",
    "SequenceDiT",
    "autoencoder_kl",
    "unet2d",
]
