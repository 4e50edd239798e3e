"""Inpainting: random holes, the condition that a flow sees, and the pixels that are known.

A mask ``(B, 1, H, W)`` is 1 in the hole and 0 where pixels are known.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.autoencoders import Autoencoder, KLAutoencoder, mean_latents
from flowkit.checks import check_at_least, check_choice


@dataclass(frozen=True)
class RandomMasks:
    """Random holes: boxes, irregular strokes, or for each image one of the two.

    Boxes have sides between an eighth and half of the image's. A stroke is a broken line of 5
    pieces that turns as it goes, between 6 and 16 % of the image's smaller side wide.

    Args:
        kind: ``"boxes"``, ``"strokes"`` or ``"mixed"``.
        most: The number of boxes or strokes is uniform in ``1…most``.

    >>> mask = RandomMasks("boxes", most=1)(4, (16, 16), torch.Generator().manual_seed(0))
    >>> mask.shape, mask.unique().tolist()
    (torch.Size([4, 1, 16, 16]), [0.0, 1.0])
    """

    kind: str = "mixed"
    most: int = 3

    def __post_init__(self):
        check_choice(self.kind, ("boxes", "strokes", "mixed"), "kind")
        check_at_least(self.most, 1, "most")

    def __call__(
        self,
        batch: int,
        size: tuple[int, int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw masks ``(batch, 1, *size)`` of floats."""
        draw = _Draw(batch, size, self.most, generator, device)
        if self.kind == "boxes":
            return draw.boxes()
        if self.kind == "strokes":
            return draw.strokes()
        return torch.where(draw.uniform() < 0.5, draw.boxes(), draw.strokes())


class _Draw:
    """The draws of one batch of masks, in units of the image's sides."""

    def __init__(self, batch, size, most, generator, device):
        self.size, self.most, self.batch = size, most, batch
        self.options = {"generator": generator, "device": device}
        # Pixel centers, and how many pixels a unit is along each side.
        self.y, self.x = (
            ((torch.arange(n, device=device) + 0.5) / n).reshape(shape)
            for n, shape in zip(size, ((1, 1, -1, 1), (1, 1, 1, -1)), strict=True)
        )
        count = torch.randint(1, most + 1, (batch, 1), **self.options)
        self.used = torch.arange(most, device=device) < count

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """One number ``(B, 1, 1, 1)`` for each mask."""
        return low + (high - low) * torch.rand(self.batch, 1, 1, 1, **self.options)

    def boxes(self) -> Tensor:
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
        mask = torch.zeros(self.batch, 1, *self.size, dtype=torch.bool, device=self.y.device)
        scale = min(self.size)
        tall, wide = (n / scale for n in self.size)
        y, x = self.y * tall, self.x * wide
        for k in range(self.most):
            used = self.used[:, k, None, None, None]
            # At least the diagonal of a pixel, so that every stroke covers one.
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


def _distance_to_piece(y: Tensor, x: Tensor, start, end) -> Tensor:
    """Distance of points ``(y, x)`` to the straight piece between two points."""
    (y0, x0), (dy, dx) = start, (end[0] - start[0], end[1] - start[1])
    along = ((y - y0) * dy + (x - x0) * dx) / (dy.square() + dx.square()).clamp(min=1e-12)
    along = along.clamp(0, 1)
    return torch.hypot(y - y0 - along * dy, x - x0 - along * dx)


def inpainting_cond(autoencoder: Autoencoder, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What a flow on latents is told of an image with a hole; see `flowkit.nn.Inpainting`.

    Source: Dao et al., *Flow Matching in Latent Space*, 2023 (arXiv 2307.08698), section 4.3. It
    differs in that the posterior of the masked image is not drawn from: a condition needs no
    noise.

    Args:
        autoencoder: The flow's.
        images: ``(B, C, H, W)`` in [-1, 1]; what lies in the hole does not matter.
        mask: ``(B, 1, H, W)``, 1 in the hole, 0 elsewhere.

    Returns:
        ``masked``, the latents ``(B, c, h, w)`` of the images with a gray hole, and ``mask``
        ``(B, 1, h, w)``, resized by nearest neighbor, with values -1 and 1.

    Raises:
        ValueError: If the mask has another size or other values.

    >>> from flowkit.autoencoders import Identity
    >>> images, mask = torch.ones(1, 1, 2, 2), torch.tensor([[[[0.0, 1.0], [0.0, 0.0]]]])
    >>> cond = inpainting_cond(Identity(), images, mask)
    >>> cond["masked"].flatten().tolist(), cond["mask"].flatten().tolist()
    ([1.0, 0.0, 1.0, 1.0], [-1.0, 1.0, -1.0, -1.0])
    """
    check_mask(mask, images)
    hidden = torch.where(mask > 0, 0.0, images)
    masked = mean_latents(autoencoder, hidden)
    if isinstance(autoencoder, KLAutoencoder):
        mask = autoencoder.pad(mask)
    small = F.interpolate(mask.to(images.dtype), tuple(masked.shape[-2:]), mode="nearest")
    return {"masked": masked, "mask": 2 * small - 1}


def paste_back(samples: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Return samples ``(B, C, H, W)`` with the pixels of ``images`` where ``mask`` is 0, exactly.

    >>> paste_back(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.tensor([[[[0, 1]]]]))
    tensor([[[[0., 1.]]]])
    """
    check_mask(mask, images)
    return torch.where(mask > 0, samples, images)


def check_mask(mask: Tensor, images: Tensor) -> None:
    """Require a mask ``(B, 1, H, W)`` of zeros and ones for images ``(B, C, H, W)``."""
    expected = (len(images), 1, *images.shape[-2:])
    if tuple(mask.shape) != expected:
        raise ValueError(f"mask must have shape {expected}, got {tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        low, high = (v.item() for v in torch.aminmax(mask))
        raise ValueError(
            f"mask must hold 0 (known) and 1 (hole) alone, got values in [{low}, {high}]"
        )
