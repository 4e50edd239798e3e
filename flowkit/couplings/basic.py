"""Independent pairs, and pairs by optimal transport within a batch.

Independent pairs are enough to learn a flow. Pairs whose two ends lie close make its paths
straight.

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

from flowkit.checks import check_at_least, check_finite, check_positive
from flowkit.couplings.transport import (
    Cost,
    assign,
    check_cost,
    check_ends,
    cost_matrix,
    entropic_plan,
    pairwise,
    points,
)
from flowkit.distributed import gathered, own, place
from flowkit.types import Cond, Pairs


@runtime_checkable
class Coupling(Protocol):
    """Protocol of a coupling: an object with the method ``pair``."""

    def pair(
        self,
        x0: Tensor,
        x1: Tensor,
        cond: Cond = None,
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """Pair ``x0 (B, *)`` with ``x1 (B, *)``.

        Args:
            x0: Source samples ``(B, *)``.
            x1: Data ``(B, *)``.
            cond: Conditions ``(B, ...)`` of the data.
            generator: Source of random numbers, for couplings that draw.

        Returns:
            Pairs. Their number may differ from ``B``.
        """
        ...


@dataclass(frozen=True)
class Independent:
    """Pairs in the order of the batch: ``x0`` and ``x1`` are independent.

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
        """Return the inputs ``x0 (B, *)``, ``x1 (B, *)`` and ``cond`` as pairs.

        Raises:
            TypeError: If a sample is not of real numbers.
            ValueError: If there is no sample, or the shapes of ``x0`` and ``x1`` differ.
        """
        check_ends(x0, x1)
        return Pairs(x0, x1, cond)


