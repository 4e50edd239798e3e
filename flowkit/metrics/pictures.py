"""Pictures of samples: image grids and scatter plots."""

from pathlib import Path

import torch
from torch import Tensor

from flowkit.metrics.quantize import to_uint8


def save_picture(samples: Tensor, file: str | Path, columns: int = 10, zoom: int = 8) -> Path:
    """Save images ``(N, C, H, W)`` in [-1, 1] as one grid, or points ``(N, *)`` as a plot.

    Images of neither 1 nor 3 channels are shown by their mean over channels, points by their first
    two coordinates, numbers by a histogram.

    Args:
        samples: Images or points.
        file: A PNG file; its folder is made.
        columns: Images in a row.
        zoom: Small images are enlarged by whole pixels up to this factor.

    >>> import tempfile
    >>> save_picture(torch.zeros(3, 1, 8, 8), tempfile.mkdtemp() + "/a.png", columns=3).name
    'a.png'
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if samples.ndim == 4:
        shown = samples if samples.shape[1] in (1, 3) else samples.mean(1, keepdim=True)
        _save_images(shown, file, columns, zoom)
    else:
        _save_points(samples.flatten(1), file)
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
    axes, coordinates = figure.add_subplot(), samples.detach().cpu().mT
    if len(coordinates) == 1:
        axes.hist(coordinates[0], bins=50)
    else:
        axes.set_aspect("equal")
        axes.scatter(*coordinates[:2], s=3, alpha=0.5, linewidths=0)
    figure.savefig(file, dpi=120)
