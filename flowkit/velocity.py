"""The velocity of a flow, and the protocol between a velocity and one solve."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from flowkit.checks import check_cond, check_same_shape
from flowkit.types import Cond


@runtime_checkable
class Velocity(Protocol):
    """The speed of a state: ``velocity(x, t, cond) -> dx/dt``.

    Time runs from noise at ``t = 0`` to data at ``t = 1``. Networks, guided networks and
    closed-form flows are all velocities. The tensors that a solver passes are the solver's
    buffers: a velocity that keeps one beyond the call clones it. A velocity may reuse its own
    output buffer.

    A velocity that prepares or caches something for a solve may offer
    ``bind(cond, grid) -> Velocity``. The velocity that ``bind`` returns serves one solve. It may
    have

    * ``begin_step(t_left, t_right)``, called before every step with the step's ends in order of
      time;
    * ``average_steps()``, called before the first step of a solve that takes Euler steps forward:
      from then on the result at the start of a step may be the mean velocity over the step, which
      carries the state to the end of the step without error;
    * ``edges``, times in [0, 1] that no step may lie across;
    * ``rows``, the number of rows that went through the network so far.

    These attributes are read in one place only, the function `flowkit.velocity.bind`. A velocity
    that offers neither ``bind`` nor ``begin_step`` takes no part: its other attributes are its own.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at states ``x (B, *)`` and times ``t (B,)``."""
        ...


class BoundVelocity:
    """A velocity during one solve, as `bind` returns it; itself a velocity.

    Attributes:
        velocity: The velocity that is called.
        prepared: Whether the velocity offered ``bind``, so that it serves one condition.
        follows_steps: Whether the velocity wants to know each step.
        edges: Times that no step may lie across; empty for most velocities.
        nfe: Calls so far (number of function evaluations).
    """

    __slots__ = (
        "_average_steps",
        "_begin_step",
        "_rows",
        "_source",
        "edges",
        "nfe",
        "prepared",
        "velocity",
    )

    def __init__(self, velocity: Velocity, prepared: bool = False) -> None:
        begin_step: Any = getattr(velocity, "begin_step", None)
        tells = callable(begin_step)
        # Other velocities are strangers to the protocol: a graph network has edges of its own.
        takes_part = prepared or tells
        self.velocity, self.prepared = velocity, prepared
        self._begin_step: Callable[[float, float], Any] | None = begin_step if tells else None
        can = takes_part and getattr(velocity, "has_means", False)
        self._average_steps: Callable[[bool], Any] | None = (
            getattr(velocity, "average_steps", None) if can else None
        )
        self._source: Any = velocity if takes_part and hasattr(velocity, "rows") else None
        self.edges: tuple[float, ...] = _times(getattr(velocity, "edges", ())) if takes_part else ()
        self.nfe = self._rows = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` and count the call."""
        self.count(1, len(x))
        return self.velocity(x, t, cond)

    def count(self, calls: int, rows: int) -> None:
        """Count calls of ``velocity`` itself, which spares a solver this object's own call."""
        self.nfe += calls
        self._rows += rows

    @property
    def rows(self) -> int:
        """Rows that went through the network: the velocity's own count, or those of the calls."""
        return self._rows if self._source is None else self._source.rows

    @property
    def follows_steps(self) -> bool:
        """True if the velocity follows the steps of the solve."""
        return self._begin_step is not None

    def begin_step(self, t_left: float, t_right: float) -> None:
        """Tell the velocity the next step, by its ends in order of time."""
        if self._begin_step is not None:
            self._begin_step(t_left, t_right)

    @property
    def has_means(self) -> bool:
        """True if the velocity may give its mean over an Euler step."""
        return self._average_steps is not None

    def average_steps(self, on: bool) -> None:
        """Ask for means over the steps, which are all Euler's and forward, or for velocities."""
        if self._average_steps is not None:
            self._average_steps(on)

    def wrapped(self, call: Velocity) -> "BoundVelocity":
        """Return another velocity of the same solve: same steps, edges and rows, another call.

        >>> bound = bind(lambda x, t, cond: x)
        >>> doubled = bound.wrapped(lambda x, t, cond: 2 * bound(x, t, cond))
        """
        outer = BoundVelocity(call, self.prepared)
        outer._begin_step, outer._average_steps = self._begin_step, self._average_steps
        outer._source, outer.edges = self, self.edges
        return outer


def bind(velocity: Velocity, cond: Cond = None, grid: Tensor | None = None) -> BoundVelocity:
    """Prepare a velocity for one solve.

    Args:
        velocity: The field. If it offers ``bind(cond, grid)``, the result of that is used.
        cond: The condition of the solve.
        grid: The sampler's times ``(n + 1,)``, increasing in either direction of the solve; None
            outside of a solve.

    Raises:
        TypeError: If the velocity, or what its ``bind`` returns, cannot be called as
            ``velocity(x, t, cond)``; if ``cond`` is not None, a tensor or tensors by name; if
            ``edges`` are not numbers.
        ValueError: If its ``edges`` do not lie in [0, 1].

    >>> import torch
    >>> bound = bind(lambda x, t, cond: -x)
    >>> bound(torch.ones(3, 2), torch.zeros(3)).shape, bound.nfe, bound.rows
    (torch.Size([3, 2]), 1, 3)
    """
    if not callable(velocity):
        raise TypeError(
            f"velocity must be callable as velocity(x, t, cond), got {type(velocity).__name__}"
        )
    check_cond(cond)
    offered = getattr(velocity, "bind", None)
    bound: Velocity = velocity if offered is None else offered(cond, grid)
    if not callable(bound):
        raise TypeError(
            f"bind of {type(velocity).__name__} must return a velocity, got {type(bound).__name__}"
        )
    if isinstance(bound, BoundVelocity):
        return bound
    _check_signature(bound)
    return BoundVelocity(bound, prepared=offered is not None)


def check_result(v: object, x: Tensor) -> None:
    """Require that what a velocity returned at the states ``x`` is a tensor of their shape.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If its shape is another.
    """
    if not isinstance(v, Tensor):
        raise TypeError(
            f"velocity(x, t, cond) must return a tensor of the shape of x, {tuple(x.shape)}, got "
            f"{type(v).__name__}; return the tensor alone, "
            "as lambda x, t, cond: v(x, t, cond)[0]"
        )
    check_same_shape(v, x, ("velocity(x, t, cond)", "x"))


def _check_signature(velocity: Velocity) -> None:
    """Refuse a velocity that does not take ``(x, t, cond)``; one that does not tell may be right.

    Hooks may change the arguments of a module, and a decorator those of what it wraps.
    """
    called: Any = velocity
    if isinstance(velocity, nn.Module) and type(velocity).__call__ is nn.Module.__call__:
        if velocity._forward_pre_hooks:
            return
        called = velocity.forward
    try:
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):
        return
    try:
        signature.bind("x", "t", "cond")
    except TypeError as error:
        name = getattr(velocity, "__name__", type(velocity).__name__)
        raise TypeError(
            f"velocity must be callable as velocity(x, t, cond), got {name}{signature}; wrap it, "
            "such as lambda x, t, cond: v(x, t)"
        ) from error


def _times(edges: Sequence[float]) -> tuple[float, ...]:
    """Return the edges of a velocity as floats in [0, 1]."""
    try:
        times = tuple(float(edge) for edge in edges)
    except (TypeError, ValueError) as error:
        raise TypeError(f"edges of a velocity must be times, got {edges!r}") from error
    if not all(0 <= time <= 1 for time in times):
        raise ValueError(f"edges of a velocity must lie in [0, 1], got {list(times)}")
    return times
