"""Objectives of `flowkit.flowopt.FlowOpt`: ``½‖x − y‖²``, masked, or of measurements ``A x``."""

from typing import Protocol

import torch
from torch import Tensor

from flowkit.checks import check_between, check_same_shape
from flowkit.flowopt.step_size import inner, rms


class LinearOperator(Protocol):
    """A linear map ``A`` of samples, with its adjoint ``Aᵀ``: ``⟨A x, y⟩ = ⟨x, Aᵀ y⟩``.

    Any object with these two methods is one. `FlowOpt` then fits the measurements ``A x`` only.

    >>> class Average:  # of two neighbors
    ...     def __call__(self, x):
    ...         return x.reshape(len(x), -1, 2).mean(-1)
    ...
    ...     def adjoint(self, y):
    ...         return y.repeat_interleave(2, 1) / 2
    >>> A, x, y = Average(), torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0]])
    >>> bool((A(x) * y).sum() == (x * A.adjoint(y)).sum())
    True
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Return the measurements ``A x``, of any shape ``(B, ...)``, of samples ``x (B, *)``."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``Aᵀ y``, of the shape ``(B, *)`` of samples, for measurements ``y (B, ...)``."""
        ...


def choose(y: Tensor, mask: Tensor | None, operator: LinearOperator | None) -> "Objective":
    """Return the objective that compares iterates with ``y (B, *)``.

    It compares all elements, or those outside of the mask, or the measurements ``A x`` and ``A y``.

    Raises:
        TypeError: If the mask is not a tensor.
        ValueError: If both a mask and an operator are given. If the mask does not broadcast to
            ``y``, has values outside [0, 1], or is 1 everywhere in a sample. If
            ``operator.adjoint`` returns another shape than that of ``y``.
    """
    if operator is not None:
        if mask is not None:
            raise ValueError(
                "mask must be None with an operator, got both; "
                "let the operator leave the masked part out"
            )
        return _Measured(y, operator)
    if mask is None:
        return _Matching(y, None)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    try:
        mask = mask.to(y).expand(y.shape)
    except RuntimeError:
        raise ValueError(
            f"mask must broadcast to x1, {tuple(y.shape)}, got {tuple(mask.shape)}"
        ) from None
    low, high = (v.item() for v in torch.aminmax(mask))
    check_between(low, 0, 1, "mask")
    check_between(high, 0, 1, "mask")
    kept = 1 - mask
    if not bool(kept.flatten(1).any(1).all()):
        raise ValueError(
            "mask must be below 1 somewhere in every sample, got 1 everywhere; leave out a mask "
            "(or region) that frees the whole image"
        )
    return _Matching(y, kept)


class Objective(Protocol):
    """A distance of outputs ``x = f(z)`` to the source, and its derivative in ``x``."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient ``(B, *)`` and the residual ``(B,)``, a root mean square."""
        ...

    def normal(self, x: Tensor) -> Tensor:
        """Return the second derivative times ``x (B, *)``: ``Aᵀ A x``."""
        ...


class _Matching:
    """The objective ``½ Σ kept (x − y)²``; its gradient is ``kept (x − y)``.

    Args:
        y: The source ``(B, *)``.
        kept: Weights in [0, 1] of its shape, ``1 − mask``; None for 1 everywhere.
    """

    def __init__(self, y: Tensor, kept: Tensor | None) -> None:
        self.y, self.kept = y, kept

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient and the weighted root mean square of ``x − y``."""
        error = x - self.y
        if self.kept is None:
            return error, rms(error)
        gradient, count = self.kept * error, self.kept.flatten(1).sum(1)
        return gradient, (inner(gradient, error) / count).sqrt()

    def normal(self, x: Tensor) -> Tensor:
        """Return ``kept x``."""
        return x if self.kept is None else self.kept * x


class _Measured:
    """The objective ``½‖A x − A y‖²``; its gradient is ``Aᵀ(A x − A y)``.

    Args:
        y: The source ``(B, *)``.
        operator: ``A``.
    """

    def __init__(self, y: Tensor, operator: LinearOperator) -> None:
        self.operator, self.measured = operator, operator(y)
        check_same_shape(self.normal(y), y, ("operator.adjoint(operator(x1))", "x1"))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient and the root mean square of ``A x − A y``."""
        error = self.operator(x) - self.measured
        return self.operator.adjoint(error), rms(error)

    def normal(self, x: Tensor) -> Tensor:
        """Return ``Aᵀ A x``."""
        return self.operator.adjoint(self.operator(x))
