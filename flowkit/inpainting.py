"""Inpainting: random holes, the condition of the flow, and the known pixels.

A mask ``(B, 1, H, W)`` is 1 in the hole and 0 where pixels are known.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.autoencoders import Autoencoder, FrozenAutoencoder, mean_latents
from flowkit.checks import check_at_least, check_choice


@dataclass(frozen=True)
class RandomMasks:
    """Random holes in images: boxes, irregular strokes, or a mix of both.

    The sides of a box are between an eighth and half of the sides of the image. A stroke is a
    broken line of 5 pieces with random turns. Its width is between 6 and 16 % of the smaller side
    of the image.

    Args:
        kind: ``"boxes"``, ``"strokes"``, or ``"mixed"``: each image gets one of the two kinds.
        most: Largest number of boxes or strokes, at least 1. The number is uniform in ``1…most``.

    Raises:
        ValueError: If ``kind`` or ``most`` is out of range.

    >>> mask = RandomMasks("boxes", most=1)(4, (16, 16), torch.Generator().manual_seed(0))
    >>> mask.shape, mask.unique().tolist()
    (torch.Size([4, 1, 16, 16]), [0.0, 1.0])
    """

    kind: str = "mixed"
    most: int = 3

    def __post_init__(self) -> None:
        check_choice(self.kind, ("boxes", "strokes", "mixed"), "kind")
        check_at_least(self.most, 1, "most")

    def __call__(
        self,
        batch: int,
        size: tuple[int, int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw masks ``(batch, 1, H, W)`` of floats, 1 in the hole and 0 elsewhere.

        Args:
            batch: Number of masks.
            size: Height and width ``(H, W)``.
            generator: Draws the masks.
            device: Device of the masks.
        """
        draw = _Draw(batch, size, self.most, generator, device)
        if self.kind == "boxes":
            return draw.boxes()
        if self.kind == "strokes":
            return draw.strokes()
        return torch.where(draw.uniform() < 0.5, draw.boxes(), draw.strokes())


