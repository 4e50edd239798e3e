"""Velocities, data and an operator with known answers, for the tests of FlowOpt."""

import math

import torch

from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.sampling import ODESampler

RIGHT, LEFT, MIDDLE = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64)  # for `steered`
CENTERED = GaussianFlow(0.0, 0.5)
MODES = MixtureFlow(torch.ones(2), torch.tensor([[-2.0], [2.0]]), torch.full((2,), 0.5))


def data(batch=6, dim=3):
    return torch.randn(batch, dim, dtype=torch.float64)


def slope(n):
    low, high = ODESampler(n)(CENTERED, torch.tensor([[0.0], [1.0]]).double())[:, 0]
    return (high - low).item()


def linear(matrix):
    """The field whose single Euler step is the matrix."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    return lambda x, t, cond=None: x @ (matrix - torch.eye(len(matrix), dtype=x.dtype)).T


def rotation(degrees, scale=2.0):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return scale * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def steered(x, t, cond):
    """The exact flow to N((cond, 0), .25 I)."""
    mean = torch.zeros_like(x)
    mean[:, 0] = cond
    slope = ((t * 0.25 - (1 - t)) / ((1 - t) ** 2 + t**2 * 0.25))[:, None]
    return mean + slope * (x - t[:, None] * mean)


def bimodal():
    generator = torch.Generator().manual_seed(0)
    return MODES.sample(400, generator)


class Counted:
    """A network that counts its calls."""

    def __init__(self, velocity=CENTERED):
        self.velocity, self.calls = velocity, 0

    def __call__(self, x, t, cond=None):
        self.calls += 1
        return self.velocity(x, t, cond)


class Mean:
    """Averages of neighboring pairs: super-resolution by two."""

    def __call__(self, x):
        return x.reshape(len(x), -1, 2).mean(-1)

    def adjoint(self, y):
        return y.repeat_interleave(2, 1) / 2
