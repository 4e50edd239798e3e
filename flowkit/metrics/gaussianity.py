"""Whether latents still look like the noise that a flow starts from."""

from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least


class Gaussianity(NamedTuple):
    """What `gaussianity` returns, per sample ``(B,)``.

    ``norm``: ``‖z‖ / √d``; 1 for noise. ``chi2``: how far ``‖z‖²`` lies from what is expected of
    χ² with ``d`` degrees of freedom, as a standard normal deviate. ``autocorrelation``: between
    neighbors; 0 for noise, with a standard deviation of about 1 over the root of their number.
    """

    norm: Tensor
    chi2: Tensor
    autocorrelation: Tensor


def gaussianity(z: Tensor) -> Gaussianity:
    """Compare latents ``z (B, *)`` with standard normal noise.

    An inversion under the wrong condition, or optimized beyond what the flow can express, leaves
    structure in ``z``: its norm is off, or neighboring values agree. The deviate is that of
    Wilson & Hilferty, *The Distribution of Chi-Square*, 1931; the autocorrelation is
    ``Σ z_i z_{i+1} / Σ z_i²``, averaged over the last two axes, if there are two.

    Args:
        z: Latents at ``t = 0``; later in time, neither norm nor correlation are those of noise.

    Raises:
        ValueError: If a sample has no two neighbors.

    >>> noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> [round(value.item(), 2) for value in gaussianity(noise)]
    [1.0, 0.76, -0.0]
    >>> [round(value.item(), 2) for value in gaussianity(noise.cumsum(-1) / 8)]
    [0.74, -49.33, 0.5]
    """
    axes = (-1, -2) if z.ndim > 3 else (-1,)
    check_at_least(min(z.shape[axis] for axis in axes), 2, "sides of z")
    dim = z[0].numel()
    mean_square = z.double().square().flatten(1).mean(1)
    spread = 2 / (9 * dim)
    chi2 = (mean_square ** (1 / 3) - (1 - spread)) / spread**0.5
    products = torch.stack([_neighbors(z.double(), axis) for axis in axes])
    return Gaussianity(mean_square.sqrt(), chi2, products.mean(0) / mean_square)


def _neighbors(z: Tensor, axis: int) -> Tensor:
    """Mean product of neighbors along an axis."""
    side = z.shape[axis] - 1
    return (z.narrow(axis, 0, side) * z.narrow(axis, 1, side)).flatten(1).mean(1)
