"""Distances that `flowkit.flowopt.FlowOpt` minimizes: to the source, or parts or measures of it."""

from typing import Protocol

import torch
from torch import Tensor

from flowkit.checks import check_between, check_same_shape
from flowkit.flowopt.step_size import inner, rms


class LinearOperator(Protocol):
    """A linear map ``A`` of samples and its adjoint: ``⟨A x, y⟩ = ⟨x, Aᵀ y⟩``."""

    def __call__(self, x: Tensor) -> Tensor:
        """``A x`` of samples ``x (B, *)``, of any shape ``(B, ...)``."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """``Aᵀ y (B, *)``."""
        ...


def choose(
    y: Tensor, mask: Tensor | None, operator: LinearOperator | None
) -> "_Matching | _Measured":
    """Return what measures iterates against ``y (B, *)``: all of it, a part, or ``A`` of it.

    The part is what lies outside of the mask.
    """
    if operator is not None:
        if mask is not None:
            raise ValueError(
                "mask must be None with an operator, got both; let the operator leave it out"
            )
        return _Measured(y, operator)
    if mask is None:
        return _Matching(y, None)
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
        raise ValueError("mask must be below 1 somewhere in every sample, got 1 throughout")
    return _Matching(y, kept)


class _Matching:
    """``x − y``, weighted by how much each element is to be kept."""

    def __init__(self, y: Tensor, kept: Tensor | None):
        self.y, self.kept = y, kept

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        error = x - self.y
        if self.kept is None:
            return error, rms(error)
        gradient, count = self.kept * error, self.kept.flatten(1).sum(1)
        return gradient, (inner(gradient, error) / count).sqrt()

    def normal(self, x: Tensor) -> Tensor:
        """``Aᵀ A x``."""
        return x if self.kept is None else self.kept * x


class _Measured:
    """``Aᵀ(A x − A y)``."""

    def __init__(self, y: Tensor, operator: LinearOperator):
        self.operator, self.measured = operator, operator(y)
        check_same_shape(self.normal(y), y, ("operator.adjoint(operator(x1))", "x1"))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        error = self.operator(x) - self.measured
        return self.operator.adjoint(error), rms(error)

    def normal(self, x: Tensor) -> Tensor:
        return self.operator.adjoint(self.operator(x))
