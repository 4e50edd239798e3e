"""Straightness of trajectories: path energy, and the Wasserstein distance it refers to."""

import torch
from torch import Tensor

from flowkit.checks import as_grid, check_at_least, check_finite, check_positive
from flowkit.sampling import Solution


def path_energy(solution: Solution | Tensor, grid: Tensor | int) -> float:
    """Path energy ``E ∫‖v‖² dt`` of the trajectories of a sampler.

    It is computed as ``E Σ_k ‖x_{k+1} − x_k‖² / (t_{k+1} − t_k)``, summed over the elements and
    averaged over the batch. For Euler steps this is the integral of the velocities of the steps.
    For other solvers it is a lower bound of the energy of the flow, and converges to this energy
    as the grid is refined. Over the whole interval [0, 1] the energy is at least ``W2²`` between
    the ends of the path. It equals ``W2²`` for straight paths of the optimal transport.

    Source: Tong et al. 2023 (arXiv 2302.00482), section 5.1. They use an adaptive solver.

    Args:
        solution: A `flowkit.sampling.Solution` with a path, or the path ``(n+1, B, *)``.
        grid: The times ``(n+1,)`` of the path, or ``n`` for uniform times.

    Returns:
        The energy, in squared units of the samples per unit of time.

    Raises:
        ValueError: If the solution holds no path, or the path and the grid differ in length.

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
    """Normalized path energy ``NPE = |PE − W2²| / W2²``.

    It is 0 for straight paths of the optimal transport. A flow that does not reach the data can
    have a path energy below ``W2²``. So report ``PE`` and ``W2²`` together with it.

    Source: Tong et al. 2023 (arXiv 2302.00482), section 5.1.

    Args:
        path_energy: The path energy ``PE``, from the function `path_energy`.
        w2: The distance ``W2`` (not squared) between source and data, from `wasserstein2`.

    Returns:
        The relative difference, at least 0.

    Raises:
        ValueError: If ``path_energy`` is negative or ``w2`` is not positive.

    >>> normalized_path_energy(5.0, w2=2.0)
    0.25
    """
    check_at_least(path_energy, 0, "path_energy")
    check_positive(w2, "w2")
    return abs(path_energy - w2**2) / w2**2


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """Exact 2-Wasserstein distance of two empirical distributions.

    ``W2 = (min_π Σ_ij π_ij ‖a_i − b_j‖²)^{1/2}`` over plans ``π`` with uniform marginals. Records
    call its square ``w2_squared``. Two finite samples of the same distribution have a positive
    distance. So compare distances only at equal numbers of samples.

    Source: Peyré & Cuturi 2019 (arXiv 1803.00567), equation 2.11; solved by POT's ``emd2``.

    Args:
        a: Points ``(N, *)``; each point is flattened.
        b: Points ``(M, *)``; each point is flattened. The memory grows as ``N M``, the time faster:
            use thousands of points, not tens of thousands.

    Returns:
        The distance, at least 0, in the unit of the points.

    Raises:
        ValueError: If the shapes differ, a set is empty or a value is not finite.
        RuntimeError: If the solver does not reach the optimum.

    >>> round(wasserstein2(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [2.0]])), 6)
    2.0
    """
    import ot

    if a.ndim < 2 or a.shape[1:] != b.shape[1:] or not len(a) or not len(b):
        raise ValueError(
            f"b must hold points (M, *) of the shape of a {tuple(a.shape)}, got {tuple(b.shape)}"
        )
    check_finite(a, "a")
    check_finite(b, "b")
    a, b = (x.detach().to("cpu", torch.float64).flatten(1) for x in (a, b))
    # Without this mode cdist expands the square, which loses half of the digits of small distances.
    cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
    squared, log = ot.emd2([], [], cost, numItermax=100_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"the transport plan must be optimal, got {log['warning']}")
    return max(float(squared), 0.0) ** 0.5
