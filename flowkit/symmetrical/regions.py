"""Editing of a region: a callback of the sampler keeps all pixels outside of it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.sampling.ode import Callback


def put_back(x0: Tensor, x1: Tensor, region: Tensor) -> Callback:
    """Make a callback that keeps images outside of a region on the line from ``x0`` to ``x1``.

    After a step that ends at time ``t``, the callback sets what lies outside of the region to
    ``(1 − t) x0 + t x1``.

    Args:
        x0: The noise ``(B, C, h, w)`` from which the solve starts.
        x1: The images or latents ``(B, C, h, w)``. Outside of the region the solve ends at ``x1``
            exactly.
        region: Booleans ``(B, H, W)`` at the size of the images: True where the solve may change
            the image. A latent cell belongs to the region if one of its pixels does.

    Returns:
        A callback of a sampler, for states that begin with the images' channels.

    Raises:
        ValueError: If the region does not have one value per pixel.

    >>> x1, region = torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])
    >>> put_back(torch.zeros(1, 1, 1, 2), x1, region)(1, 0.25, torch.full((1, 1, 1, 2), 7.0))
    tensor([[[[7.0000, 0.2500]]]])
    """
    height, width = x1.shape[2:]
    if region.ndim != 3 or len(region) != len(x1) or region[0].numel() < height * width:
        raise ValueError(
            f"region must have shape (B, H, W), one value per pixel, got {tuple(region.shape)}"
        )
    cells = F.adaptive_max_pool2d(region.to(x1)[:, None], (height, width)) > 0

    def callback(step: int, t: float, state: Tensor) -> Tensor:
        image, rest = state[:, : x1.shape[1]], state[:, x1.shape[1] :]
        return torch.cat([torch.where(cells, image, torch.lerp(x0, x1, t)), rest], 1)

    return callback
