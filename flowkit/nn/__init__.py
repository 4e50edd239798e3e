"""Networks of no one method that are velocities: ``net(x, t, cond)``."""

from flowkit.nn.companions import Inpainting, SemanticMap
from flowkit.nn.diffusers import DiffusersVelocity, autoencoder_kl, unet2d
from flowkit.nn.dit import DiT
from flowkit.nn.mlp import MLP, ResidualMLP

__all__ = [
    "MLP",
    "DiT",
    "DiffusersVelocity",
    "Inpainting",
    "ResidualMLP",
    "SemanticMap",
    "autoencoder_kl",
    "unet2d",
]
