"""Networks that predict data or noise, as velocities that are trained."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowkit.adapters.conventions import check_noiseless, coefficients
from flowkit.checks import check_number
from flowkit.paths import Interpolant, Linear
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, Velocity, bind


class _Prediction(nn.Module, ABC):
    """A network that predicts one end of a path, as a velocity."""

    end: int  # the coefficient that must not be small: 0 is a, of the data, 1 is b, of the noise

    def __init__(self, net: nn.Module, path: Interpolant = Linear(), min_gap: float = 0.05) -> None:
        super().__init__()
        if isinstance(net, _Prediction) or not callable(net):
            raise TypeError(
                "net must be a network called as net(x, t, cond) whose prediction is not converted "
                f"yet, got {type(net).__name__}"
            )
        check_noiseless(path)
        check_number(min_gap, "min_gap")
        if not 0 < min_gap < 1:
            raise ValueError(f"min_gap must lie in (0, 1), got {min_gap}")
        self.net, self.path, self.min_gap = net, path, min_gap
        self.times = _times_of(path, self.end, min_gap)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``."""
        return self._velocity(self.net, x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> BoundVelocity:
        """Return the velocity of one solve, for which the network may prepare its condition."""
        net = bind(self.net, cond, grid)
        return net.wrapped(lambda x, t, cond=None: self._velocity(net, x, t, cond))

    @abstractmethod
    def _velocity(self, net: Velocity, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the velocity that follows from the result of the network."""

    def _coefficients(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return the time that the network is told, and the path's coefficients at this time."""
        t = t.clamp(*self.times)
        return t, *coefficients(self.path, t, x)


class DataPrediction(_Prediction):
    """Velocity of a network that predicts the data, ``net(x, t, cond) ≈ E[x1 | x_t]``.

    On a path ``x_t = a x1 + b x0`` the velocity is

        v(x, t) = ((a' b − a b') net(x, t) + b' x) / b,

    on the linear path ``(net(x, t) − x) / (1 − t)``. The loss stays that of the velocity. Where
    ``b < min_gap``, near the data, ``t`` is the time with ``b(t) = min_gap``, in the formula and
    for the network: so nothing is divided by less, and the velocity is finite up to ``t = 1``,
    also where an inversion starts. With the exact prediction of Gaussian data, samples have an
    error of the order of ``min_gap²``. In directions without data, many fine steps leave noise of
    about ``min_gap / e``; a grid whose last step is ``min_gap`` long ends at the prediction.

    Data of few dimensions in a space of many are easier to predict than their noise or velocity,
    which fill the space: a network narrower than the space then still finds the data.

    Args:
        net: Network with the call ``net(x, t, cond)``; its weights are weights of this module.
        path: Path of the training, without added noise.
        min_gap: Smallest divisor, in (0, 1).

    Raises:
        TypeError: If ``net`` cannot be called, or its prediction is converted already.
        ValueError: If the path adds noise, or ``min_gap`` lies outside (0, 1).

    Source: Li & He, *Back to Basics: Let Denoising Generative Models Denoise*, 2025 (arXiv
    2511.13720), which divides by ``max(1 − t, 0.05)`` and does not change the time of the network.

    >>> velocity = DataPrediction(lambda x, t, cond: torch.ones_like(x))
    >>> velocity(torch.zeros(1, 2), torch.tensor([0.5]))
    tensor([[2., 2.]])
    """

    end = 1

    def _velocity(self, net: Velocity, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        t, a, b, da, db = self._coefficients(x, t)
        data = net(x, t, cond)
        return (((da * b - a * db) * data + db * x) / b).to(x.dtype)


class NoisePrediction(_Prediction):
    """Velocity of a network that predicts the noise, ``net(x, t, cond) ≈ E[x0 | x_t]``.

    On a path ``x_t = a x1 + b x0`` the velocity is

        v(x, t) = (a' x − (a' b − a b') net(x, t)) / a,

    on the linear path ``(x − net(x, t)) / t``. Where ``a < min_gap``, near the noise, ``t`` is the
    time with ``a(t) = min_gap``, as for `DataPrediction`.

    Args:
        net: Network with the call ``net(x, t, cond)``; its weights are weights of this module.
        path: Path of the training, without added noise.
        min_gap: Smallest divisor, in (0, 1).

    Raises:
        TypeError: If ``net`` cannot be called, or its prediction is converted already.
        ValueError: If the path adds noise, or ``min_gap`` lies outside (0, 1).

    >>> velocity = NoisePrediction(lambda x, t, cond: torch.zeros_like(x))
    >>> velocity(torch.ones(1, 2), torch.tensor([0.5]))
    tensor([[2., 2.]])
    """

    end = 0

    def _velocity(self, net: Velocity, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        t, a, b, da, db = self._coefficients(x, t)
        noise = net(x, t, cond)
        return ((da * x - (da * b - a * db) * noise) / a).to(x.dtype)


def network_of(velocity: Velocity) -> Velocity:
    """Return the network of a velocity that converts its prediction; other velocities themselves.

    >>> network_of(DataPrediction(torch.sin)) is torch.sin is network_of(torch.sin)
    True
    """
    return velocity.net if isinstance(velocity, _Prediction) else velocity


def _times_of(path: Interpolant, end: int, min_gap: float) -> tuple[float, float]:
    """Return the interval of times in which the coefficient of an end is at least ``min_gap``.

    Near the data the slope of ``b`` can be unbounded, as for `flowkit.paths.VP`. The interval then
    keeps ``b`` at least as large there, too.
    """
    last = torch.ones((), dtype=torch.float64)
    bounded = bool(path.coefficients(last).db.isfinite())
    low = 0.0 if end else _first(lambda t: path.coefficients(t).a >= min_gap)
    high = (
        1 - _first(lambda t: path.coefficients(1 - t).b >= min_gap) if end or not bounded else 1.0
    )
    return low, high


def _first(holds: Callable[[Tensor], Tensor]) -> float:
    """Return the first time in [0, 1] at which something holds that holds from then on."""
    low, high = torch.tensor([0.0, 1.0], dtype=torch.float64)
    if bool(holds(low)):
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if bool(holds(middle)) else (middle, high)
    return high.item()
