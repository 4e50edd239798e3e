"""Networks that are velocities: ``net(x, t, cond)``."""

from flowkit.nn.mlp import MLP, ResidualMLP

__all__ = ["MLP", "ResidualMLP"]
