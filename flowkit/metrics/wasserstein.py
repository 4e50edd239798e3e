"""Exact Wasserstein distance between two sets of points."""

import torch
from torch import Tensor

from flowkit.checks import check_finite


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
