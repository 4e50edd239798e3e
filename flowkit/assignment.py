"""Optimal transport on a cost matrix: exact assignment and the entropic plan.

Couplings decide what a pair costs; here a ``(B, B)`` cost becomes a permutation or a plan.
Both start from the same cheap estimate of the dual potentials, which is what makes them fast.
"""

import warnings

import numpy as np
import torch
from torch import Tensor


def assign(cost: Tensor) -> Tensor:
    """Return the permutation ``p (B,)`` that minimises ``Σ_i cost[i, p_i]``, exactly.

    An assignment problem is unchanged by constants added to rows and columns. Subtracting
    nearly optimal dual potentials therefore leaves the answer alone, but leaves SciPy's
    shortest-augmenting-path solver with almost nothing to search. The potentials are those of
    softened problems, in float32; they are subtracted in float64, so that the optimum is the
    one of ``cost`` as given.

    Args:
        cost: ``(B, B)`` and finite, on any device.

    Source: D. F. Crouse, *On implementing 2D rectangular assignment algorithms*, 2016 (the
    solver). The reduction by softened potentials is this module's.

    >>> assign(torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]))
    tensor([1, 0, 2])
    """
    from scipy.optimize import linear_sum_assignment

    matrix = cost.detach().cpu().numpy()
    # Every doubling of the batch halves the gaps between competitors: the problem must be
    # softened less. Below 32 samples there is nothing to gain.
    num_stages = int(np.log2(max(len(matrix), 16))) - 4
    f, g = potentials(matrix.astype(np.float32, copy=False), num_stages)
    reduced = matrix.astype(np.float64)
    reduced -= f[:, None]
    reduced -= g
    return torch.from_numpy(linear_sum_assignment(reduced)[1]).to(cost.device)


def potentials(
    cost: np.ndarray, num_stages: int, ratio: float = 0.3, num_iters: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate dual potentials ``f, g (B,)`` with ``f_i + g_j ≲ cost_ij``, tight on the optimum.

    Annealed Sinkhorn: at temperatures falling by ``ratio``, the kernel
    ``K = exp((f ⊕ g − cost) / ε)`` is balanced by ``v = 1 / Kᵀu``, ``u = 1 / Kv`` and the logs of
    ``u, v`` are absorbed into ``f, g``. Potentials move smoothly with ``ε``, so each stage starts
    from the line through the last two; along a geometric sequence its step is
    ``ratio (f_k − f_{k−1})``. An estimate of any quality is fit for `assign`.

    Args:
        cost: ``(B, B)`` float32, finite.
        num_stages: Number of temperatures; 0 only subtracts row and column minima.
        ratio: Of one temperature to the last, in (0, 1).
        num_iters: Balancing rounds per temperature.

    Source: B. Schmitzer, *Stabilized sparse scaling algorithms for entropy regularized
    transport problems*, 2019 (absorption and ε-scaling); the extrapolation in ε is added.
    """
    f = cost.min(1)
    g = (cost - f[:, None]).min(0)
    kernel = f[:, None] + g - cost
    temperature = -ratio * kernel.mean()
    last = None
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for _ in range(num_stages if temperature > 0 else 0):
            np.subtract(f[:, None], cost, out=kernel)
            kernel += g
            kernel *= 1 / temperature
            np.exp(kernel, out=kernel)
            u = np.ones_like(f)
            for _ in range(num_iters):
                v = 1 / np.maximum(u @ kernel, 1e-30)
                u = 1 / np.maximum(kernel @ v, 1e-30)
            new = f + temperature * np.log(u), g + temperature * np.log(v)
            if not (np.isfinite(new[0]).all() and np.isfinite(new[1]).all()):
                break
            f, g = new
            if last is not None:
                f, g = f + ratio * (f - last[0]), g + ratio * (g - last[1])
            last = new
            temperature *= ratio
    return f, g


def entropic_plan(cost: Tensor, reg: float, max_iters: int, tol: float = 1e-6) -> Tensor:
    """Return the plan ``(N, M)`` that minimises ``⟨P, cost⟩ − reg H(P)`` with uniform marginals.

    POT's Sinkhorn iteration, in the log domain and in float64. A plan whose marginals are still
    off by more than ``tol`` (Euclidean norm) after ``max_iters`` rounds comes with a warning.

    Args:
        cost: ``(N, M)`` and finite, on any device.
        reg: Positive, in units of the cost.
        max_iters: At least 1.
        tol: Positive.

    Source: M. Cuturi, *Sinkhorn Distances*, 2013 (arXiv 1306.0895).

    >>> entropic_plan(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.1, max_iters=100)
    tensor([[0.5000, 0.0000], [0.0000, 0.5000]], dtype=torch.float64)
    """
    from ot import sinkhorn

    matrix = cost.detach().double()
    rows, columns = (matrix.new_full((size,), 1 / size) for size in matrix.shape)
    plan, log = sinkhorn(
        rows,
        columns,
        matrix,
        reg,
        method="sinkhorn_log",
        numItermax=max_iters,
        stopThr=tol,
        log=True,
        warn=False,
    )
    if not log["err"][-1] <= tol:
        warnings.warn(
            f"Sinkhorn has not converged in {max_iters} rounds: the marginals are off by "
            f"{float(log['err'][-1]):.1e}, not {tol:.0e}; raise reg ({reg}) or max_iters",
            stacklevel=2,
        )
    return plan
