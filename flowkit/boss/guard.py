"""The test that a grid is better than the uniform grid."""

import torch
from torch import Tensor

LEVEL = 0.05  # probability that a grid wins although it is worse than the uniform grid
RESAMPLES = 999


def is_gain(gains: Tensor, level: float, generator: torch.Generator) -> bool:
    """Test whether the mean of gains is positive, by the bootstrap-t method.

    With the mean ``m`` and the standard error ``e`` of the gains, and with ``m*``, ``e*`` of a
    bootstrap sample, the one-sided p-value is the share of ``(m* − m) / e* >= m / e``. In contrast
    to a t-test it follows the skewness of the gains: a grid that is a little better for most
    samples may be much worse for a few.

    Args:
        gains: Decrease ``(n,)`` of the squared error of each sample.
        level: Largest p-value of a gain.
        generator: Source of the bootstrap samples.

    Source: Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 16.
    """
    mean, error = gains.mean(), gains.std()
    if not mean > 0:  # also if the solves of some samples are not finite
        return False
    if error == 0:
        return True
    beyond, count, device = 0, len(gains), generator.device
    for _ in range(RESAMPLES):
        rows = torch.randint(count, (count,), generator=generator, device=device)
        sample = gains[rows.cpu()]
        # Multiplied out, since the standard deviation of a bootstrap sample may be 0.
        beyond += bool((sample.mean() - mean) * error >= mean * sample.std())
    return (beyond + 1) / (RESAMPLES + 1) <= level


def is_noise(x: Tensor) -> bool:
    """Return whether states ``(B, *)`` pass for standard normal noise.

    Their mean, their mean square, and the variance of ``‖x‖²`` must be within five standard errors
    of the values of standard normal noise, 0, 1 and ``2 d``.
    """
    x = x.double().flatten(1)
    count, size = x.shape
    energy = x.square().sum(1)
    deviations = (
        x.mean() * (count * size) ** 0.5,
        (energy.mean() / size - 1) * (count * size / 2) ** 0.5,
        (energy.var() / (2 * size) - 1) * (count / (2 + 12 / size)) ** 0.5,
    )
    return all(bool(abs(deviation) <= 5) for deviation in deviations)
