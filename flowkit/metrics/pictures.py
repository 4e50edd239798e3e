"""Pictures of samples: image grids and scatter plots."""

from pathlib import Path

import torch
from torch import Tensor

from flowkit.metrics.quantize import to_uint8


def save_picture(samples: Tensor, file: str | Path, columns: int = 10, zoom: int = 8) -> Path:
    """Save images ``(N, C, H, W)`` in [-1, 1] as one grid, or points ``(N, 2)`` as a scatter plot.

    Args:
        samples: Images of 1 or 3 channels, or points in the plane.
        file: A PNG file; its folder is made.
        columns: Images in a row.
        zoom: Small images are enlarged by whole pixels up to this factor.

    Raises:
        ValueError: If samples are neither.

    >>> import tempfile
    >>> save_picture(torch.zeros(3, 1, 8, 8), tempfile.mkdtemp() + "/a.png", columns=3).name
    'a.png'
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        _save_images(samples, file, columns, zoom)
    elif samples.ndim == 2 and samples.shape[1] == 2:
        _save_points(samples, file)
    else:
        raise ValueError(
            "samples must be images (N, 1 or 3, H, W) or points (N, 2), "
            f"got shape {tuple(samples.shape)}"
        )
    return file


def _save_images(samples: Tensor, file: Path, columns: int, zoom: int) -> None:
    from PIL import Image

    pixels = to_uint8(samples.detach().cpu())
    scale = max(1, min(zoom, 64 // pixels.shape[-1]))
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    (count, channels, height, width), gap = pixels.shape, 2
    rows = -(-count // columns)
    canvas = torch.full(
        (channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255
    ).byte()
    for k, image in enumerate(pixels):
        top, left = k // columns * (height + gap) + gap, k % columns * (width + gap) + gap
        canvas[:, top : top + height, left : left + width] = image
    array = canvas.permute(1, 2, 0).numpy()
    Image.fromarray(array[..., 0] if channels == 1 else array).save(file)


def _save_points(samples: Tensor, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    x, y = samples.detach().cpu().unbind(1)
    axes.scatter(x, y, s=3, alpha=0.5, linewidths=0)
    figure.savefig(file, dpi=120)
