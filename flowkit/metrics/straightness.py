"""How straight the trajectories of a flow are."""

from typing import Any

import torch
from torch import Tensor

from flowkit.checks import as_grid, check_at_least, check_finite, check_positive


def path_energy(solution: Any, grid: Tensor | int) -> float:
    """Path energy ``E ∫‖v‖² dt`` of a sampler's trajectories.

    ``E Σ_k ‖x_{k+1} − x_k‖² / (t_{k+1} − t_k)``, summed over elements and averaged over the batch.
    For Euler steps this is the integral of the velocities used; for any solver it bounds the
    energy of the solved flow from below and meets it as the grid is refined. Over all of
    [0, 1] it is at least ``W2²`` between the ends of the path, with equality for straight, optimal
    paths.

    Source: Tong et al. 2023 (arXiv 2302.00482), section 5.1 (there by an adaptive solver).

    Args:
        solution: A `flowkit.sampling.Solution` (or anything with ``path``), or the path itself,
            ``(n+1, B, *)``.
        grid: The times ``(n+1,)`` of the path, or ``n`` for uniform ones.

    Returns:
        The energy, in squared units of the samples per unit of time.

    Raises:
        ValueError: If the solution holds no path or the grid does not fit it.

    >>> import torch
    >>> path = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])      # one step of length 5
    >>> path_energy(path, 1)
    25.0
    """
    path = solution if isinstance(solution, Tensor) else solution.path
    if path is None:
        raise ValueError("solution must hold a path, got None; solve with return_path=True")
    times = as_grid(grid)
    if path.ndim < 2 or len(path) != len(times):
        raise ValueError(
            f"solution must hold a path ({len(times)}, B, *) for a grid of {len(times)} times, "
            f"got shape {tuple(path.shape)}"
        )
    energy = 0.0
    for left, right, step in zip(path[:-1], path[1:], times.diff().tolist(), strict=True):
        energy += (right.double() - left.double()).square().sum().item() / step
    return energy / path.shape[1]


def normalized_path_energy(path_energy: float, w2: float) -> float:
    """Normalized path energy ``NPE = |PE − W2²| / W2²``; 0 for straight, optimal paths.

    It is no measure of quality by itself: a flow that misses the data can have less energy than
    ``W2²``. Report it beside both.

    Source: Tong et al. 2023 (arXiv 2302.00482), section 5.1.

    Args:
        path_energy: From `path_energy`.
        w2: The *rooted* `wasserstein2` between source and data.

    Returns:
        The relative excess, at least 0.

    Raises:
        ValueError: If ``path_energy`` is negative or ``w2`` is not positive.

    >>> normalized_path_energy(5.0, w2=2.0)
    0.25
    """
    check_at_least(path_energy, 0, "path_energy")
    check_positive(w2, "w2")
    return abs(path_energy - w2**2) / w2**2


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Exact 2-Wasserstein distance of two empirical distributions, *rooted*.

    ``W2 = (min_π Σ_ij π_ij ‖a_i − b_j‖²)^{1/2}`` over plans with uniform marginals. Its square is
    always called ``w2_squared``. Between finite samples of one distribution it is not 0: compare at
    equal counts.

    Source: Peyré & Cuturi 2019 (arXiv 1803.00567), equation 2.11; solved by POT's ``emd2``.

    Args:
        a: Points ``(N, *)``, flattened.
        b: Points ``(M, *)``, flattened. Memory and time grow as ``N M`` and worse: thousands, not
            tens of thousands.

    Returns:
        The distance, in the unit of the points.

    Raises:
        ValueError: If shapes differ or a value is not finite.
        RuntimeError: If the solver does not reach the optimum.

    >>> round(wasserstein2(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]])), 6)
    2.0
    """
    import ot

    if a.ndim < 2 or a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(f"b must be points (M, *) as a {tuple(a.shape)}, got {tuple(b.shape)}")
    check_finite(a, "a")
    check_finite(b, "b")
    a, b = (x.detach().to("cpu", torch.float64).flatten(1) for x in (a, b))
    # The direct mode: expanding the square would lose half of the digits of small distances.
    cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    squared, log = ot.emd2([], [], cost, numItermax=100_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"the transport plan must be optimal, got {log['warning']}")
    return max(float(squared), 0.0) ** 0.5
