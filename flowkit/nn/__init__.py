"""Networks that are velocities: ``net(x, t, cond)``."""

from flowkit.nn.diffusers import DiffusersVelocity, unet2d
from flowkit.nn.dit import DiT
from flowkit.nn.mlp import MLP, ResidualMLP

__all__ = ["MLP", "DiT", "DiffusersVelocity", "ResidualMLP", "unet2d"]
