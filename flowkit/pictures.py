"""Pictures for notebooks: tiles of samples, ways between two of them, and ways from noise.

The functions return images of Pillow or write GIF files; Jupyter shows the images as they are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowkit.checks import as_seeds, check_at_least, check_positive
from flowkit.metrics.pictures import tiles
from flowkit.provenance import write_atomically
from flowkit.sampling import Sampler, seeded_noise
from flowkit.types import Cond

if TYPE_CHECKING:
    from PIL.Image import Image


def show(
    images: Tensor,
    columns: int = 10,
    titles: Sequence[object] | None = None,
    rows: Sequence[object] | None = None,
    zoom: int | None = None,
) -> "Image":
    """Return images as tiles with gaps between them, and with words if you like.

    Args:
        images: Images ``(N, C, H, W)`` in [-1, 1] with 1 or 3 channels, on any device.
        columns: Tiles in a row, at least 1.
        titles: One text above each column, or above each tile; long ones are shortened.
        rows: One text before each row.
        zoom: Factor by which pixels are enlarged; None makes tiles of up to 64 pixels in width.

    Returns:
        The picture; ``.save("a.png")`` writes it.

    Raises:
        ValueError: If the images have another shape, or a list of texts another length.

    >>> show(torch.zeros(6, 1, 8, 8), columns=3, titles=["a", "b", "c"]).size
    (200, 146)
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be (N, 1 or 3, H, W), got {tuple(images.shape)}")
    check_at_least(columns, 1, "columns")
    if zoom is not None:
        check_at_least(zoom, 1, "zoom")
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    if titles is not None and len(titles) not in (columns, len(images)):
        raise ValueError(
            f"titles must hold {columns} texts, one per column, or {len(images)}, one per image, "
            f"got {len(titles)}"
        )
    if rows is not None and len(rows) != lines:
        raise ValueError(f"rows must hold {lines} texts, one per row, got {len(rows)}")
    return tiles(images, columns, zoom, titles or (), rows or ())


def slerp(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    """Return points of the great arc from one noise to another, which keep the length of noise.

    ``x(w) = (sin((1−w)θ) start + sin(wθ) end) / sin θ`` with the angle ``θ`` between the two. A
    straight line would pass through points shorter than noise, whose samples are dull.

    Source: Shoemake, *Animating rotation with quaternion curves*, 1985.

    Args:
        start: Noise of one sample ``(*)``.
        end: Noise of the other sample, of the same shape.
        weights: Places ``(n,)`` between them, 0 at the start and 1 at the end.

    Returns:
        Noise ``(n, *)``.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5]))
    tensor([[0.7071, 0.7071]])
    """
    a, b = start.double(), end.double()
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300)
    angle = torch.arccos(cosine.clamp(-1, 1))
    w = weights.double().to(a.device).reshape(-1, *[1] * a.ndim)
    if angle.sin() < 1e-6:  # the same direction, or the opposite, which has no arc of its own
        return ((1 - w) * a + w * b).to(start.dtype)
    return ((torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / angle.sin()).to(
        start.dtype
    )


@torch.no_grad()
def interpolate(
    module: Any,
    seeds: Sequence[int],
    steps: int = 8,
    cond: Cond | Sequence[str | int] = None,
    sampler: Sampler | None = None,
    guidance: Any = None,
) -> Tensor:
    """Return samples on the way between two samples, from arcs between their noises.

    Args:
        module: A trained `flowkit.modules.FlowModule`, for example of `load_run`.
        seeds: The seeds of the two samples.
        steps: Number of samples, both ends included, at least 2.
        cond: Condition of all samples ``(1, *)``, one for each ``(steps, *)``, or a
            list of names or of labels of classes.
        sampler: The solver; by default the module's own.
        guidance: Scale of classifier-free guidance, or a wrapper of velocities.

    Returns:
        Data ``(steps, *)``. The first and the last are those of ``module.sample`` with the seeds.

    Raises:
        ValueError: If there are not two seeds, or fewer than two steps.
    """
    check_at_least(steps, 2, "steps")
    start, end = seeded_noise(module.sample_shape, as_seeds(seeds, 2))
    noise = slerp(start, end, torch.linspace(0, 1, steps))
    noise[0], noise[-1] = start, end
    cond = module.as_cond(cond)
    if isinstance(cond, Tensor):
        cond = cond.expand(steps, *cond.shape[1:])
    return module.autoencoder.decode(module.solve(noise, sampler, cond, guidance).x)


@torch.no_grad()
def animate(
    module: Any,
    file: str | Path,
    num_samples: int = 10,
    cond: Cond | Sequence[str | int] = None,
    seeds: Sequence[int] | Tensor | None = None,
    sampler: Sampler | None = None,
    guidance: Any = None,
    columns: int = 10,
    seconds: float = 2.0,
) -> Path:
    """Write a GIF of the way of samples from noise to data.

    Args:
        module: A trained `flowkit.modules.FlowModule` of images.
        file: The GIF file, in a folder that exists.
        num_samples: Number of samples, at least 1.
        cond: Conditions ``(num_samples, *)``, or a list of names or of labels of classes.
        seeds: One seed per sample; by default 0, 1, 2, …
        sampler: The solver, whose grid gives the frames; by default the module's own.
        guidance: Scale of classifier-free guidance, or a wrapper of velocities.
        columns: Tiles in a row.
        seconds: Time of the way in seconds, above 0. The last frame stays a second longer.

    Returns:
        The file.

    Raises:
        ValueError: If a value is out of range, or the module makes no images.
    """
    check_at_least(num_samples, 1, "num_samples")
    check_positive(seconds, "seconds")
    numbers = as_seeds(range(num_samples) if seeds is None else seeds, num_samples)
    noise = seeded_noise(module.sample_shape, numbers)
    path = module.solve(noise, sampler, cond, guidance, return_path=True).path
    frames = [show(module.autoencoder.decode(state), columns) for state in path]
    each = round(1000 * seconds / len(frames))
    times = [each] * (len(frames) - 1) + [1000 + each]

    def write(partial: Path) -> None:
        frames[0].save(
            partial, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0
        )

    write_atomically(Path(file), write)
    return Path(file)
