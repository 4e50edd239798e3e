"""Multilayer perceptrons as velocities, for points and for images of a few dozen pixels."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowkit.checks import as_sizes, check_choice, check_integer
from flowkit.nn.embed import (
    TimeLabelEmbedding,
    check_cond,
    check_state,
    look_up,
    modulate,
    modulation,
    with_columns,
    zeroed,
)
from flowkit.types import Cond

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "selu": nn.SELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class MLP(nn.Module):
    """Plain perceptron on the concatenation ``[x, t, condition]``.

    A label enters as a one-hot code of ``num_classes + 1`` numbers, and the last number means *no
    label*.

    Args:
        shape: Shape of a sample, such as ``(2,)`` or ``(1, 8, 8)``.
        width: Size of the hidden layers.
        depth: Number of hidden layers.
        num_classes: Number of classes, for labels ``(B,)`` in ``[0, num_classes]``; the last label
            is the null label.
        cond_dim: Size of float conditions ``(B, cond_dim)``; not together with ``num_classes``.
        activation: ``"gelu"``, ``"relu"``, ``"selu"``, ``"silu"`` or ``"tanh"``.
        num_times: Number of times per sample. With 1, ``t`` is ``(B,)``, otherwise
            ``(B, num_times)``.

    Raises:
        ValueError: If both ``num_classes`` and ``cond_dim`` are given, the activation is unknown,
            or a size is below 1.

    Source: Tong et al. (2023), *Improving and generalizing flow-based generative models with
    minibatch optimal transport*. The defaults are the network of the two-dimensional experiments,
    which has no conditions.

    >>> net = MLP((2,), num_classes=10)
    >>> net(torch.zeros(5, 2), torch.rand(5), torch.full((5,), 10)).shape
    torch.Size([5, 2])
    """

    codes: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 64,
        depth: int = 3,
        num_classes: int | None = None,
        cond_dim: int | None = None,
        activation: str = "selu",
        num_times: int = 1,
    ) -> None:
        super().__init__()
        if num_classes is not None and cond_dim is not None:
            raise ValueError(
                f"cond_dim must be None if num_classes is given, got {cond_dim}; "
                "a network takes labels or float conditions"
            )
        check_choice(activation, ACTIVATIONS, "activation")
        for name, size in (("width", width), ("depth", depth), ("num_times", num_times)):
            check_integer(size, name, 1)
        self.shape, self.num_times = as_sizes(shape, "shape"), num_times
        self.num_classes, self.cond_dim = num_classes, cond_dim

        cond_size = 0 if cond_dim is None else cond_dim
        check_integer(cond_size, "cond_dim", 0)
        if num_classes is not None:
            check_integer(num_classes, "num_classes", 1)
            cond_size = num_classes + 1
            self.register_buffer("codes", torch.eye(cond_size), persistent=False)
        pixels = math.prod(self.shape)
        layers: list[nn.Module] = []
        size = pixels + num_times + cond_size
        for _ in range(depth):
            layers += [nn.Linear(size, width), ACTIVATIONS[activation]()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, pixels))

    def with_second_time(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of a network of one time for this one; the second has no effect."""
        return with_columns(state, "layers.0.weight", at=math.prod(self.shape) + 1, count=1)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *shape)`` at ``x (B, *shape)`` and ``t (B,)``.

        Raises:
            TypeError: If ``cond`` is of a wrong kind.
            ValueError: If a shape does not fit, or a label is missing, unwanted or out of its
                range.
        """
        check_state(x, t, self.shape, self.num_times)
        parts = [x.flatten(1), t.reshape(len(x), -1).to(x.dtype)]
        if self.cond_dim is not None:
            parts.append(self._float_cond(cond, len(x)).to(x.dtype))
        elif (labels := check_cond(cond, len(x), self.num_classes)) is not None:
            parts.append(look_up(self.codes, labels).to(x.dtype))
        return self.layers(torch.cat(parts, 1)).reshape(x.shape)

    def _float_cond(self, cond: Cond, batch: int) -> Tensor:
        """Require float conditions ``(batch, cond_dim)``."""
        if cond is None or isinstance(cond, Mapping):
            raise TypeError(f"cond must be a tensor of floats, got {type(cond).__name__}")
        if tuple(cond.shape) != (batch, self.cond_dim):
            raise ValueError(
                f"cond must have shape ({batch}, {self.cond_dim}), got {(*cond.shape,)}"
            )
        return cond


class ResidualMLP(nn.Module):
    """Residual perceptron modulated by time and label, for small images such as 8×8 digits.

    Each block computes ``h + g·W₂ silu(W₁ (LN(h)·(1 + s) + b))``. Shift ``b``, scale ``s`` and gate
    ``g`` are linear in the embedding of time and label, after a SiLU. All gates and the output are
    zero at the start.

    Args:
        shape: Shape of a sample.
        width: Size of the residual stream and of the embedding.
        depth: Number of blocks.
        num_classes: Number of classes, for labels ``(B,)`` in ``[0, num_classes]``; the last label
            is the null label.
        dropout: Probability of dropping a hidden unit of a block in training, in [0, 1].
        num_times: Number of times per sample. With 1, ``t`` is ``(B,)``, otherwise
            ``(B, num_times)``.
        time_scale: Radians of the fastest wave that embeds a time, between ``t = 0`` and ``t = 1``.
            The derivative with respect to time is as large. Mean flows learn from this derivative:
            they need a small scale, such as 10.

    Raises:
        ValueError: If a size is below 1, or ``time_scale`` is not positive.

    Source: the modulation of Peebles & Xie (2023), *Scalable Diffusion Models with Transformers*,
    without attention.

    >>> net = ResidualMLP((1, 8, 8), num_classes=10)
    >>> net(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 10])).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 256,
        depth: int = 3,
        num_classes: int | None = None,
        dropout: float = 0.0,
        num_times: int = 1,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        check_integer(width, "width", 1)
        check_integer(depth, "depth", 1)
        self.shape, self.num_times = as_sizes(shape, "shape"), num_times
        pixels = math.prod(self.shape)
        self.embedding = TimeLabelEmbedding(width, num_classes, num_times, time_scale=time_scale)
        self.inputs = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(_ResidualBlock(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = modulation(width, width, 2)
        self.outputs = zeroed(nn.Linear(width, pixels))

    def with_second_time(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of a network of one time for this one; the second has no effect."""
        size = self.embedding.frequencies
        return with_columns(state, "embedding.inputs.weight", at=size, count=size)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *shape)`` at ``x (B, *shape)`` and ``t (B,)``.

        Raises:
            TypeError: If ``cond`` is a mapping or holds no integers.
            ValueError: If a shape does not fit, or a label is missing, unwanted or out of its
                range.
        """
        check_state(x, t, self.shape, self.num_times)
        c = self.embedding(t, cond)
        h = self.inputs(x.flatten(1))
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).chunk(2, -1)
        return self.outputs(modulate(self.norm(h), shift, scale)).reshape(x.shape)


class _ResidualBlock(nn.Module):
    """Residual block of two layers, modulated and gated by a condition ``c (B, width)``."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = modulation(width, width, 3)
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Return the next state ``(B, width)`` for ``h (B, width)``."""
        shift, scale, gate = self.modulation(c).chunk(3, -1)
        return h + gate * self.layers(modulate(self.norm(h), shift, scale))
