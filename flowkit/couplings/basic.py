"""Couplings: which noise goes with which data point.

A coupling takes a batch of source samples and one of data and returns them as pairs. Drawing
both independently is enough to learn a flow; pairs that lie close make its paths straight.

Sources: Tong et al., *Improving and generalizing flow-based generative models with minibatch
optimal transport*, 2023 (arXiv 2302.00482); Pooladian et al., *Multisample Flow Matching*,
2023 (arXiv 2304.14772); Cheng and Schwing, *The Curse of Conditions: Analyzing and Improving
Optimal Transport for Conditional Flow-Based Generation*, 2025 (arXiv 2503.10636).
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_finite, check_positive, check_same_shape
from flowkit.couplings.debiasing import Division, Potentials, RowSoftmax
from flowkit.couplings.epsilon import EpsilonChoice, suggest_epsilon
from flowkit.couplings.gibbs import Gibbs
from flowkit.couplings.transport import (
    Cost,
    assign,
    check_cost,
    cost_matrix,
    entropic_plan,
    pairwise,
    points,
)
from flowkit.distributed import gathered, own, place
from flowkit.types import Cond, Pairs

__all__ = [
    "Coupling",
    "Division",
    "EpsilonChoice",
    "Gibbs",
    "Independent",
    "MinibatchOT",
    "Pairs",
    "Potentials",
    "RowSoftmax",
    "Sinkhorn",
    "cost_matrix",
    "suggest_epsilon",
]


@runtime_checkable
class Coupling(Protocol):
    """What training needs of a coupling."""

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """Pair ``x0 (B, *)`` with ``x1 (B, *)``; ``cond (B, ...)`` describes ``x1``."""
        ...


@dataclass(frozen=True)
class Independent:
    """The pairs as they come: ``x0`` and ``x1`` are independent.

    >>> Independent().pair(torch.zeros(2, 1), torch.ones(2, 1)).x0.ravel()
    tensor([0., 0.])
    """

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """Return the inputs."""
        check_same_shape(x0, x1)
        return Pairs(x0, x1, cond)


@dataclass(frozen=True)
class MinibatchOT:
    """Pairs of least total cost: the exact optimal transport within the batch.

    The optimal plan between two batches of one size is a permutation. It is used as it is:
    ``x1`` stays in place and ``x0`` is permuted, so that every noise and every data point
    occurs exactly once. (Drawing pairs from the plan with replacement, as the papers' code does,
    keeps only ``1 − 1/e`` = 63 % of a batch.) Nothing is drawn; equal inputs give equal pairs.

    With conditions, plain transport gives every class its own corner of the source, which
    sampling cannot know: the learned flow is biased. ``cond_weight`` removes the bias. Noise
    ``x0_i`` carries the condition of its own place in the batch, and a pair costs
    ``c(x0_i, x1_j) + cond_weight · d(cond_i, cond_j)`` with ``d = 1[cond_i ≠ cond_j]`` for labels,
    ``‖cond_i − cond_j‖²`` for floats, and the sum over the entries of a mapping.

    Args:
        cost: ``"sqeuclidean"``, ``"euclidean"``, ``"cityblock"``, ``"inner"`` (``−2⟨x0, x1⟩``: the
            pairs of ``"sqeuclidean"``) or a function ``(..., d), (..., d) -> (...)``.
        cond_weight: At least 0, in units of the cost. Infinite: labels must agree, so the
            transport is exact within each class. ``None``: conditions are ignored, with a
            warning.
        across_ranks: In a distributed training, transport the joint batch of all ranks (of one size
            each) instead of each rank's own: every rank solves the larger problem and keeps its
            part. Validation pairs within each rank.

    Raises:
        ValueError: For an unknown cost or a negative weight.

    Source: Tong et al., 2023, algorithm 3; with ``cond_weight`` Cheng and Schwing, 2025 (C²OT),
    who also search for the weight; here it is given.

    >>> x0, x1 = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]])
    >>> MinibatchOT().pair(x0, x1).x0.ravel()
    tensor([1., 0.])
    >>> MinibatchOT(cond_weight=float("inf")).pair(x0, x1, cond=torch.tensor([0, 1])).x0.ravel()
    tensor([0., 1.])
    """

    cost: Cost = "sqeuclidean"
    cond_weight: float | None = None
    across_ranks: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check_settings(self.cost, self.cond_weight)

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """Permute ``x0 (B, *)`` so that the total cost to ``x1 (B, *)`` is least.

        Raises:
            ValueError: If shapes differ, ``cond`` is of another batch, or a cost is not finite.
        """
        return _transport(self, x0, x1, cond, assign)


@dataclass(frozen=True)
class Sinkhorn:
    """Pairs drawn from the entropic plan ``argmin ⟨P, c⟩ − reg H(P)`` between two batches.

    ``x1`` stays in place; the partner of ``x1_j`` is drawn from ``P(x0 | x1_j)``. A small ``reg``
    approaches `MinibatchOT`, a large one `Independent`. With the squared cost and
    ``reg = 2σ²`` the plan is the end-point law of the Schrödinger bridge of diffusion ``σ``: pair
    it with ``paths.BrownianBridge(σ)``.

    Args:
        reg: Positive, in units of the cost.
        cost: As of `MinibatchOT`.
        cond_weight: As of `MinibatchOT`.
        max_iters: Sinkhorn rounds; a plan that has not converged by then warns.
        across_ranks: As of `MinibatchOT`.

    Raises:
        ValueError: For an unknown cost or a number out of its range.

    Source: Tong et al., 2023, algorithm 4 (SB-CFM). There, both ends are drawn and data points
    repeat; here every data point occurs once.

    >>> x0, x1 = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]])
    >>> Sinkhorn(reg=0.01).pair(x0, x1).x0.ravel()
    tensor([1., 0.])
    """

    reg: float
    cost: Cost = "sqeuclidean"
    cond_weight: float | None = None
    max_iters: int = 1000
    across_ranks: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_positive(self.reg, "reg")
        check_at_least(self.max_iters, 1, "max_iters")
        _check_settings(self.cost, self.cond_weight)

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """Draw a partner in ``x0 (B, *)`` for every ``x1 (B, *)``.

        Raises:
            ValueError: If shapes differ, ``cond`` is of another batch, or a cost is not finite.
        """

        def draw(cost: Tensor) -> Tensor:
            plan = entropic_plan(cost, self.reg, self.max_iters).T
            if generator is not None:
                plan = plan.to(generator.device)
            return plan.multinomial(1, generator=generator)[:, 0].to(cost.device)

        return _transport(self, x0, x1, cond, draw)


def _transport(
    coupling: MinibatchOT | Sinkhorn,
    x0: Tensor,
    x1: Tensor,
    cond: Cond,
    solve: Callable[[Tensor], Tensor],
) -> Pairs:
    """Pair by ``solve``: from a cost ``(n, n)`` to the row that goes with each column."""
    check_same_shape(x0, x1)
    # Without gradients, as in validation, ranks need not be in step.
    if coupling.across_ranks and torch.is_grad_enabled() and place()[1] > 1:
        if isinstance(cond, Mapping):
            joint_cond: Cond = {name: gathered(value) for name, value in cond.items()}
        else:
            joint_cond = None if cond is None else gathered(cond)
        with torch.no_grad():
            joint = _transport(coupling, gathered(x0), gathered(x1), joint_cond, solve)
        return Pairs(own(joint.x0, len(x1)), x1, cond)
    weight, labels = coupling.cond_weight, _entries(cond, len(x1))
    if labels and weight is None:
        warnings.warn(
            f"{type(coupling).__name__} ignores cond and so skews the source of every class; set "
            "cond_weight (float('inf') for labels: transport within each class)",
            stacklevel=3,
        )
    with torch.no_grad():
        a, b = points(x0), points(x1)
        if not labels or weight != math.inf:
            partner = solve(_total_cost(a, b, coupling.cost, labels, weight or 0.0))
        else:
            partner = torch.empty(len(a), dtype=torch.long, device=a.device)
            for rows in _classes(labels):
                cost = _total_cost(a[rows], b[rows], coupling.cost, {}, 0.0)
                partner[rows] = rows[solve(cost)]
    return Pairs(x0.index_select(0, partner.to(x0.device)), x1, cond)


def _total_cost(
    a: Tensor, b: Tensor, cost: Cost, labels: Mapping[str, Tensor], weight: float
) -> Tensor:
    """Return the cost ``(N, N)`` up to terms of rows and of columns: no plan depends on those.

    So the squared distance is as good as the inner product, which is a single matrix product,
    and both ends may be centered, which saves digits.
    """
    if cost in ("inner", "sqeuclidean"):
        total = pairwise(_centered(a), _centered(b), "inner")
    else:
        total = pairwise(a, b, cost)
    if weight:
        # In float64, since a large weight must not swallow the digits of the cost.
        total = total.cpu().double()
        for label in labels.values():
            total += weight * _mismatch(label).cpu().double()
    if not math.isfinite(total.sum()):
        for name, value in {"x0": a, "x1": b, **labels}.items():
            check_finite(value, name)
        raise ValueError("cost must be finite, got NaN or infinite values for finite samples")
    return total


def _centered(x: Tensor) -> Tensor:
    """Return points ``(N, d)`` about their mean; such that lie about 0 as they are (noise does)."""
    if x.shape[1] <= 16:
        return x - x.mean(0)
    some = x[:8]
    mean = some.mean(0)
    near = len(some) * mean.square().sum() < 0.9 * some.square().sum()
    return x if near else x - mean


def _mismatch(label: Tensor) -> Tensor:
    """Return how far conditions ``(N, *)`` differ: ``(N, N)``."""
    if label.is_floating_point():
        return cost_matrix(label, label, "sqeuclidean")
    ids = label.reshape(len(label), -1).unique(dim=0, return_inverse=True)[1]
    return ids[:, None] != ids


def _classes(labels: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the places of each joint class."""
    for name, label in labels.items():
        if label.is_floating_point():
            raise TypeError(
                f"{name} must hold integer labels where cond_weight is infinite, "
                f"got {label.dtype}; set a finite cond_weight"
            )
    joint = torch.cat([label.reshape(len(label), -1).long() for label in labels.values()], dim=1)
    ids = joint.unique(dim=0, return_inverse=True)[1]
    return [(ids == k).nonzero()[:, 0] for k in range(int(ids.max()) + 1)]


def _entries(cond: Cond, batch: int) -> dict[str, Tensor]:
    """Return the tensors of a condition by name."""
    if cond is None:
        return {}
    if isinstance(cond, Mapping):
        entries = {f"cond[{name!r}]": value for name, value in cond.items()}
    else:
        entries = {"cond": cond}
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.ndim == 0 or len(value) != batch:
            raise ValueError(f"{name} must have length {batch}, got shape {tuple(value.shape)}")
    return entries


def _check_settings(cost: Cost, cond_weight: float | None) -> None:
    check_cost(cost)
    if cond_weight is not None:
        check_at_least(cond_weight, 0, "cond_weight")