@dataclass(frozen=True)
class MinibatchOT:
    """Pairs of least total cost: exact optimal transport within the batch.

    The optimal plan between two batches of equal size is a permutation. This class applies the
    permutation to ``x0`` and leaves ``x1`` in place, so every noise sample and every data point
    occurs exactly once. (The papers' code draws pairs from the plan with replacement instead. It
    then sees only ``1 − 1/e`` = 63 % of a batch.) Nothing is random: equal inputs give equal pairs.

    With conditions, plain transport is biased: in training, each class receives its own part of the
    source, but in sampling, every class starts from the whole source. ``cond_weight`` removes this
    bias. The noise sample ``x0_i`` gets the condition at its own place in the batch, and a pair
    costs ``c(x0_i, x1_j) + cond_weight · d(cond_i, cond_j)``. The distance ``d`` is
    ``1[cond_i ≠ cond_j]`` for labels, ``‖cond_i − cond_j‖²`` for floats, and the sum over all
    entries for a mapping.

    Args:
        cost: ``"sqeuclidean"``, ``"euclidean"``, ``"cityblock"``, ``"inner"`` (``−2⟨x0, x1⟩``,
            which gives the same pairs as ``"sqeuclidean"``) or a function
            ``(..., d), (..., d) -> (...)``.
        cond_weight: At least 0, in units of the cost. With an infinite weight, labels must agree:
            the transport is exact within each class. With ``None``, the coupling ignores conditions
            and warns.
        across_ranks: In distributed training, solve one transport problem for the joint batch of
            all ranks instead of one problem per rank. All ranks need the same batch size. Every
            rank solves the joint problem and keeps its own part. Validation always pairs within a
            rank.

    Raises:
        ValueError: If the name of the cost is unknown or the weight is negative.

    Source: Tong et al., 2023, algorithm 3; for ``cond_weight``, Cheng and Schwing, 2025 (C²OT).
    Their method also searches for the weight; here the user sets it.

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
        """Permute ``x0 (B, *)`` so that its total cost to ``x1 (B, *)`` is least.

        Raises:
            TypeError: If a sample is not of real numbers, or ``cond`` holds another object than
                tensors, or floats with an infinite ``cond_weight``.
            ValueError: If there is no sample, shapes differ, ``cond`` has another batch size, or a
                cost is not finite.
        """
        return _transport(self, x0, x1, cond, assign)


@dataclass(frozen=True)
class Sinkhorn:
    """Pairs drawn from the entropic plan ``argmin ⟨P, c⟩ − reg H(P)`` between two batches.

    ``x1`` stays in place. The partner of ``x1_j`` is drawn from ``P(x0 | x1_j)``. A small ``reg``
    approaches `MinibatchOT`, a large ``reg`` approaches `Independent`. With the squared Euclidean
    cost and ``reg = 2σ²``, the plan is the joint law of both ends of the Schrödinger bridge with
    diffusion ``σ``: combine it with ``paths.BrownianBridge(σ)``.

    Args:
        reg: Positive, in units of the cost.
        cost: Cost of a pair, as for `MinibatchOT`.
        cond_weight: Weight of the conditions, as for `MinibatchOT`.
        max_iters: Largest number of iterations, at least 1; each takes two products of a ``(B, B)``
            kernel with a vector. A warning appears if the plan has not converged by then.
        across_ranks: Joint transport of all ranks, as for `MinibatchOT`.

    Raises:
        ValueError: If the name of the cost is unknown or a number is out of its range.

    Source: Tong et al., 2023, algorithm 4 (SB-CFM). Their code draws both ends, so data points
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
        """Draw a partner from ``x0 (B, *)`` for every ``x1 (B, *)``.

        Raises:
            TypeError: If a sample is not of real numbers, or ``cond`` holds another object than
                tensors, or floats with an infinite ``cond_weight``.
            ValueError: If there is no sample, shapes differ, ``cond`` has another batch size, or a
                cost is not finite.
        """

        def draw(cost: Tensor) -> Tensor:
            """Draw the row ``(n,)`` for each column of a cost matrix ``(n, n)``."""
            # In float32, since not every generator's device has float64.
            plan = entropic_plan(cost, self.reg, self.max_iters).T.float()
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
    """Pair by ``solve``, a function from a cost ``(n, n)`` to one row per column ``(n,)``."""
    check_ends(x0, x1)
    # Only training, with gradients, calls all ranks at the same time.
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
            f"{type(coupling).__name__} ignores cond, which skews the source of every class; set "
            "cond_weight (for labels float('inf'), which pairs within each class)",
            stacklevel=4,
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
    """Return the cost ``(N, N)``, except for terms that depend on the row or the column alone.

    Plans do not depend on such terms. So the inner product can replace the squared distance, which
    leaves a single matrix product. For the same reason, both ends may be centered, which reduces
    rounding errors.
    """
    if cost in ("inner", "sqeuclidean"):
        total = pairwise(_centered(a), _centered(b), "inner")
    else:
        total = pairwise(a, b, cost)
    if weight:
        # In float64, because a large weight must not round away the digits of the cost.
        total = total.cpu().double()
        for label in labels.values():
            total += weight * _mismatch(label).cpu().double()
    if not math.isfinite(total.sum()):
        for name, value in {"x0": a, "x1": b, **labels}.items():
            check_finite(value, name)
        raise ValueError("cost must be finite, got NaN or infinite values for finite samples")
    return total


def _centered(x: Tensor) -> Tensor:
    """Subtract the mean from points ``(N, d)``, unless the mean is close to 0, as for noise."""
    if x.shape[1] <= 16:
        return x - x.mean(0)
    some = x[:8]
    mean = some.mean(0)
    near = len(some) * mean.square().sum() < 0.9 * some.square().sum()
    return x if near else x - mean


def _mismatch(label: Tensor) -> Tensor:
    """Return the distances ``(N, N)`` between conditions ``(N, *)``."""
    if label.is_floating_point():
        return cost_matrix(label, label, "sqeuclidean")
    ids = label.reshape(len(label), -1).unique(dim=0, return_inverse=True)[1]
    return ids[:, None] != ids


def _classes(labels: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the row numbers of each class; a class is one combination of all labels."""
    for name, label in labels.items():
        if label.is_floating_point():
            raise TypeError(
                f"{name} must hold integer labels if cond_weight is infinite, "
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
        if value.is_complex():
            raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
        if value.ndim == 0 or len(value) != batch:
            raise ValueError(f"{name} must have length {batch}, got shape {tuple(value.shape)}")
    return entries


def _check_settings(cost: Cost, cond_weight: float | None) -> None:
    """Require a known cost and a weight of at least 0."""
    check_cost(cost)
    if cond_weight is not None:
        check_at_least(cond_weight, 0, "cond_weight")
