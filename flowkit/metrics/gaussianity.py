"""Test of latents against the standard normal noise at the start of a flow."""

from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least


class Gaussianity(NamedTuple):
    """Result of `gaussianity`: three tensors ``(B,)``, for latents of ``d`` elements.

    ``norm`` is ``‖z‖ / √d``; the expected value for noise is 1. ``chi2`` compares ``‖z‖²`` with the
    χ² distribution of ``d`` degrees of freedom, as a standard normal deviate; the expected value
    for noise is 0. ``autocorrelation`` is the correlation of neighboring elements; for noise its
    mean is 0 and its standard deviation is about 1 / √(number of pairs of neighbors).
    """

    norm: Tensor
    chi2: Tensor
    autocorrelation: Tensor


def gaussianity(z: Tensor) -> Gaussianity:
    """Compare latents ``z (B, *)`` with standard normal noise.

    An inversion with a wrong condition, or an optimization with too many steps, leaves structure
    in ``z``: its norm differs from √d, or neighboring elements correlate.

    With ``s = 2 / (9 d)``, ``chi2 = ((‖z‖² / d)^{1/3} − (1 − s)) / √s``. The autocorrelation is
    ``mean(z_i z_{i+1}) / mean(z_i²)``, for latents with height and width averaged over both axes.

    Source of the deviate: Wilson & Hilferty, *The Distribution of Chi-Square*, 1931.

    Args:
        z: Latents ``(B, *)`` at ``t = 0``. States at a later time are not expected to be noise.

    Returns:
        Three values for each sample, see `Gaussianity`.

    Raises:
        ValueError: If an axis of neighbors has fewer than two elements.

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
    """Return the mean product ``(B,)`` of neighbors along an axis."""
    side = z.shape[axis] - 1
    return (z.narrow(axis, 0, side) * z.narrow(axis, 1, side)).flatten(1).mean(1)
