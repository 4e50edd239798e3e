"""Costs of pairs, and optimal transport with these costs.

Couplings choose the cost of a pair. This module computes cost matrices, assignments (permutations)
and entropic plans.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowkit.checks import check_choice, check_same_shape, check_samples
from flowkit.couplings.sinkhorn import sinkhorn

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

Cost = str | Callable[[Tensor, Tensor], Tensor]
"""A name in `COSTS`, or a function ``cost(a (..., d), b (..., d)) -> (...)`` that broadcasts."""

COSTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": lambda a, b: torch.linalg.vector_norm(a - b, dim=-1),
    "sqeuclidean": lambda a, b: (a - b).square().sum(-1),
    "cityblock": lambda a, b: (a - b).abs().sum(-1),
    "inner": lambda a, b: -2 * (a * b).sum(-1),
}


@torch.no_grad()
def cost_matrix(x0: Tensor, x1: Tensor, cost: Cost = "sqeuclidean") -> Tensor:
    """Return the costs ``c(x0_i, x1_j) (N, M)`` in float32, for flattened samples.

    The matrix has no gradient.

    Args:
        x0: Source samples ``(N, *)``.
        x1: Data ``(M, *)``.
        cost: A name or a function, as for `flowkit.couplings.MinibatchOT`.

    Raises:
        TypeError: If a sample is not of real numbers.
        ValueError: If there is no sample, the shapes of samples differ, the name is unknown, or the
            function returns another shape.

    >>> cost_matrix(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]]), "cityblock")
    tensor([[3., 2.], [2., 1.]])
    """
    check_samples(x0, "x0")
    check_samples(x1, "x1")
    if x0.shape[1:] != x1.shape[1:]:
        raise ValueError(
            f"x0 must have samples of the same shape as x1, {tuple(x1.shape[1:])}, "
            f"got {tuple(x0.shape[1:])}"
        )
    check_cost(cost)
    return pairwise(points(x0), points(x1), cost)


def paired(a: Tensor, b: Tensor, cost: Cost) -> Tensor:
    """Return the costs ``(N,)`` of float32 rows ``a, b (N, d)``."""
    costs = _function(cost)(a, b).float()  # under autocast, some functions return half precision
    if costs.shape != a.shape[:1]:
        raise ValueError(
            f"cost must map (..., d) and (..., d) to (...), got {tuple(costs.shape)} "
            f"for {len(a)} pairs"
        )
    return costs


def pairwise(a: Tensor, b: Tensor, cost: Cost) -> Tensor:
    """Return the costs ``(N, M)`` of float32 rows ``a (N, d)`` and ``b (M, d)``."""
    if cost == "inner":
        # With `out`, the product stays in float32 under mixed precision.
        product = a.new_empty(len(a), len(b))
        return torch.addmm(product, a, b.T, beta=0, alpha=-2, out=product)
    if cost == "cityblock":
        return torch.cdist(a, b, p=1)
    if cost in ("euclidean", "sqeuclidean"):
        center = b.mean(0)
        # Matrix products make distances fast in many dimensions, but cancellation loses digits.
        mode = "use_mm_for_euclid_dist" if a.shape[1] > 16 else "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(a - center, b - center, compute_mode=mode)
        return distance.square_() if cost == "sqeuclidean" else distance
    rows = max(1, 2**24 // max(1, b.numel()))  # limits the memory of the broadcast
    matrix = torch.cat([_function(cost)(part[:, None], b) for part in a.split(rows)]).float()
    if matrix.shape != (len(a), len(b)):
        raise ValueError(
            f"cost must map (..., d) and (..., d) to (...), got {tuple(matrix.shape)} "
            f"for {len(a)} by {len(b)} points"
        )
    return matrix


def assign(cost: Tensor) -> Tensor:
    """Return the permutation ``p (B,)`` that minimizes ``Σ_j cost[p_j, j]``, exactly.

    Constants added to rows and columns do not change the solution of an assignment problem. This
    function subtracts nearly optimal dual potentials. The solution stays the same, but SciPy's
    shortest-augmenting-path solver then has almost nothing to search. The potentials come from
    softened problems in float32. They are subtracted in float64, so the optimum is exactly that of
    ``cost``.

    Args:
        cost: ``(B, B)`` and finite, on any device.

    Source: D. F. Crouse, *On implementing 2D rectangular assignment algorithms*, 2016 (the solver).
    The reduction by softened potentials is an addition of flowkit.

    >>> assign(torch.tensor([[4.0, 1.0, 3.0], [2.0, 3.0, 0.0], [3.0, 2.0, 2.0]]))
    tensor([2, 0, 1])
    """
    from scipy.optimize import linear_sum_assignment

    # A larger batch has smaller gaps between candidates, so good potentials save more search.
    # Each doubling of the batch adds one colder stage. For small batches, subtracting the minima
    # of columns is fastest. The numbers come from timings.
    if len(cost) > 64:
        num_iters = 4 if len(cost) <= 256 else 5
        matrix = _reduced(cost, int(math.log2(len(cost))) - 4, num_iters)
    else:
        matrix = cost.detach().cpu().numpy()
        matrix = np.subtract(matrix, matrix.min(0), dtype=np.float64)
    _, columns = linear_sum_assignment(matrix)
    return torch.from_numpy(columns.argsort()).to(cost.device)  # rows of columns


def potentials(cost: np.ndarray, num_stages: int, num_iters: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimate dual potentials ``f, g (B,)`` with ``f_i + g_j ≲ cost_ij``, tight on the optimum.

    The method is Sinkhorn with annealing. The temperature ``ε`` falls by a factor of 4 per stage.
    Each stage balances the kernel ``K = exp((f ⊕ g − cost) / ε)`` by ``v = 1 / Kᵀu``,
    ``u = 1 / Kv``, and adds the logs of ``u, v`` to ``f, g``. The next kernel is the fourth power
    of the balanced kernel, so the method computes a single exponential. Potentials are smooth in
    ``ε``. So each stage starts from a linear extrapolation of the last two stages; for temperatures
    in a geometric sequence, its step is ``(f_k − f_{k−1}) / 4``. `assign` accepts an estimate of
    any quality.

    Args:
        cost: ``(B, B)`` float32, finite.
        num_stages: Number of temperatures; 0 only subtracts row and column minima.
        num_iters: Balancing iterations per temperature.

    Source: B. Schmitzer, *Stabilized sparse scaling algorithms for entropy regularized transport
    problems*, 2019 (absorption and ε-scaling). The extrapolation in ε is an addition of flowkit.
    """
    f = cost.min(1)
    kernel = f[:, None] - cost
    g = -kernel.max(0)
    kernel += g
    temperature = -float(kernel.mean()) / 4
    if not (num_stages and temperature):
        return f, g
    # The loop ends at an underflow or overflow, so NumPy's warnings are off.
    with _one_thread(len(f)), np.errstate(all="ignore"):
        kernel /= temperature
        np.exp(np.maximum(kernel, -80, out=kernel), out=kernel)
        last = None
        for stage in range(num_stages):
            u = v = np.ones_like(f)
            for _ in range(num_iters):
                v = 1 / (u @ kernel)
                u = 1 / (kernel @ v)
            new = f + temperature * np.log(u), g + temperature * np.log(v)
            if not math.isfinite(new[0] @ new[1]):
                break
            steps = (0, 0) if last is None else ((new[0] - last[0]) / 4, (new[1] - last[1]) / 4)
            f, g = new[0] + steps[0], new[1] + steps[1]
            last = new
            if stage < num_stages - 1:
                kernel *= (u * np.exp(steps[0] / temperature))[:, None]
                kernel *= v * np.exp(steps[1] / temperature)
                # Smaller entries become subnormal numbers, which are slow on processors.
                np.maximum(kernel, 1e-9, out=kernel)
                np.square(np.square(kernel, out=kernel), out=kernel)
                temperature /= 4
    return f, g


