"""From images in [-1, 1] to bytes: the only place that quantises."""

import torch
from torch import Tensor

from flowkit.checks import check_finite


def to_uint8(images: Tensor) -> Tensor:
    """Map [-1, 1] to 0...255: ``round(127.5 (x + 1))`` after clamping, halves to even.

    Rounding, where truncation would darken images by half a grey level on average. The inverse
    is ``x / 127.5 - 1``, exact on all 256 levels from float32 on.

    Args:
        images: Floats ``(B, *)`` in [-1, 1]; what lies outside is clamped.

    Returns:
        Bytes of the same shape.

    Raises:
        TypeError: If ``images`` does not hold floats.
        ValueError: If ``images`` holds NaN or infinity.

    >>> to_uint8(torch.tensor([-1.2, -1.0, 0.001, 1.0]))
    tensor([  0,   0, 128, 255], dtype=torch.uint8)
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be a floating-point tensor in [-1, 1], got {images.dtype}")
    check_finite(images, "images")
    # Half precision cannot hold 255 levels around 0 and 1 once shifted.
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return wide.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
