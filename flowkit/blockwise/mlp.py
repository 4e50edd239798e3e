"""Blockwise residual perceptron, for points and small images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowkit.blockwise.flow import Blockwise
from flowkit.blockwise.parts import Part, check_edges, each
from flowkit.checks import as_sizes, check_integer
from flowkit.nn.embed import TimeLabelEmbedding, check_state, modulate, modulation, zeroed
from flowkit.nn.mlp import _ResidualBlock
from flowkit.types import Cond


class BlockwiseMLP(Blockwise):
    """Blockwise version of `flowkit.nn.ResidualMLP`: the last blocks differ between segments.

    The trunk's features ``h (B, width)`` come from residual blocks, modulated by the embedding
    ``c`` of time and label. The stacks embed ``x_t`` again, and their modulation has the condition
    ``[c; h]``. Stacks share their input and output layers, which are parameters of the trunk.

    Args:
        shape: Shape of a sample.
        edges: Ends of the segments from 0 to 1, or the number of equal segments.
        width: Size of the features and of the residual streams.
        trunk_depth: Number of blocks of the trunk.
        stack_depth: Number of blocks of a stack: one number for all stacks, or one number per
            segment.
        residual_depth: Number of blocks of the feature residual; ``None`` means no feature
            residual.
        num_classes: Number of classes, for labels ``(B,)`` in ``[0, num_classes]``; the last label
            is the null label.
        dropout: Probability of dropping a hidden unit of a block in training, in [0, 1].
        feature_mode: Mode of the features in a solve, see `Blockwise`.

    Raises:
        ValueError: If a size is below 1 or depths are not one per segment.

    >>> flow = BlockwiseMLP((2,), edges=[0.0, 0.5, 1.0], width=16, residual_depth=1)
    >>> flow(torch.randn(4, 2), torch.rand(4)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        edges: Tensor | Sequence[float] | int = 6,
        width: int = 256,
        trunk_depth: int = 2,
        stack_depth: int | Sequence[int] = 1,
        residual_depth: int | None = None,
        num_classes: int | None = None,
        dropout: float = 0.0,
        feature_mode: str = "full",
    ) -> None:
        depths = each(stack_depth, len(check_edges(edges)) - 1, "stack_depth")
        trunk = MLPTrunk(shape, width, trunk_depth, num_classes, dropout)
        stacks = [MLPStack(trunk, depth, dropout) for depth in depths]
        residual = None if residual_depth is None else MLPResidual(trunk, residual_depth, dropout)
        super().__init__(trunk, stacks, edges, residual, feature_mode)


class MLPTrunk(nn.Module):
    """Trunk: features ``h (B, width)``, and the layers that the stacks share.

    See `BlockwiseMLP` for the arguments.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int,
        depth: int,
        num_classes: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_integer(width, "width", 1)
        check_integer(depth, "trunk_depth", 1)
        self.shape, self.width, self.sides = as_sizes(shape, "shape"), width, (1, 1)
        pixels = math.prod(self.shape)
        self.embedding = TimeLabelEmbedding(width, num_classes)
        self.inputs = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(_Block(width, width, dropout) for _ in range(depth))
        self.stack_inputs = nn.Linear(pixels, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = modulation(2 * width, width, 2)
        self.outputs = zeroed(nn.Linear(width, pixels))

    def features(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return features ``(B, width)`` at ``x (B, *shape)`` and ``t (B,)``."""
        check_state(x, t, self.shape)
        h, c = self.inputs(x.flatten(1)), self.embedding(t, cond)
        for block in self.blocks:
            h = block(h, c)
        return h


class MLPStack(nn.Module):
    """Blocks of one segment.

    See `BlockwiseMLP` for the arguments.
    """

    def __init__(self, trunk: MLPTrunk, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_integer(depth, "stack_depth", 1)
        self.trunk = Part(trunk)
        self.blocks = nn.ModuleList(
            _Block(trunk.width, 2 * trunk.width, dropout) for _ in range(depth)
        )

    def velocity(self, x: Tensor, t: Tensor, cond: Cond, h: Tensor) -> Tensor:
        """Return the velocity ``(B, *shape)`` for features ``h (B, width)``."""
        trunk = self.trunk.module
        check_state(x, t, trunk.shape)
        c = torch.cat([trunk.embedding(t, cond), h], -1)
        state = trunk.stack_inputs(x.flatten(1))
        for block in self.blocks:
            state = block(state, c)
        shift, scale = trunk.modulation(c).chunk(2, -1)
        return trunk.outputs(modulate(trunk.norm(state), shift, scale)).reshape(x.shape)


class MLPResidual(nn.Module):
    """Feature residual ``R``: a few blocks on the trunk's first layer, minus this layer.

    A new residual is zero, because the gates of its blocks are zero.
    """

    def __init__(self, trunk: MLPTrunk, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_integer(depth, "residual_depth", 1)
        self.trunk = Part(trunk)
        self.blocks = nn.ModuleList(_Block(trunk.width, trunk.width, dropout) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the residual ``(B, width)`` at ``x (B, *shape)`` and ``t (B,)``."""
        trunk = self.trunk.module
        check_state(x, t, trunk.shape)
        inputs, c = trunk.inputs(x.flatten(1)), trunk.embedding(t, cond)
        h = inputs
        for block in self.blocks:
            h = block(h, c)
        return h - inputs


class _Block(_ResidualBlock):
    """Residual block whose condition has the size ``cond_width``."""

    def __init__(self, width: int, cond_width: int, dropout: float) -> None:
        super().__init__(width, dropout)
        self.modulation = modulation(cond_width, width, 3)