def entropic_plan(cost: Tensor, reg: float, max_iters: int, tol: float = 1e-6) -> Tensor:
    """Return the plan ``(N, M)`` that minimizes ``⟨P, cost⟩ − reg H(P)`` with uniform marginals.

    The function anneals Sinkhorn's iteration, in float64 on the CPU, and takes Newton steps where
    the iteration is slow: see `flowkit.couplings.sinkhorn`. A warning appears if the marginals
    still differ by more than ``tol`` (Euclidean norm) after ``max_iters`` iterations.

    Args:
        cost: ``(N, M)`` and finite, on any device.
        reg: Positive, in units of the cost.
        max_iters: At least 1.
        tol: Positive.

    Source: M. Cuturi, *Sinkhorn Distances*, 2013 (arXiv 1306.0895).

    >>> entropic_plan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.1, max_iters=100)
    tensor([[0.5000, 0.0000], [0.0000, 0.5000]], dtype=torch.float64)
    """
    matrix = cost.detach().cpu().numpy().astype(np.float64)
    with _one_thread(max(matrix.shape)):
        plan, error = sinkhorn(matrix, reg, max_iters, tol)
    if not error <= tol:
        warnings.warn(
            f"Sinkhorn has not converged: the marginals are off by more than {tol:.0e} after "
            f"{max_iters} iterations at reg {reg}; raise reg or max_iters",
            stacklevel=2,
        )
    return torch.from_numpy(plan)


def _reduced(cost: Tensor, num_stages: int, num_iters: int) -> np.ndarray:
    """Return the cost minus its estimated potentials, in float64; the plans stay the same."""
    matrix = cost.detach().cpu().numpy()
    f, g = potentials(matrix.astype(np.float32, copy=False), num_stages, num_iters)
    reduced = np.subtract(matrix, f[:, None], dtype=np.float64)
    reduced -= g
    return reduced


def points(x: Tensor) -> Tensor:
    """Return the samples ``(N, *)`` as float32 rows ``(N, d)``."""
    return x.reshape(len(x), -1).float()


def check_ends(x0: Tensor, x1: Tensor) -> None:
    """Require samples ``x0, x1 (B, *)`` of real numbers, of one shape.

    Raises:
        TypeError: If a sample is not of real numbers.
        ValueError: If there is no sample, or the shapes differ.
    """
    check_samples(x0, "x0")
    check_samples(x1, "x1")
    check_same_shape(x0, x1)


def check_cost(cost: Cost) -> None:
    """Require a function or a name in `COSTS`."""
    if not callable(cost):
        check_choice(cost, COSTS, "cost")


def _function(cost: Cost) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the cost as a function."""
    return COSTS[cost] if isinstance(cost, str) else cost


def _one_thread(size: int) -> AbstractContextManager[object]:
    """Keep products of large matrices with vectors on one thread.

    BLAS splits them over threads. That gains little, and it is slow when other processes (workers
    of a data loader) use the same cores.
    """
    return _blas().limit(limits=1, user_api="blas") if size > 512 else nullcontext()


@cache
def _blas() -> "ThreadpoolController":
    """Return the controller of the threads of BLAS libraries."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
