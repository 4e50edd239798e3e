"""The velocity: the one thing that samplers, guidance and losses agree on."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from flowkit.types import Cond


@runtime_checkable
class Velocity(Protocol):
    """Anything that says how fast a state moves: ``velocity(x, t, cond) -> dx/dt``.

    Time runs from noise at ``t = 0`` to data at ``t = 1``. Networks, guided networks and
    closed-form flows are all velocities. A velocity with something to prepare or to cache
    may offer ``bind(cond, grid) -> Velocity``, with the sampler's grid, increasing in either
    direction of the solve (None outside of one); what that returns serves one solve, and may
    offer ``begin_step(t_left, t_right)``, name times in ``edges`` that no step is to lie across,
    and count its network rows in ``rows``. The tensors
    that a solver passes are its buffers: a velocity that keeps one beyond the call clones it.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at states ``x (B, *)`` and times ``t (B,)``."""
        ...
