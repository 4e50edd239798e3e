"""Transformer for sequences of any length, with conditions by frame, by sample and as tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.checks import as_sizes, check_integer
from flowkit.nn.dit import DiTBlock, PatchOutput
from flowkit.nn.embed import TimeLabelEmbedding, check_even, modulate, modulation, sinusoid
from flowkit.types import Cond

KEYS = ("frames", "vector", "tokens", "frame_mask", "token_mask")


class Prefix(NamedTuple):
    """A condition as a network prepares it, once a solve; see `SequenceDiT.prepare`."""

    frames: Tensor | None
    """Frames ``(B, T, width)``, embedded."""
    vector: Tensor | float
    """Vector ``(B, width)``, embedded, or 0."""
    tokens: list[tuple[Tensor, Tensor]]
    """Keys and values ``(B, heads, N + 1, width / heads)`` of the tokens, one pair per block."""
    frame_mask: Tensor | None
    """Booleans ``(B, T)``: True for a frame, False for padding."""
    token_mask: Tensor | None
    """Booleans ``(B, 1, 1, N + 1)``."""


class _CrossAttention(nn.Module):
    """Gated attention from frames to tokens: ``h ← h + g·Attention(LN(h)·(1 + s) + b, tokens)``.

    One more token, which is learned, is always there. So a sample whose tokens are all masked has
    something to attend to.
    """

    def __init__(self, width: int, heads: int, token_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.query, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.pairs = nn.Linear(token_size, 2 * width)
        for layer in (self.query, self.project, self.pairs):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.none = nn.Parameter(torch.zeros(1, 1, 2 * width))
        self.modulation = modulation(width, width, 3)

    def prepare(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of ``tokens (B, N, W)``, behind those of the learned token."""
        pairs = torch.cat([self.none.expand(len(tokens), -1, -1), self.pairs(tokens)], 1)
        b, n, _ = pairs.shape
        keys, values = pairs.reshape(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(
        self, h: Tensor, c: Tensor, pair: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Return the next frames for ``h (B, T, width)`` and ``c (B, 1, width)``."""
        shift, scale, gate = self.modulation(c).chunk(3, -1)
        b, t, width = h.shape
        q = self.query(modulate(self.norm(h), shift, scale))
        q = q.reshape(b, t, self.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, *pair, attn_mask=mask)
        return h + gate * self.project(out.transpose(1, 2).reshape(b, t, width))


class _Neighbors(nn.Module):
    """Sum over neighboring frames, each channel alone: ``h_n ← h_n + b + Σ_k w_k·LN(h)_{n+k}``.

    It is the identity at the start. Source: the convolution of Gulati et al., *Conformer*, 2020
    (arXiv 2005.08100), without its gates.
    """

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.sum = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        for parameter in self.sum.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Return the next frames for ``h (B, T, width)``, which count as 0 outside of ``mask``."""
        normed = self.norm(h)
        if mask is not None:
            normed = normed.masked_fill(~mask[..., None], 0)
        return h + self.sum(normed.transpose(1, 2)).transpose(1, 2)


class SequenceDiT(nn.Module):
    """Diffusion transformer for sequences ``(C, T)``: chunks of actions, mels, latents of sound.

    One frame is one token, and its position is a sinusoid, so a sequence may have any length. The
    condition is a mapping of what the network was built for:

    * ``frames (B, Cf, T)`` join the channels of the state;
    * ``vector (B, G)`` joins the time, which modulates all blocks (adaLN-Zero);
    * ``tokens (B, N, W)`` are attended to, with ``token_mask (B, N)``, True for a token;
    * ``frame_mask (B, T)`` is True for a frame and False for padding: no frame attends to padding,
      and the velocity of padding is 0.

    Padding with masks changes neither the velocity of the frames nor the loss. Both masks are
    optional. In a solve, all that depends on the condition alone is computed once, see `bind`.

    Args:
        shape: ``(C, T)`` of the state. ``T`` is the length of a sample; a call may have another.
        width: Size of a token, an even number.
        depth: Number of blocks.
        heads: Number of attention heads; divides ``width``.
        kernel: Frames that each block sums up around a frame before it attends, an odd number. It
            helps where neighbors are alike, as in a spectrogram. None for a network without.
        mlp_ratio: Hidden size of a block's perceptron in units of ``width``.
        frames: Channels ``Cf`` of ``frames``; None for a network without.
        vector: Size ``G`` of ``vector``; None for a network without.
        tokens: Size ``W`` of a token of the condition; None for a network without.
        num_times: Number of times per sample. With 1, ``t`` is ``(B,)``, otherwise
            ``(B, num_times)``.
        time_scale: Radians of the fastest wave that embeds a time, see `flowkit.nn.DiT`.

    Attributes:
        prefixes: Conditions prepared so far: one a call, one a solve.

    Raises:
        TypeError: If ``kernel`` is no integer.
        ValueError: If a size is below 1, ``kernel`` is even, or ``heads`` does not divide an even
            width.

    Source: the blocks of Peebles & Xie (2023), *Scalable Diffusion Models with Transformers*. The
    prefix that is computed once a solve is that of Black et al., *π0*, 2024 (arXiv 2410.24164).

    >>> net = SequenceDiT((7, 14), width=32, depth=2, heads=2, vector=39)
    >>> net(torch.randn(3, 7, 20), torch.rand(3), {"vector": torch.randn(3, 39)}).shape
    torch.Size([3, 7, 20])
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        kernel: int | None = None,
        mlp_ratio: float = 4.0,
        frames: int | None = None,
        vector: int | None = None,
        tokens: int | None = None,
        num_times: int = 1,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        if len(shape) != 2:
            raise ValueError(f"shape must be (C, T), got {tuple(shape)}")
        check_even(width, "width")
        check_integer(depth, "depth", 1)
        if kernel is not None:
            check_integer(kernel, "kernel")
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(f"kernel must be an odd number of frames, got {kernel}")
        self.sizes = {"frames": frames, "vector": vector, "tokens": tokens}
        for name, size in self.sizes.items():
            check_integer(1 if size is None else size, name, 1)
        channels, length = as_sizes(shape, "shape")
        self.shape, self.num_times, self.width = (channels, length), num_times, width
        self.inputs = _linear(self.shape[0], width)
        self.frames = None if frames is None else _linear(frames, width)
        self.vector = (
            None
            if vector is None
            else nn.Sequential(_linear(vector, width), nn.SiLU(), _linear(width, width))
        )
        self.embedding = TimeLabelEmbedding(width, None, num_times, time_scale=time_scale)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        several = 0 if tokens is None else depth
        self.crossings = nn.ModuleList(
            _CrossAttention(width, heads, tokens or 1) for _ in range(several)
        )
        several = 0 if kernel is None else depth
        self.neighbors = nn.ModuleList(_Neighbors(width, kernel or 1) for _ in range(several))
        self.outputs = PatchOutput(width, self.shape[0])
        self.prefixes = 0

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, C, T)`` at ``x (B, C, T)`` and ``t (B,)``.

        Raises:
            TypeError: If ``cond`` is not a mapping.
            ValueError: If a shape does not fit, or a part of ``cond`` is missing or unknown.
        """
        return self.step(x, t, self.prepare(cond))

    def bind(self, cond: Cond = None, grid: Tensor | None = None) -> "_Bound":
        """Return the velocity of one solve, which prepares its condition at once."""
        return _Bound(self, self.prepare(cond))

    def prepare(self, cond: Cond = None) -> Prefix:
        """Compute all that depends on the condition alone."""
        given = self._checked(cond)
        if not torch.compiler.is_compiling():
            self.prefixes += 1
        frame_mask, token_mask = given.get("frame_mask"), given.get("token_mask")
        if token_mask is not None:
            token_mask = F.pad(token_mask.bool(), (1, 0), value=True)[:, None, None]
        return Prefix(
            self.frames(given["frames"].transpose(1, 2)) if self.frames is not None else None,
            self.vector(given["vector"]) if self.vector is not None else 0.0,
            [crossing.prepare(given["tokens"]) for crossing in self._crossings()],
            None if frame_mask is None else frame_mask.bool(),
            token_mask,
        )

    def step(self, x: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """Return the velocity ``(B, C, T)`` for a prepared condition."""
        _check_sequence(x, t, self.shape[0], self.num_times)
        length, mask = x.shape[2], prefix.frame_mask
        attended = None
        if mask is not None:
            if tuple(mask.shape) != (len(x), length):
                raise ValueError(
                    f"frame_mask must have shape ({len(x)}, {length}) like x, got {(*mask.shape,)}"
                )
            attended = mask[:, None, None]
        c = (self.embedding(t) + prefix.vector)[:, None]
        positions = torch.arange(length, device=x.device)
        h = self.inputs(x.transpose(1, 2)) + sinusoid(positions, self.width, scale=1.0).to(x.dtype)
        if prefix.frames is not None:
            if prefix.frames.shape[1] != length:
                raise ValueError(
                    f"frames must have the {length} frames of x, got {prefix.frames.shape[1]}"
                )
            h = h + prefix.frames
        nothing = [None] * len(self.blocks)
        around = list(self.neighbors) or nothing
        crossings, pairs = self._crossings() or nothing, prefix.tokens or nothing
        each = zip(self.blocks, around, crossings, pairs, strict=True)
        for block, neighbors, crossing, pair in each:
            if neighbors is not None:
                h = neighbors(h, mask)
            if crossing is not None:
                h = crossing(h, c, pair, prefix.token_mask)
            h = block(h, c, attended)
        v = self.outputs(h, c).transpose(1, 2)
        return v if mask is None else v.masked_fill(~mask[:, None], 0)

    def _crossings(self) -> list[Any]:
        """Return the layers that attend to tokens, one a block, or none."""
        return list(self.crossings)

    def _checked(self, cond: Cond) -> Mapping[str, Tensor]:
        """Return the parts of a condition; refuse missing, unknown and wrongly sized ones."""
        if not (cond is None or isinstance(cond, Mapping)):
            raise TypeError(
                f"cond must be a mapping of {', '.join(KEYS)}, got {type(cond).__name__}"
            )
        given = {} if cond is None else dict(cond)
        for name in given:
            if name not in KEYS:
                raise ValueError(f"cond must hold some of {', '.join(KEYS)}, got {name}")
        for name, size in self.sizes.items():
            if (name in given) != (size is not None):
                state = "hold" if size is not None else "not hold"
                got = ", ".join(given) or "nothing"
                raise ValueError(f"cond must {state} {name} for this network, got {got}")
            if size is not None:
                axis = 1 if name != "tokens" else 2
                shape, ndim = tuple(given[name].shape), 2 if name == "vector" else 3
                if len(shape) != ndim or shape[axis] != size:
                    raise ValueError(
                        f"{name} must have {ndim} dimensions with size {size} in number {axis}, "
                        f"got shape {shape}"
                    )
        if "token_mask" in given and self.sizes["tokens"] is None:
            raise ValueError("cond must not hold token_mask for a network without tokens")
        return given


class _Bound:
    """`SequenceDiT` during one solve."""

    def __init__(self, net: SequenceDiT, prefix: Prefix) -> None:
        self.net, self.prefix = net, prefix

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return self.net.step(x, t, self.prefix)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer that starts as those of `flowkit.nn.DiT`."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _check_sequence(x: Tensor, t: Tensor, channels: int, num_times: int) -> None:
    """Require ``x (B, channels, T)`` of any length and times for it, by their shapes alone."""
    if x.ndim != 3 or x.shape[1] != channels or not x.shape[2]:
        raise ValueError(f"x must have shape (B, {channels}, T), got {(*x.shape,)}")
    expected = (len(x),) if num_times == 1 else (len(x), num_times)
    if tuple(t.shape) != expected:
        raise ValueError(f"t must have shape {expected}, got {(*t.shape,)}")
