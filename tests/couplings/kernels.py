"""Samples and predictions that the tests of Gibbs weights share."""

import numpy as np
import torch

from flowkit.couplings import (
    Gibbs,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(batch: int, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, batch, *shape, generator=seeded(seed))
    return x[0], x[1]


def weights(coupling: Gibbs, x0, x1, cond=None) -> torch.Tensor:
    return coupling.pair(x0, x1, cond).log_weight.double().exp()


def quadrature(mean: float = 0.0, std: float = 1.0):
    """Weights, ``x0`` and ``x1``: all pairs of Gauss-Hermite nodes of N(0, 1) and N(mean, std²)."""
    nodes, mass = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(80))
    x0, x1 = torch.meshgrid(nodes, mean + std * nodes, indexing="ij")
    return torch.outer(mass, mass).ravel() / mass.sum() ** 2, x0.reshape(-1, 1), x1.reshape(-1, 1)


def weighted(coupling: Gibbs, mean: float = 0.0, std: float = 1.0):
    """Multiply the nodes' weights by the coupling's: expectations under ``q`` without sampling."""
    mass, x0, x1 = quadrature(mean, std)
    return mass * weights(coupling, x0, x1), x0, x1


def moments(w, x0, x1):
    """Weighted means and the covariance matrix of one-dimensional pairs."""
    z = torch.cat([x0, x1], 1).double()
    mean = (w[:, None] * z).sum(0) / w.sum()
    return mean, (w[:, None] * (z - mean)).T @ (z - mean) / w.sum()


def generated(w, x0, x1) -> tuple[float, float]:
    """Mean and deviation of N(0, 1) carried along the flow that regression on the pairs learns.

    Of Gaussian pairs the flow is affine: it maps the source's tilted law onto the data's.
    """
    mean, cov = moments(w, x0, x1)
    std = (cov[1, 1] / cov[0, 0]).sqrt()
    return (mean[1] - std * mean[0]).item(), std.item()


def two_classes(batch: int):
    x0, noise = normals(batch, 1)
    label = torch.arange(batch) % 2
    return x0, noise + 3 * label[:, None], label