class _Draw:
    """Random draws of one batch of masks. Lengths are shares of the image's sides."""

    def __init__(
        self,
        batch: int,
        size: tuple[int, int],
        most: int,
        generator: torch.Generator | None,
        device: torch.device | str | None,
    ) -> None:
        self.size, self.most, self.batch = size, most, batch
        self.options: dict[str, Any] = {"generator": generator, "device": device}
        # The centers of pixels along each side.
        self.y, self.x = (
            ((torch.arange(n, device=device) + 0.5) / n).reshape(shape)
            for n, shape in zip(size, ((1, 1, -1, 1), (1, 1, 1, -1)), strict=True)
        )
        count = torch.randint(1, most + 1, (batch, 1), **self.options)
        self.used = torch.arange(most, device=device) < count

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw one number in [low, high) for each mask, ``(B, 1, 1, 1)``."""
        return low + (high - low) * torch.rand(self.batch, 1, 1, 1, **self.options)

    def boxes(self) -> Tensor:
        """Draw masks ``(B, 1, H, W)`` of boxes."""
        mask = torch.zeros(self.batch, 1, *self.size, dtype=torch.bool, device=self.y.device)
        for k in range(self.most):
            inside = self.used[:, k, None, None, None]
            for axis, pixels in ((self.y, self.size[0]), (self.x, self.size[1])):
                side = self.uniform(0.125, 0.5).clamp(min=1 / pixels)
                start = self.uniform() * (1 - side)
                inside = inside & (axis >= start) & (axis < start + side)
            mask |= inside
        return mask.float()

    def strokes(self) -> Tensor:
        """Draw masks ``(B, 1, H, W)`` of strokes. Lengths are shares of the smaller side."""
        mask = torch.zeros(self.batch, 1, *self.size, dtype=torch.bool, device=self.y.device)
        scale = min(self.size)
        tall, wide = (n / scale for n in self.size)
        y, x = self.y * tall, self.x * wide
        for k in range(self.most):
            used = self.used[:, k, None, None, None]
            # The width is at least the diagonal of a pixel, so that every stroke covers a pixel.
            width = self.uniform(0.06, 0.16).clamp(min=1.5 / scale)
            heading = self.uniform(0, 2 * math.pi)
            top, left = self.uniform() * tall, self.uniform() * wide
            for _ in range(5):
                length = self.uniform(0.1, 0.3)
                down = (top + length * heading.sin()).clamp(0, tall)
                right = (left + length * heading.cos()).clamp(0, wide)
                near = _distance_to_piece(y, x, (top, left), (down, right)) <= width / 2
                mask |= near & used
                top, left = down, right
                heading = heading + self.uniform(-1.2, 1.2)
        return mask.float()


def _distance_to_piece(
    y: Tensor, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Tensor:
    """Compute the distance of points ``(y, x)`` to the line segment between two points."""
    (y0, x0), (dy, dx) = start, (end[0] - start[0], end[1] - start[1])
    along = ((y - y0) * dy + (x - x0) * dx) / (dy.square() + dx.square()).clamp(min=1e-12)
    along = along.clamp(0, 1)
    return torch.hypot(y - y0 - along * dy, x - x0 - along * dx)


RESIZES = ("max", "nearest")


def inpainting_cond(
    autoencoder: Autoencoder, images: Tensor, mask: Tensor, resize: str = "max"
) -> dict[str, Tensor]:
    """Compute the condition of a flow that fills holes, see `flowkit.nn.Inpainting`.

    A latent cell stands for a square of pixels. With ``resize="max"`` the cell is in the hole if
    one of its pixels is, so that the flow may change every pixel of the hole. The paper takes the
    nearest pixel instead, ``resize="nearest"``: of `RandomMasks` at 64x64 pixels with 8x8 pixels
    per cell, 36 % of the hole's pixels then count as known.

    Source: Dao et al., *Flow Matching in Latent Space*, 2023 (arXiv 2307.08698), section 4.3. The
    paper draws the latents of the masked image from the posterior. Here they are its mean, since a
    condition needs no noise.

    Args:
        autoencoder: The autoencoder of the flow.
        images: Images ``(B, C, H, W)`` in [-1, 1]. Pixels in the hole have no effect.
        mask: Masks ``(B, 1, H, W)``, 1 in the hole and 0 elsewhere.
        resize: ``"max"`` or ``"nearest"``. A network needs the way of its training.

    Returns:
        ``masked``, the latents ``(B, c, h, w)`` of the images with a gray hole, and ``mask``
        ``(B, 1, h, w)``, the masks of the latent cells, with values -1 (known) and 1 (hole).

    Raises:
        ValueError: If the mask has another size or other values, or ``resize`` is another word.

    >>> from flowkit.autoencoders import Identity
    >>> images, mask = torch.ones(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    >>> cond = inpainting_cond(Identity(), images, mask)
    >>> cond["masked"].flatten().tolist(), cond["mask"].flatten().tolist()
    ([1.0, 0.0, 1.0, 1.0], [-1.0, 1.0, -1.0, -1.0])
    """
    check_holes(mask, images)
    check_choice(resize, RESIZES, "resize")
    hidden = torch.where(mask > 0, 0.0, images)
    masked = mean_latents(autoencoder, hidden)
    mask = mask.to(images.dtype)
    if isinstance(autoencoder, FrozenAutoencoder):
        mask = autoencoder.pad(mask)
    cells = (masked.shape[-2], masked.shape[-1])
    if resize == "max":
        small = F.adaptive_max_pool2d(mask, cells)
    else:
        small = F.interpolate(mask, cells, mode="nearest")
    return {"masked": masked, "mask": 2 * small - 1}


def paste_back(samples: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Replace the known pixels of samples by those of images, exactly.

    Args:
        samples: Samples ``(B, C, H, W)``.
        images: Images ``(B, C, H, W)``.
        mask: Masks ``(B, 1, H, W)``, 1 in the hole and 0 at known pixels.

    Returns:
        ``samples`` in the hole, ``images`` elsewhere.

    Raises:
        ValueError: If the mask has another size or other values.

    >>> paste_back(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.tensor([[[[0, 1]]]]))
    tensor([[[[0., 1.]]]])
    """
    check_holes(mask, images)
    return torch.where(mask > 0, samples, images)


def check_holes(mask: Tensor, images: Tensor) -> None:
    """Require a mask ``(B, 1, H, W)`` of zeros and ones for images ``(B, C, H, W)``.

    Raises:
        ValueError: If the mask has another shape or other values.
    """
    expected = (len(images), 1, *images.shape[-2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        low, high = (v.item() for v in torch.aminmax(mask))
        raise ValueError(
            f"mask must hold 0 (known) and 1 (hole) alone, got values in [{low}, {high}]"
        )
