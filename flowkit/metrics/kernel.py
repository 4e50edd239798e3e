"""Kernel distance between two sets of features (unbiased squared MMD)."""

from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_between


class KernelDistance(NamedTuple):
    """Mean and standard deviation over random subsets."""

    mean: float
    std: float


def kid(
    a: Tensor,
    b: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """Unbiased squared MMD with the kernel ``(xᵀy / F + 1)³``, averaged over random subsets.

    Unlike the Fréchet distance it has no bias at any sample count, so it may come out negative
    for sets that agree.

    Source: Bińkowski et al. 2018 (arXiv 1801.01401); computed by torchmetrics'
    ``poly_mmd``, here in float64.

    Args:
        a: Features ``(N, F)``.
        b: Features ``(M, F)``.
        subsets: Number of random subsets.
        subset_size: Samples of each set in a subset, drawn without replacement.
        generator: Draws the subsets; on the CPU.

    Returns:
        Mean and standard deviation over the subsets. The standard deviation is that of one
        subset's value; subsets overlap, so it says nothing certain about the mean's error.

    Raises:
        ValueError: If shapes differ or ``subset_size`` is not in [2, min(N, M)].

    >>> g = torch.Generator().manual_seed(0)
    >>> a, b = torch.randn(2, 500, 8, generator=g)
    >>> abs(kid(a, b, 10, 200, g).mean) < 0.01 < kid(a, b + 1, 10, 200, g).mean
    True
    """
    from torchmetrics.image.kid import poly_mmd

    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"b must have shape (M, F) beside a {tuple(a.shape)}, got {tuple(b.shape)}"
        )
    check_at_least(subsets, 1, "subsets")
    check_between(subset_size, 2, min(len(a), len(b)), "subset_size")
    a, b = a.double(), b.double()
    values = torch.empty(subsets, dtype=torch.float64)
    for i in range(subsets):
        rows_a = torch.randperm(len(a), generator=generator)[:subset_size].to(a.device)
        rows_b = torch.randperm(len(b), generator=generator)[:subset_size].to(b.device)
        values[i] = poly_mmd(a[rows_a], b[rows_b])
    return KernelDistance(values.mean().item(), values.std(correction=0).item())
