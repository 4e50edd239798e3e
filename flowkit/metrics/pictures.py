"""Pictures of samples as files: grids of images, scatter plots and histograms."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowkit.checks import check_choice, check_finite
from flowkit.provenance import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

QUANTIZATIONS = ("round", "floor", "truncate")  # rules from floats to bytes, see `to_uint8`


def save_picture(
    samples: Tensor,
    file: str | Path,
    columns: int = 10,
    zoom: int = 8,
    beside: Tensor | None = None,
    captions: Sequence[str] | None = None,
) -> Path:
    """Save images as one picture in rows and columns, or points as a plot.

    Images with other than 1 or 3 channels are shown as the mean of their channels. Sequences are
    shown as images of time to the right and channels upwards, dark for the smallest value of all.
    Points are shown by their first two coordinates, and points of one coordinate by a histogram.

    Args:
        samples: Images ``(N, C, H, W)`` in [-1, 1], sequences ``(N, C, T)`` or points ``(N, d)``.
        file: The PNG file. Its folder is created if it does not exist.
        columns: Number of images in a row.
        zoom: Largest integer factor by which small images are enlarged.
        beside: Real points ``(M, *)``, for a second plot in the same range.
        captions: A name for each image, above it. If all images of each column have one name, it
            stands at the top of the column alone.

    Returns:
        The file.

    Raises:
        ValueError: If an image holds NaN or infinity.

    >>> import tempfile
    >>> save_picture(torch.zeros(3, 1, 8, 8), tempfile.mkdtemp() + "/a.png", columns=3).name
    'a.png'
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    if samples.ndim == 3 and beside is None:
        check_finite(samples, "samples")
        low, high = samples.aminmax()
        samples = (2 * (samples - low) / (high - low).clamp_min(1e-12) - 1).flip(1)[:, None]
    if samples.ndim == 4:
        shown = samples if samples.shape[1] in (1, 3) else samples.mean(1, keepdim=True)
        names = [] if captions is None else list(captions)[: len(samples)]
        by_column = all(name == names[k % columns] for k, name in enumerate(names))
        names = names[:columns] if by_column else names
        _save(tiles(shown, columns, max(1, min(zoom, SIDE // shown.shape[-1])), names), file)
    else:
        real = {} if beside is None else {"real": beside}
        _save_points({"generated": samples, **real}, file)
    return file


LINE, SIZES, GAP, SIDE = 12, (10, 9, 8, 7), 2, 64  # pixels: of a line of words, fonts, gaps, tiles


def tiles(
    images: Tensor,
    columns: int,
    zoom: int | None = None,
    titles: Sequence[object] = (),
    rows: Sequence[object] = (),
) -> "Picture":
    """Return images as tiles with white gaps between them, and with words if you like.

    Words that are wider than an image get a smaller font, and then an ellipsis.

    Args:
        images: Images ``(N, 1 or 3, H, W)`` in [-1, 1], at least one.
        columns: Images in a row, at most.
        zoom: Factor by which images are enlarged; None: to 64 pixels in width, at most.
        titles: A text above each column, or more texts, each above an image.
        rows: A text before each row.

    Returns:
        The picture, in gray levels if the images have one channel.

    Raises:
        ValueError: If an image holds NaN or infinity.
    """
    from PIL import Image, ImageDraw

    pixels = to_uint8(images.detach().cpu())
    zoom = max(1, SIDE // pixels.shape[-1]) if zoom is None else zoom
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    (count, channels, height, width), fonts = pixels.shape, _fonts()
    columns = min(columns, count)
    head, line = (0, LINE) if len(titles) > columns else (LINE * bool(titles), 0)
    before = [math.ceil(fonts[0].getlength(_one_line(row))) + GAP for row in rows]
    tall, wide, start = line + height + GAP, width + GAP, max(before, default=0)
    places = [
        (head + k // columns * tall + line + GAP, start + k % columns * wide + GAP)
        for k in range(count)
    ]
    size = (head + -(-count // columns) * tall + GAP, start + columns * wide + GAP)
    canvas = torch.full((channels, *size), 255).byte()
    for image, (top, left) in zip(pixels, places, strict=True):
        canvas[:, top : top + height, left : left + width] = image
    array = canvas.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    draw = ImageDraw.Draw(picture)
    for title, (top, left) in zip(titles, places, strict=False):
        text, font = _fitted(_one_line(title), width, fonts)
        draw.text((left + width / 2, top - 1), text, fill=0, font=font, anchor="md")
    for row, (top, _) in zip(rows, places[::columns], strict=False):
        middle = (GAP, top + height / 2)
        draw.text(middle, _one_line(row), fill=0, font=fonts[0], anchor="lm")
    return picture


def _fonts() -> list[Any]:
    """Return fonts for words, from large to small."""
    import matplotlib
    from PIL import ImageFont

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return [ImageFont.truetype(file, size) for size in SIZES]


def _one_line(words: object) -> str:
    return " ".join(str(words).split())


def _fitted(text: str, width: int, fonts: Sequence[Any]) -> tuple[str, Any]:
    """Return a text no wider than ``width`` pixels, and its font."""
    font = next((font for font in fonts if font.getlength(text) <= width), fonts[-1])
    while len(text) > 1 and font.getlength(text) > width:
        text = text.removesuffix("…")[:-1] + "…"
    return text, font


def save_image(pixels: Any, file: Path) -> None:
    """Write bytes ``(H, W)`` or ``(H, W, 3)`` of NumPy as a PNG file, whose folder must exist."""
    from PIL import Image

    _save(Image.fromarray(pixels), file)


def _save(picture: "Picture", file: Path) -> None:
    """Write a picture as a PNG file."""
    write_atomically(file, lambda partial: picture.save(partial, "PNG"))


def save_figure(figure: Any, file: Path, dpi: int = 120) -> None:
    """Write a figure of matplotlib as a PNG file, whose folder must exist."""
    write_atomically(file, lambda partial: figure.savefig(partial, format="png", dpi=dpi))


def _save_points(sets: dict[str, Tensor], file: Path) -> None:
    """Save sets of points ``(N, *)``: histograms of one coordinate, else scatter plots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(sets), 4), layout="constrained")
    plots = figure.subplots(1, len(sets), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (name, points) in zip(plots, sets.items(), strict=True):
        coordinates = points.flatten(1).detach().float().cpu().mT
        if len(coordinates) == 1:
            axes.hist(coordinates[0], bins=50, density=len(sets) > 1)
        else:
            axes.set_aspect("equal")
            axes.scatter(*coordinates[:2], s=3, alpha=0.5, linewidths=0)
        if len(sets) > 1:
            axes.set_title(f"{name}, {len(points):,} points")
    save_figure(figure, file)


def colored(masks: Tensor, num_classes: int) -> Tensor:
    """Convert masks ``(B, H, W)`` to color images ``(B, 3, H, W)`` in [-1, 1].

    Class 0 and labels outside ``[0, num_classes)`` are black. The colors repeat after 20 classes.

    Args:
        masks: Labels ``(B, H, W)`` of int64.
        num_classes: Number of classes.

    >>> colored(torch.tensor([[[0, 1]]]), num_classes=2)[0, :, 0, 0]
    tensor([-1., -1., -1.])
    """
    from matplotlib import colormaps

    palette = torch.zeros(num_classes + 1, 3)
    for k in range(1, num_classes):
        palette[k] = torch.tensor(colormaps["tab20"](k % 20)[:3])
    inside = (masks >= 0) & (masks < num_classes)
    return 2 * palette[masks.where(inside, num_classes)].movedim(-1, 1) - 1


def to_uint8(images: Tensor, rule: str = "round") -> Tensor:
    """Map [-1, 1] to 0...255: ``round(127.5 (x + 1))`` after clamping, halves to even.

    The inverse is `from_uint8`. Other programs have other rules, so their numbers differ a little:
    ``"floor"`` is ``floor(127.5 x + 128)``, which differs only at ties, and ``"truncate"`` is
    ``trunc(255 (x + 1) / 2)``, which darkens images by half a gray level on average.

    Args:
        images: Floats ``(B, *)`` in [-1, 1]. Values outside are clamped.
        rule: ``"round"``, ``"floor"`` or ``"truncate"``.

    Returns:
        Bytes of the same shape.

    Raises:
        TypeError: If ``images`` does not hold floats.
        ValueError: If ``images`` holds NaN or infinity, or the rule is another word.

    >>> to_uint8(torch.tensor([-1.2, -1.0, 0.001, 1.0]))
    tensor([  0,   0, 128, 255], dtype=torch.uint8)
    >>> [to_uint8(torch.tensor([-1.0, 0.0, 0.999]), rule).tolist() for rule in QUANTIZATIONS]
    [[0, 128, 255], [0, 128, 255], [0, 127, 254]]
    """
    check_choice(rule, QUANTIZATIONS, "quantization")
    if not images.is_floating_point():
        raise TypeError(f"images must be a floating-point tensor in [-1, 1], got {images.dtype}")
    check_finite(images, "images")
    # Half precision is too coarse for 256 levels after the shift to [0, 2].
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    wide = wide.clamp(-1, 1)
    if rule == "floor":
        return wide.mul(127.5).add(128).floor().clamp(0, 255).to(torch.uint8)
    scaled = wide.add(1).mul(127.5)
    return (scaled.round() if rule == "round" else scaled.trunc()).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Map gray levels 0...255 to float32 in [-1, 1]: ``x / 127.5 - 1``.

    It is the inverse of `to_uint8` on all 256 levels.

    Args:
        pixels: Gray levels of any shape and type.

    Returns:
        A new tensor of the same shape.

    >>> from_uint8(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([-1.0000, -0.6000,  1.0000])
    """
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1)


def as_saved(images: Tensor) -> Tensor:
    """Round images to the 256 levels of an 8-bit file, as writing and reading the file does.

    Args:
        images: Floats in [-1, 1], or bytes, of any shape.

    Returns:
        Float32 in [-1, 1], of the same shape.

    Raises:
        TypeError: If ``images`` holds neither floats nor bytes.
        ValueError: If ``images`` holds NaN or infinity.

    >>> as_saved(torch.tensor([0.0, 2.0]))
    tensor([0.0039, 1.0000])
    """
    return from_uint8(images if images.dtype == torch.uint8 else to_uint8(images))
