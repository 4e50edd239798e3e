"""Fields and helpers that the tests of BOSS share."""

import math

import torch

from flowkit.exact import MixtureFlow

F64 = torch.float64


def ring(std, dtype=torch.float32):
    angles = 2 * math.pi * torch.arange(8, dtype=dtype) / 8
    means = 4 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return MixtureFlow(torch.ones(8, dtype=dtype), means, torch.full((8,), std, dtype=dtype))


def noise(count, *shape, seed=0, dtype=torch.float32):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear_in_time(x, t, cond=None):
    return (2 * t[:, None]).expand(x.shape).to(x.dtype)
