"""Networks that are velocities: ``net(x, t, cond)``."""

from flowkit.nn.blockwise import Blockwise
from flowkit.nn.blockwise_dit import BlockwiseDiT
from flowkit.nn.blockwise_mlp import BlockwiseMLP
from flowkit.nn.companions import Inpainting, SemanticMap
from flowkit.nn.diffusers import DiffusersVelocity, unet2d
from flowkit.nn.dit import DiT
from flowkit.nn.mlp import MLP, ResidualMLP

__all__ = [
    "MLP",
    "Blockwise",
    "BlockwiseDiT",
    "BlockwiseMLP",
    "DiT",
    "DiffusersVelocity",
    "Inpainting",
    "ResidualMLP",
    "SemanticMap",
    "unet2d",
]
