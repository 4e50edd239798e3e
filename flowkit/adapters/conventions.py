"""Adapters of networks with reversed time, predicted noise or predicted data.

Some libraries share flowkit's time axis and predict velocities, but have another order of
arguments. Their networks need no adapter: ``lambda x, t, cond=None: net(t, x, cond)`` is a
velocity.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowkit.checks import at_least_float32, check_positive, expand_like
from flowkit.paths import Coefficients, Interpolant, Linear
from flowkit.types import Cond
from flowkit.velocity import Velocity

Network = Callable[[Tensor, Tensor, Cond], Tensor]
ZERO = 1e-12  # bound for a coefficient of 0: cos(πt/2) at t = 1 is only nearly 0


def from_reversed_time(network: Network, time_scale: float = 1.0) -> Velocity:
    """Adapt a rectified flow whose time is the noise level ``σ = 1 − t``.

    The equation is ``v(x, t, cond) = −network(x, s (1 − t), cond)``. Such networks predict
    ``noise − data`` along ``x = (1 − σ) data + σ noise``, so the data are at ``σ = 0`` and the
    noise is at ``σ = 1``. Examples are Stable Diffusion 3, FLUX and networks for diffusers'
    ``FlowMatchEulerDiscreteScheduler``.

    Args:
        network: Network with the call ``network(x, time, cond)``.
        time_scale: Scale ``s``, the time of the network at ``σ = 1``, positive; 1000 for timesteps
            of diffusers.

    Returns:
        The velocity.

    Raises:
        ValueError: If ``time_scale`` is not positive and finite.

    >>> import torch
    >>> def network(x, sigma, cond):  # for data that are all 3
    ...     return (x - 3) / sigma
    >>> from_reversed_time(network)(torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[4., 4.]])
    """
    check_positive(time_scale, "time_scale")

    def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``."""
        return -network(x, time_scale * (1 - t.to(at_least_float32(t.dtype))), cond)

    return velocity


def from_noise_prediction(
    network: Network,
    path: Interpolant = Linear(),
    time: Callable[[Tensor], Tensor] | None = None,
) -> Velocity:
    """Adapt a network that predicts the noise ``ε = E[x0 | x_t]``.

    The equation is ``v(x, t) = (a'/a) x + (b' − a' b / a) ε``. On a path ``x_t = a x1 + b x0``, the
    expected data are ``D = (x − b ε) / a``, and the velocity is ``v = a' D + b' ε``. At a time with
    ``a = 0``, which is ``t = 0`` on most paths, the prediction contains no information about the
    data; start the grid later. Denoising diffusion models belong to the path ``VP()``, whose grid
    may start at 0; at ``t = 1`` their velocity is unbounded.

    Args:
        network: Network with the call ``network(x, time(t), cond)``.
        path: Path of the network's training.
        time: Function from ``t (B,)`` to the time of the network, for example
            ``lambda t: 999 * (1 - t)`` for a diffusion model with 1000 steps. ``None`` means ``t``
            itself.

    Returns:
        The velocity. A call raises ``ValueError`` if ``a(t) = 0`` for a time, or if the derivative
        of a coefficient is unbounded there.

    Raises:
        ValueError: If the path adds noise.

    >>> import torch
    >>> velocity = from_noise_prediction(lambda x, t, cond: torch.zeros_like(x))
    >>> velocity(torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[2., 2.]])
    """
    check_noiseless(path)

    def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``."""
        a, b, da, db = coefficients(path, t, x)
        _refuse(a < ZERO, t, "noise", "start the grid later")
        _refuse(~torch.isfinite(da + db), t, "noise", "end the grid earlier, or use Euler steps")
        noise = network(x, t if time is None else time(t), cond)
        return (da * (x - b * noise) / a + db * noise).to(x.dtype)

    return velocity


def from_data_prediction(
    network: Network,
    path: Interpolant = Linear(),
    time: Callable[[Tensor], Tensor] | None = None,
) -> Velocity:
    """Adapt a network that predicts the data ``D = E[x1 | x_t]``.

    The equation is ``v(x, t) = (b'/b) x + (a' − a b' / b) D``. On a path ``x_t = a x1 + b x0``, the
    expected noise is ``ε = (x − a D) / b``, and the velocity is ``v = a' D + b' ε``. At a time with
    ``b = 0``, which is ``t = 1`` on most paths, the prediction contains no information about the
    noise. Euler steps to ``t = 1`` do not evaluate the network there. Other methods do, and
    inversions too: end their grids earlier.

    Args:
        network: Network with the call ``network(x, time(t), cond)``.
        path: Path of the network's training.
        time: Function from ``t (B,)`` to the time of the network; ``None`` means ``t`` itself.

    Returns:
        The velocity. A call raises ``ValueError`` if ``b(t) = 0`` for a time.

    Raises:
        ValueError: If the path adds noise.

    >>> import torch
    >>> velocity = from_data_prediction(lambda x, t, cond: torch.ones_like(x))
    >>> velocity(torch.zeros(1, 2), torch.tensor([0.5]))
    tensor([[2., 2.]])
    """
    check_noiseless(path)

    def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``."""
        a, b, da, db = coefficients(path, t, x)
        _refuse(b < ZERO, t, "data", "end the grid earlier, or use Euler steps")
        data = network(x, t if time is None else time(t), cond)
        return (da * data + db * (x - a * data) / b).to(x.dtype)

    return velocity


def check_noiseless(path: Interpolant) -> None:
    """Require a path without added noise."""
    if getattr(path, "sigma", None) != 0:
        raise ValueError(
            f"path must be a x1 + b x0 without added noise, got {path}; with added noise, the "
            "prediction is not the source"
        )


def coefficients(path: Interpolant, t: Tensor, x: Tensor) -> Coefficients:
    """Return the path's coefficients at ``t (B,)`` for states ``x (B, *)``, in float32 at least."""
    return path.coefficients(expand_like(t, x).to(at_least_float32(t.dtype)))


def _refuse(where: Tensor, t: Tensor, predicted: str, fix: str) -> None:
    """Raise an error if the condition ``where`` holds for a time."""
    if bool(where.any()):
        value = t[where.flatten()][0].item()
        raise ValueError(
            f"t must be a time at which predicted {predicted} determines the velocity, "
            f"got {value}; {fix}"
        )
