"""Mean velocities: networks that know the mean of a velocity over a step."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowkit.checks import check_floating
from flowkit.types import Cond


class MeanVelocity(nn.Module):
    """Velocity of a network that is told its step, and gives the mean velocity over the step.

    The mean velocity from ``t`` to ``s ≥ t`` along the flow is

        u(x, t, s) = 1/(s − t) ∫_t^s v(x_τ, τ) dτ,    u(x, t, t) = v(x, t),

    so one Euler step ``x_s = x_t + (s − t) u(x_t, t, s)`` has no error but that of the network, for
    a step of any size. `ODESampler` with the method ``"euler"`` takes such steps on any grid.
    Everything else, and a call of this object itself, uses the instantaneous velocity ``u(x, t,
    t)``: other methods, inversion, likelihoods. A solve by another method says so in a warning.

    Args:
        net: Network ``net(x, t, cond)`` with ``t (B, 2)``: times ``t`` and ``s`` of each sample.

    Raises:
        TypeError: If ``net`` cannot be called, or is a mean velocity itself.

    Source: Geng et al., *Mean Flows for One-step Generative Modeling*, 2025 (arXiv 2505.13447),
    equations 3 and 12.

    >>> from flowkit.sampling import ODESampler
    >>> def net(x, t, cond):  # v(x, t) = t has the mean (t + s) / 2
    ...     return t.mean(1, keepdim=True).expand_as(x)
    >>> ODESampler(1)(MeanVelocity(net), torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, net: Callable[[Tensor, Tensor, Cond], Tensor]) -> None:
        super().__init__()
        if isinstance(net, MeanVelocity) or not callable(net):
            raise TypeError(
                f"net must be a network called as net(x, t, cond) with t (B, 2), got "
                f"{type(net).__name__}"
            )
        self.net = net

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the instantaneous velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``."""
        return self.mean(x, t, t, cond)

    def mean(self, x: Tensor, t: Tensor, s: Tensor, cond: Cond = None) -> Tensor:
        """Return the mean velocity ``u(x, t, s) (B, *)`` from ``t (B,)`` to ``s (B,)``."""
        check_floating(x, "x")
        return self.net(x, torch.stack([t, s], 1), cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> "_Bound":
        """Return the velocity of one solve, which is told each step."""
        return _Bound(self.net)


class _Bound:
    """A mean velocity during one solve."""

    has_means = True

    def __init__(self, net: Callable[[Tensor, Tensor, Cond], Tensor]) -> None:
        self.net, self.averages = net, False
        self.end: float | None = None

    def average_steps(self, on: bool) -> None:
        self.averages, self.end = on, None

    def begin_step(self, t_left: float, t_right: float) -> None:
        if not self.averages and self.end is None:
            warnings.warn(
                "a mean velocity gives only its instantaneous velocity to this solver; Euler steps "
                "forward (sampler=euler) use the mean over each step",
                stacklevel=2,
            )
        self.end = t_right

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        s = torch.full_like(t, self.end) if self.averages and self.end is not None else t
        return self.net(x, torch.stack([t, s], 1), cond)
