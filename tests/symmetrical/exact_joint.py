"""Closed-form networks of joint flows: ``network(state, times)``, state = [image, code]."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianPair:
    """Image and label are standard normal numbers of correlation ρ; one time."""

    rho: float

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 + t**2
        cross = t * (1 - t) * self.rho
        slope = 2 * t - 1
        # rows: E[v_x | ...], E[v_y | ...]; columns: x_t, y_t
        covariance = torch.stack([variance, cross, cross, variance], 1).unflatten(1, (2, 2))
        moving = torch.stack([slope, (1 - t) * self.rho, -t * self.rho, slope], 1)
        gain = torch.linalg.solve(covariance, moving.unflatten(1, (2, 2)), left=False)
        return (gain @ state[..., None])[..., 0]


@dataclass(frozen=True)
class ClassMixture:
    """Images N(means_k, std²) and codes N(codes_k, code_std²) of equally likely classes k.

    Takes times ``(B,)`` (``s = t``) or ``(B, 2)``.
    """

    means: Tensor  # (K, d)
    codes: Tensor  # (K, c)
    std: float
    code_std: float = 0.0

    def posterior(self, x: Tensor) -> Tensor:
        """``p(k | x)`` of clean images ``(B, d)``."""
        return (-((x[:, None] - self.means) ** 2).sum(-1) / (2 * self.std**2)).softmax(1)

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        t, s = (t, t) if t.ndim == 1 else t.unbind(1)
        t, s = t[:, None, None], s[:, None, None]
        x, y = state[:, None].split([self.means.shape[1], self.codes.shape[1]], 2)
        # each (B, K, ·): offsets from a class's mean path, and variances of the path
        dx, dy = x - t * self.means, y - (1 - s) * self.codes
        var_x = (1 - t) ** 2 + t**2 * self.std**2
        var_y = s**2 + (1 - s) ** 2 * self.code_std**2
        both = (dx**2 / var_x).sum(-1, keepdim=True) + (dy**2 / var_y).sum(-1, keepdim=True)
        share = (-both / 2).softmax(1)
        v_x = self.means + (t * self.std**2 - (1 - t)) / var_x * dx
        v_y = -self.codes + (s - (1 - s) * self.code_std**2) / var_y * dy
        return torch.cat([(share * v_x).sum(1), (share * v_y).sum(1)], 1)
