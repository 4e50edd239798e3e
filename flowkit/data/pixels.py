"""Pixels of images between a model and its judge: files, sizes, channels."""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flowkit.checks import check_at_least, check_between, check_choice
from flowkit.data.broken import FORMATS
from flowkit.metrics.pictures import to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

FILTERS = ("lanczos", "bicubic", "bilinear", "box")
WITHOUT = ("bicubic", "bilinear")  # the filters that are also there without antialiasing


ORIENTED = frozenset({"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"})


def array_of(image: "Image", channels: int) -> np.ndarray:
    """Return the pixels of an opened image: ``(H, W)`` for one channel, ``(H, W, 3)`` for three.

    The image is turned upright by its EXIF orientation. Transparency is dropped.
    """
    from PIL import ImageOps

    image.load()
    if ORIENTED & image.info.keys() or image.format == "TIFF":  # to look for others takes time
        image = ImageOps.exif_transpose(image)
    mode = "L" if channels == 1 else "RGB"
    return np.asarray(image if image.mode == mode else image.convert(mode))


def pixels_of(image: "Image", channels: int) -> Tensor:
    """Return the pixels ``(channels, H, W)`` of an opened image, see `array_of`."""
    array = array_of(image, channels)
    return torch.from_numpy(array.reshape(*array.shape[:2], channels).copy()).permute(2, 0, 1)


def picture_of(pixels: Tensor) -> "Image":
    """Return pixels ``(1 or 3, H, W)`` of uint8 as an image of Pillow."""
    from PIL import Image

    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


@dataclass(frozen=True)
class Resize:
    """Central square of an image, resampled to ``size x size`` pixels.

    With antialiasing the filter of Pillow grows with the reduction, and the square is cropped as
    `flowkit.data.folder.square` does. Without it, a pixel is interpolated from its next neighbors
    only, whatever the reduction: this is ``interpolate`` of torch without ``antialias``, as feature
    networks and older evaluations have it. Distances differ between the two.

    Args:
        size: Side of the result in pixels.
        filter: ``"lanczos"``, ``"bicubic"``, ``"bilinear"`` or ``"box"``; without antialiasing
            ``"bicubic"`` or ``"bilinear"``.
        antialias: Whether the filter grows with the reduction.

    Raises:
        ValueError: If a value is out of range.

    >>> stripes = torch.tensor([200, 0, 0, 200]).byte().repeat(1, 8, 2)
    >>> Resize(2, "box")(stripes).tolist(), Resize(2, "bilinear", False)(stripes).tolist()
    ([[[100, 100], [100, 100]]], [[[0, 0], [0, 0]]])
    """

    size: int
    filter: str = "lanczos"
    antialias: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        check_at_least(self.size, 1, "resize")
        check_choice(self.filter, FILTERS if self.antialias else WITHOUT, "filter")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the resized pixels ``(C, size, size)`` of one image ``(C, H, W)`` of uint8."""
        from PIL import Image, ImageOps

        if self.antialias:
            method, size = Image.Resampling[self.filter.upper()], (self.size, self.size)
            return pixels_of(ImageOps.fit(picture_of(pixels), size, method=method), len(pixels))
        side = min(pixels.shape[1:])
        top, left = ((length - side) // 2 for length in pixels.shape[1:])
        middle = pixels[None, :, top : top + side, left : left + side].float()
        size = (self.size, self.size)
        resized = interpolate(middle, size, mode=self.filter, align_corners=False)
        return resized[0].round().clamp(0, 255).byte()

    def record(self) -> dict[str, Any]:
        """Return the resize as a record holds it."""
        return {"size": self.size, "filter": self.filter, "antialias": self.antialias}


def with_channels(pixels: Tensor, channels: int, name: str) -> Tensor:
    """Return images with 1 or 3 channels: gray as three equal ones, three equal ones as gray.

    Raises:
        ValueError: If images in color would lose their color.

    >>> with_channels(torch.zeros(2, 1, 4, 4).byte(), 3, "samples").shape
    torch.Size([2, 3, 4, 4])
    """
    if pixels.shape[1] == channels:
        return pixels
    if pixels.shape[1] == 1:
        return pixels.expand(-1, channels, -1, -1)
    if not bool(equal_channels(pixels).all()):
        raise ValueError(f"{name} must be gray like what they are compared with, got colors")
    return pixels[:, :1]


def equal_channels(pixels: Tensor) -> Tensor:
    """Return which images ``(B, C, H, W)`` have equal channels, ``(B,)``: those without color."""
    return (pixels == pixels[:, :1]).flatten(1).all(1)


def through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    """Return images ``(B, 1 or 3, H, W)`` of uint8 as they come back from JPEG files.

    The files are those of Pillow: colors have half of the resolution.

    Args:
        pixels: The images.
        quality: From 1 to 100.

    Raises:
        ValueError: If the quality is out of range.

    >>> plain = torch.full((1, 3, 16, 16), 77).byte()
    >>> torch.equal(through_jpeg(plain, 95), plain)
    True
    """
    from PIL import Image

    check_between(quality, 1, 100, "jpeg")
    found = []
    for one in pixels:
        file = io.BytesIO()
        picture_of(one).save(file, "JPEG", quality=quality)
        with Image.open(file, formats=FORMATS) as image:
            found.append(pixels_of(image, len(one)))
    return torch.stack(found) if found else pixels


def jpeg_quality(image: "Image") -> int | None:
    """Return the quality at which Pillow writes the tables of an opened JPEG file, or None."""
    from PIL import Image

    tables = getattr(image, "quantization", None) or {}
    for quality in range(100, 0, -1) if tables else ():
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
        with Image.open(file, formats=FORMATS) as other:
            if getattr(other, "quantization", {}).get(0) == tables.get(0):
                return quality
    return None


def as_seen(samples: Tensor, quantization: str = "round", jpeg: int | None = None) -> Tensor:
    """Return floats in [-1, 1] as bytes, by a rule and with a quality as JPEG files hold them.

    See `flowkit.metrics.to_uint8` and `through_jpeg`.
    """
    pixels = to_uint8(samples, quantization)
    return pixels if jpeg is None else through_jpeg(pixels, jpeg)
