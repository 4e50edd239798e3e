"""Networks of other conventions as velocities: reversed times, predicted noise, predicted data.

Libraries that share the time axis and predict velocities, but order their arguments otherwise, need
no adapter: ``lambda x, t, cond=None: net(t, x, cond)`` is a velocity.
"""

from collections.abc import Callable

from torch import Tensor

from flowkit.checks import check_positive, expand_like
from flowkit.paths import Interpolant, Linear
from flowkit.types import Cond
from flowkit.velocity import Velocity

Network = Callable[[Tensor, Tensor, Cond], Tensor]
ZERO = 1e-12  # VP keeps its b above 0 by less


def from_reversed_time(network: Network, time_scale: float = 1.0) -> Velocity:
    """A rectified flow whose time is the noise level: ``v(x, t) = −network(x, s (1 − t), cond)``.

    Such networks predict ``noise − data`` along ``x = (1 − σ) data + σ noise``, with data at
    ``σ = 0`` and noise at ``σ = 1``: Stable Diffusion 3, FLUX and diffusers'
    ``FlowMatchEulerDiscreteScheduler``.

    Args:
        network: Called as ``network(x, time, cond)``.
        time_scale: ``s``, the network's time at ``σ = 1``; 1000 for diffusers' timesteps.

    Raises:
        ValueError: If the scale is not positive.

    >>> import torch
    >>> def network(x, sigma, cond):  # of data that are all 3
    ...     return (x - 3) / sigma
    >>> from_reversed_time(network)(torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[4., 4.]])
    """
    check_positive(time_scale, "time_scale")

    def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        return -network(x, time_scale * (1 - t), cond)

    return velocity


def from_noise_prediction(
    network: Network,
    path: Interpolant = Linear(),
    time: Callable[[Tensor], Tensor] | None = None,
) -> Velocity:
    """A network of ``ε = E[x0 | x_t]``: ``v(x, t) = (a'/a) x + (b' − a' b / a) ε``.

    With ``x_t = a x1 + b x0`` the expected data are ``(x − b ε) / a``, and ``v`` is ``a'`` times
    these and ``b' ε``. Where ``a = 0``, at ``t = 0`` of most paths, the state is the noise and
    its prediction says nothing of the data: start the grid later. Denoising diffusion models are
    of the path ``VP()``, which may start at 0.

    Args:
        network: Called as ``network(x, time(t), cond)``.
        path: The path that it was trained on.
        time: What the network takes for ``t (B,)``, say ``lambda t: 999 * (1 - t)`` for a
            diffusion model of 1000 steps; None is ``t`` itself.

    Raises:
        ValueError: If the path adds noise of its own; when called, if ``a(t) = 0`` for some ``t``.

    >>> import torch
    >>> velocity = from_noise_prediction(lambda x, t, cond: torch.zeros_like(x))
    >>> velocity(torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[2., 2.]])
    """
    _check_noiseless(path)

    def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        a, b, da, db = path.coefficients(expand_like(t, x))
        _refuse(a < ZERO, t, "noise", "start the grid later")
        noise = network(x, t if time is None else time(t), cond)
        return (da * (x - b * noise) / a + db * noise).to(x.dtype)

    return velocity


def from_data_prediction(
    network: Network,
    path: Interpolant = Linear(),
    time: Callable[[Tensor], Tensor] | None = None,
) -> Velocity:
    """A network of ``D = E[x1 | x_t]``: ``v(x, t) = (b'/b) x + (a' − a b' / b) D``.

    The expected noise is ``(x − a D) / b``, and ``v`` is ``a' D`` and ``b'`` times it. Where
    ``b = 0``, at ``t = 1`` of most paths, the state is the data and their prediction says nothing
    of the noise. Euler steps to ``t = 1`` do not ask there; methods that do, and inversions, need
    a grid that ends before.

    Args:
        network: Called as ``network(x, time(t), cond)``.
        path: The path that it was trained on.
        time: What the network takes for ``t (B,)``; None is ``t`` itself.

    Raises:
        ValueError: If the path adds noise of its own; when called, if ``b(t) = 0`` for some ``t``.

    >>> import torch
    >>> velocity = from_data_prediction(lambda x, t, cond: torch.ones_like(x))
    >>> velocity(torch.zeros(1, 2), torch.tensor([0.5]))
    tensor([[2., 2.]])
    """
    _check_noiseless(path)

    def velocity(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        a, b, da, db = path.coefficients(expand_like(t, x))
        _refuse(b < ZERO, t, "data", "end the grid earlier, or take Euler steps to it")
        data = network(x, t if time is None else time(t), cond)
        return (da * data + db * (x - a * data) / b).to(x.dtype)

    return velocity


def _check_noiseless(path: Interpolant) -> None:
    if getattr(path, "sigma", None) != 0:
        raise ValueError(
            f"path must be a x1 + b x0 without noise of its own, got {path}; what would be "
            "predicted is not the source"
        )


def _refuse(where: Tensor, t: Tensor, predicted: str, fix: str) -> None:
    if bool(where.any()):
        value = t[where.flatten()][0].item()
        raise ValueError(
            f"t must lie where predicted {predicted} determine the velocity, got {value}; {fix}"
        )
