"""Diffusion transformer, and the layers that other transformers of flowkit share."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowkit.checks import as_sizes, check_between, check_choice, check_integer
from flowkit.nn.embed import (
    SidesError,
    TimeLabelEmbedding,
    check_state,
    modulate,
    modulation,
    sinusoid,
    with_columns,
    zeroed,
)
from flowkit.types import Cond

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and number of heads of the published sizes."""


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut images ``(B, C, H, W)`` into tokens ``(B, HW/patch², C·patch²)``, row by row.

    >>> patchify(torch.arange(16.0).reshape(1, 1, 4, 4), 2)[0, 1]
    tensor([2., 3., 6., 7.])
    """
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch**2)


def unpatchify(tokens: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Join tokens ``(B, HW/patch², C·patch²)`` to images ``(B, C, H, W)``.

    >>> x = torch.randn(2, 3, 4, 6)
    >>> torch.equal(unpatchify(patchify(x, 2), 2, 4, 6), x)
    True
    """
    b, (h, w) = len(tokens), (height // patch, width // patch)
    x = tokens.reshape(b, h, w, -1, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, height, width)


class PatchEmbed(nn.Module):
    """Embedding of images as tokens ``(B, N, width)``: linear in each patch, plus a fixed position.

    The position joins the sinusoids of row and column, with ``width / 2`` numbers each.

    Args:
        shape: ``(C, H, W)`` of the images.
        patch: Side of a patch in pixels; divides ``H`` and ``W``.
        width: Size of a token, a multiple of 4.

    Raises:
        ValueError: If ``patch`` is below 1 or does not divide the sides, or ``width`` is not a
            positive multiple of 4.
    """

    positions: Tensor

    def __init__(self, shape: Sequence[int], patch: int, width: int) -> None:
        super().__init__()
        channels, height, columns = shape
        check_integer(patch, "patch", 1)
        check_integer(width, "width")
        if height % patch or columns % patch:
            message = f"patch must divide the image size {height}x{columns}, got {patch}"
            raise SidesError((1, *shape), patch, message)
        if width < 4 or width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {width}")
        self.patch = patch
        self.linear = nn.Linear(channels * patch**2, width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        rows, cols = torch.meshgrid(
            torch.arange(height // patch), torch.arange(columns // patch), indexing="ij"
        )
        waves = [sinusoid(axis.flatten(), width // 2, scale=1.0) for axis in (rows, cols)]
        self.register_buffer("positions", torch.cat(waves, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens ``(B, N, width)`` of ``x (B, C, H, W)``."""
        return self.linear(patchify(x, self.patch)) + self.positions


class DiTBlock(nn.Module):
    """Self-attention and a perceptron, each modulated and gated by ``c`` (adaLN-Zero).

        h ← h + g₁·Attention(LN(h)·(1 + s₁) + b₁)
        h ← h + g₂·MLP(LN(h)·(1 + s₂) + b₂)

    Shifts ``b``, scales ``s`` and gates ``g`` are linear in ``silu(c)`` and zero at the start, so a
    new block is the identity.

    Args:
        width: Size of a token.
        heads: Number of attention heads; divides ``width``.
        mlp_ratio: Hidden size of the perceptron in units of ``width``.
        cond_width: Size of ``c``; ``None`` means ``width``.

    Raises:
        ValueError: If ``heads`` is below 1 or does not divide ``width``.

    Source: Peebles & Xie (2023), *Scalable Diffusion Models with Transformers*, section 3.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 4.0, cond_width: int | None = None
    ) -> None:
        super().__init__()
        check_integer(heads, "heads", 1)
        if width % heads:
            raise ValueError(f"heads must divide the width {width}, got {heads}")
        self.heads = heads
        hidden = int(mlp_ratio * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.qkv, self.project, self.expand, self.contract):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.modulation = modulation(cond_width or width, width, 6)

    def forward(self, h: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the next tokens for ``h (B, N, width)`` and ``c (B, 1|N, *)``.

        ``c`` is one condition per sample or one per token. No token attends to another where
        ``mask (B, 1, 1|N, N)`` is False.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, -1)
        h = h + gate1 * self._attend(modulate(self.norm(h), shift1, scale1), mask)
        hidden = self.expand(modulate(self.norm(h), shift2, scale2))
        return h + gate2 * self.contract(F.gelu(hidden, approximate="tanh"))

    def _attend(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Return self-attention between the tokens ``(B, N, width)``."""
        b, n, width = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.project(out.transpose(1, 2).reshape(b, n, width))


class PatchOutput(nn.Module):
    """Output layer: a modulated norm and a linear map to pixels, zero at the start.

    Args:
        width: Size of a token.
        size: Numbers per patch, ``C·patch²``.
        cond_width: Size of ``c``; ``None`` means ``width``.
    """

    def __init__(self, width: int, size: int, cond_width: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = modulation(cond_width or width, width, 2)
        self.linear = zeroed(nn.Linear(width, size))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Return patches ``(B, N, size)`` for tokens ``h (B, N, width)`` and ``c (B, 1|N, *)``."""
        shift, scale = self.modulation(c).chunk(2, -1)
        return self.linear(modulate(self.norm(h), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero, for images and latents.

    The output differs from the paper: a velocity with the channels of the state, without a learned
    variance.

    Args:
        shape: ``(C, H, W)`` of the state.
        patch: Side of a patch in pixels; divides ``H`` and ``W``.
        width: Size of a token, a multiple of 4.
        depth: Number of blocks.
        heads: Number of attention heads; divides ``width``.
        mlp_ratio: Hidden size of a block's perceptron in units of ``width``.
        num_classes: Number of classes, for labels ``(B,)`` in ``[0, num_classes]``; the last label
            is the null label.
        in_channels: Channels of the input, for a state with companions (a mask, a second image).
            The companions follow the ``C`` channels of the state. ``None`` means ``C``.
        num_times: Number of times per sample. With 1, ``t`` is ``(B,)``, otherwise
            ``(B, num_times)``.
        time_scale: Radians of the fastest wave that embeds a time, between ``t = 0`` and ``t = 1``.
            The derivative with respect to time is as large. Mean flows learn from this derivative:
            they need a small scale, such as 10.
        gradient_checkpointing: Whether to keep only the tokens between blocks for the backward
            pass, and to compute the rest again. This takes a third more time and much less memory.

    Raises:
        ValueError: If ``patch`` does not divide the image, ``heads`` does not divide the width, or
            a size is below 1.

    Source: Peebles & Xie (2023), *Scalable Diffusion Models with Transformers*, section 3.

    >>> net = DiT((1, 8, 8), width=32, depth=2, heads=2, num_classes=10)
    >>> v, tokens = net(torch.randn(3, 1, 8, 8), torch.rand(3), torch.arange(3), return_features=1)
    >>> v.shape, tokens.shape
    (torch.Size([3, 1, 8, 8]), torch.Size([3, 16, 32]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        in_channels: int | None = None,
        num_times: int = 1,
        time_scale: float = 1000.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
        check_integer(depth, "depth", 1)
        channels, height, columns = as_sizes(shape, "shape")
        self.shape, self.patch, self.num_times = (channels, height, columns), patch, num_times
        self.gradient_checkpointing = gradient_checkpointing
        self.in_shape = (channels if in_channels is None else in_channels, height, columns)
        check_integer(self.in_shape[0], "in_channels", 1)
        self.patches = PatchEmbed(self.in_shape, patch, width)
        self.embedding = TimeLabelEmbedding(width, num_classes, num_times, time_scale=time_scale)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.outputs = PatchOutput(width, channels * patch**2)

    @classmethod
    def from_name(cls, name: str, shape: Sequence[int], **options: Any) -> "DiT":
        """Build a published size from its name, such as ``"DiT-S/2"``.

        Args:
            name: ``DiT-<size>/<patch>`` with the size ``S``, ``B``, ``L`` or ``XL``.
            shape: ``(C, H, W)`` of the state.
            **options: Other arguments of the constructor.

        Raises:
            ValueError: If the name has another form or the size is unknown.

        >>> len(DiT.from_name("DiT-S/8", (4, 32, 32), num_classes=1000).blocks)
        12
        """
        match = re.fullmatch(r"DiT-(\w+)/(\d+)", name)
        if match is None:
            raise ValueError(
                f"name must read DiT-<size>/<patch>, got {name!r}; an example is 'DiT-B/2'"
            )
        check_choice(match[1], SIZES, "size")
        depth, width, heads = SIZES[match[1]]
        return cls(shape, int(match[2]), width, depth, heads, **options)

    def with_second_time(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of a network of one time for this one; the second has no effect."""
        size = self.embedding.frequencies
        return with_columns(state, "embedding.inputs.weight", at=size, count=size)

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond = None, return_features: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the velocity ``(B, C, H, W)`` at ``x (B, in_channels, H, W)`` and ``t (B,)``.

        Args:
            x: State, followed by its companions if the network has ``in_channels``.
            t: Times in [0, 1].
            cond: Labels ``(B,)``, for a network with ``num_classes``.
            return_features: Number of blocks, from 1 to ``depth``. If given, the result also holds
                the tokens ``(B, N, width)`` after this block.

        Raises:
            TypeError: If ``cond`` is a mapping or holds no integers.
            ValueError: If a shape does not fit, or a label is missing, unwanted or out of its
                range.
        """
        check_state(x, t, self.in_shape, self.num_times)
        if return_features is not None:
            check_between(return_features, 1, len(self.blocks), "return_features")
        c = self.embedding(t, cond)[:, None]
        h = self.patches(x)
        features, again = h, self.gradient_checkpointing and torch.is_grad_enabled()
        for number, block in enumerate(self.blocks, start=1):
            h = checkpoint(block, h, c, use_reentrant=False) if again else block(h, c)
            if number == return_features:
                features = h
        v = unpatchify(self.outputs(h, c), self.patch, *self.shape[1:])
        return v if return_features is None else (v, features)
