"""Embeddings of time and label, checks of inputs, and modulation: layers that networks share."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.checks import check_integer, check_labels, check_positive
from flowkit.types import Cond


class SidesError(ValueError):
    """Error of a network that cannot cut or halve the sides of a state.

    Args:
        shape: Shape ``(B, C, H, W)`` of the state.
        multiple: Its sides fit as multiples of this number.
        message: Text of the error; None tells the rule of the sides.
    """

    def __init__(self, shape: Sequence[int], multiple: int, message: str | None = None) -> None:
        super().__init__(tuple(shape), multiple, message)  # what pickle makes a copy of
        self.shape, self.multiple, self.message = tuple(shape), multiple, message

    def __str__(self) -> str:
        """Return the text of the error."""
        return self.message or (
            f"x must have sides that are multiples of {self.multiple} for this network, got shape "
            f"{self.shape}"
        )


def check_state(x: Tensor, t: Tensor, shape: tuple[int, ...], num_times: int = 1) -> None:
    """Require ``x (B, *shape)`` and ``t (B,)``, or ``t (B, num_times)`` for several times.

    The check reads shapes only. Networks run in the inner loop of a solver, where a check of values
    is slow.

    Raises:
        ValueError: If a shape differs.
    """
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), got {(*x.shape,)}")
    expected = (len(x),) if num_times == 1 else (len(x), num_times)
    if tuple(t.shape) != expected:
        raise ValueError(f"t must have shape {expected}, got {(*t.shape,)}")


def check_cond(cond: Cond, batch: int, num_classes: int | None) -> Tensor | None:
    """Require labels ``(batch,)`` for a network with classes, and ``None`` for other networks.

    Returns:
        The labels, or ``None``.

    Raises:
        TypeError: If ``cond`` is a mapping.
        ValueError: If labels are missing, unwanted or of another shape.
    """
    if isinstance(cond, Mapping):
        raise TypeError(f"cond must be a tensor or None, got a mapping of {', '.join(cond)}")
    if num_classes is None:
        if cond is not None:
            kind = f"shape {tuple(cond.shape)}" if isinstance(cond, Tensor) else type(cond).__name__
            raise ValueError(
                f"cond must be None for a network without num_classes, got {kind}; build the "
                "network with num_classes for labels (B,), or with SemanticMap for maps of labels"
            )
        return None
    if cond is None:
        raise ValueError(
            f"cond must hold labels in [0, {num_classes}], got None; "
            f"the null label is {num_classes}"
        )
    if tuple(cond.shape) != (batch,):
        raise ValueError(f"cond must have shape ({batch},), got {(*cond.shape,)}")
    return cond


def look_up(table: Tensor, labels: Tensor) -> Tensor:
    """Return the rows ``(B, W)`` of ``table (K, W)`` for labels ``(B,)`` in ``[0, K)``.

    The look-up itself detects labels out of range (on a GPU, by a CUDA assertion). Only then does
    this function read the labels for a clear message, so the check takes no time for a correct
    batch.

    Raises:
        TypeError: If labels are not integers.
        ValueError: If a label is out of its range.

    >>> look_up(torch.eye(3), torch.tensor([2, 0]))
    tensor([[0., 0., 1.],
            [1., 0., 0.]])
    """
    if labels.dtype not in (torch.int64, torch.int32):
        check_labels(labels, len(table), "cond")
        labels = labels.long()
    try:
        return F.embedding(labels, table)
    except IndexError:
        check_labels(labels, len(table), "cond")
        raise


def sinusoid(t: Tensor, dim: int, scale: float = 1000.0) -> Tensor:
    """Return sinusoids ``(..., dim)`` of times: cosines and sines of ``scale·t·ω_k``.

    The frequencies are ``ω_k = 10000^(−2k/dim)``; all cosines come before all sines.

    The precision is at least float32, because half precision cannot resolve angles of a thousand
    radians.

    Args:
        t: Times or positions ``(...)``.
        dim: Size of the result, an even number of at least 2.
        scale: Factor of ``t``.

    Raises:
        ValueError: If ``dim`` is odd or below 2.

    >>> sinusoid(torch.tensor([0.0]), 4)
    tensor([[1., 1., 0., 0.]])
    """
    check_even(dim, "dim")
    dtype = torch.promote_types(t.dtype, torch.float32)
    k = torch.arange(dim // 2, dtype=dtype, device=t.device)
    angles = scale * t.to(dtype)[..., None] * torch.exp(-math.log(10_000) * 2 * k / dim)
    return torch.cat([angles.cos(), angles.sin()], -1)


def check_even(size: int, name: str) -> None:
    """Require an even number of at least 2, for cosines and sines.

    Raises:
        ValueError: If the number is odd or below 2.
    """
    check_integer(size, name)
    if size < 2 or size % 2:
        raise ValueError(f"{name} must be an even number of at least 2, got {size}")


class TimeLabelEmbedding(nn.Module):
    """Embedding ``c (B, width)`` of time and label, the condition of a network.

    Each time becomes a sinusoid of ``time_scale · t`` and passes a two-layer SiLU perceptron. A
    label adds a row of a table. The last row, number ``num_classes``, means *no label*.

    Args:
        width: Size of the embedding.
        num_classes: Number of classes without the null label; ``None`` for a network without
            classes.
        num_times: Number of times per sample. With 1, ``t`` is ``(B,)``, otherwise
            ``(B, num_times)``.
        frequencies: Size of the sinusoid of each time, an even number of at least 2.
        time_scale: Radians of the fastest wave between ``t = 0`` and ``t = 1``, positive.

    Raises:
        ValueError: If a number is below 1, ``frequencies`` is odd, or ``time_scale`` not positive.
    """

    def __init__(
        self,
        width: int,
        num_classes: int | None = None,
        num_times: int = 1,
        frequencies: int = 256,
        time_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        check_integer(width, "width", 1)
        check_integer(num_times, "num_times", 1)
        check_even(frequencies, "frequencies")
        check_positive(time_scale, "time_scale")
        self.num_classes, self.frequencies, self.time_scale = num_classes, frequencies, time_scale
        self.inputs = nn.Linear(num_times * frequencies, width)
        self.outputs = nn.Linear(width, width)
        for layer in (self.inputs, self.outputs):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.labels = None
        if num_classes is not None:
            check_integer(num_classes, "num_classes", 1)
            self.labels = nn.Embedding(num_classes + 1, width)
            nn.init.normal_(self.labels.weight, std=0.02)

    def forward(self, t: Tensor, cond: Cond = None) -> Tensor:
        """Return ``c (B, width)`` for times ``(B,)`` or ``(B, num_times)`` and labels ``(B,)``."""
        labels = check_cond(cond, len(t), self.num_classes)
        waves = sinusoid(t.reshape(len(t), -1), self.frequencies, self.time_scale).flatten(1)
        c = self.outputs(F.silu(self.inputs(waves.to(self.inputs.weight.dtype))))
        if self.labels is None or labels is None:
            return c
        return c + look_up(self.labels.weight, labels)


def with_columns(state: Mapping[str, Tensor], name: str, at: int, count: int) -> dict[str, Tensor]:
    """Return weights of a network whose layer ``name`` takes ``count`` more inputs from ``at`` on.

    The new columns are 0: the new inputs have no effect.

    >>> with_columns({"weight": torch.ones(1, 2)}, "weight", at=1, count=1)
    {'weight': tensor([[1., 0., 1.]])}
    """
    weight = state[name]
    before, after = weight[:, :at], weight[:, at:]
    return {**state, name: torch.cat([before, weight.new_zeros(len(weight), count), after], 1)}


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return ``x·(1 + scale) + shift``, the affine part of adaptive layer normalization."""
    return x * (1 + scale) + shift


def modulation(cond_width: int, width: int, chunks: int) -> nn.Sequential:
    """Return a layer from ``c`` to ``chunks`` shifts, scales or gates, zero at the start.

    Source: adaLN-Zero of Peebles & Xie (2023), *Scalable Diffusion Models with Transformers*.
    """
    return nn.Sequential(nn.SiLU(), zeroed(nn.Linear(cond_width, chunks * width)))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Set weight and bias of a layer to zero, so that training starts from zero output."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
