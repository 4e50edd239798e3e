"""Long signals by overlapping windows, and noise that belongs to frames."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_between
from flowkit.sampling import seeded_noise


def by_windows(
    function: Callable[[Tensor, int], Tensor], signal: Tensor, size: int, overlap: int
) -> Tensor:
    """Apply a function to overlapping windows of a signal, and cross-fade the results.

    The weights of a window rise and fall linearly over the overlap, and all weights at a frame sum
    to 1. So a signal that the function leaves as it is comes back as it was. The last window is
    filled with zeros, and cut.

    Args:
        function: Maps ``(B, C, size)`` and the first frame of the window to ``(B, D, size)``.
        signal: The signal ``(B, C, T)``, of any length.
        size: Frames of a window, at least 1.
        overlap: Frames that neighbors share, below ``size``.

    Returns:
        The result ``(B, D, T)``.

    Raises:
        ValueError: If a value is out of range, or the function changes the number of frames.

    >>> signal = torch.arange(10.0)[None, None]
    >>> by_windows(lambda part, start: 2 * part, signal, 4, 2)[0, 0, -3:]
    tensor([14., 16., 18.])
    """
    check_at_least(size, 1, "size")
    check_between(overlap, 0, size - 1, "overlap")
    length, step = signal.shape[-1], size - overlap
    check_at_least(length, 1, "frames of the signal")
    starts = range(0, max(1, length - overlap), step)
    padded = torch.nn.functional.pad(signal, (0, starts[-1] + size - length))
    ramp = (torch.arange(size, dtype=torch.float64) + 1) / (overlap + 1)
    fade = torch.minimum(ramp, ramp.flip(0)).clamp(max=1).to(signal.dtype).to(signal.device)
    total = padded.new_zeros(padded.shape[-1])
    parts = [function(padded[..., start : start + size], start) for start in starts]
    result = parts[0].new_zeros(*parts[0].shape[:-1], padded.shape[-1])
    for start, part in zip(starts, parts, strict=True):
        if part.shape[-1] != size:
            raise ValueError(f"function must keep {size} frames, got {part.shape[-1]}")
        result[..., start : start + size] += fade * part
        total[start : start + size] += fade
    return (result / total)[..., :length]


def frame_noise(channels: int, start: int, frames: int, seed: int = 0) -> Tensor:
    """Return normal noise ``(channels, frames)`` that belongs to the frames of a long signal.

    Frame ``k`` has the same noise in every window that holds it, so windows meet without seams.

    Args:
        channels: Values of a frame.
        start: Number of the first frame, at least 0.
        frames: Number of frames.
        seed: The seed of the signal.

    >>> whole = frame_noise(3, 0, 10)
    >>> bool((frame_noise(3, 4, 5) == whole[:, 4:9]).all())
    True
    """
    check_at_least(start, 0, "start")
    first = seed * 1_327_217_885 % 2**31 + start
    return seeded_noise((channels,), range(first, first + frames)).mT.contiguous()
