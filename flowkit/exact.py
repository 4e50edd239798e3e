"""Closed-form flows: velocities with known solutions, for tests and for teaching.

Both flows are the marginal velocity ``v(x, t) = E[x1 − x0 | x_t = x]`` of the linear path
``x_t = (1−t) x0 + t x1``. The ends are independent: ``x0 ~ N(0, I)``, and the data are Gaussian or
a mixture of Gaussians. Velocities, solutions and samples have the type of the states. They are
computed, and log densities are given, in float32 at least.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowkit.checks import at_least_float32, check_finite, check_samples, expand_like
from flowkit.types import Cond


@dataclass(frozen=True, eq=False)
class GaussianFlow:
    """Flow from ``N(0, I)`` to ``N(mean, std²)``, elementwise.

    With ``s²(t) = (1−t)² + t² std²``, the marginal distribution is ``N(t mean, s²)``, the velocity
    is ``v = mean + (t std² − (1−t)) / s² · (x − t mean)``, and the solution is ``mean + std x0``.

    Args:
        mean: Mean of the data: a number, or a tensor with the shape of a sample.
        std: Standard deviation of the data: a number, or a tensor with the shape of a sample;
            positive.

    Raises:
        ValueError: If ``mean`` is not finite, or ``std`` not positive and finite.

    >>> flow = GaussianFlow(mean=2.0, std=0.5)
    >>> flow.solution(torch.ones(1, 1))
    tensor([[2.5000]])
    """

    mean: float | Tensor
    std: float | Tensor

    def __post_init__(self) -> None:
        mean, std = torch.as_tensor(self.mean), torch.as_tensor(self.std)
        if not bool(mean.isfinite().all()):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not bool(((std > 0) & std.isfinite()).all()):
            raise ValueError(f"std must be positive and finite, got {self.std}")

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``; ``cond`` has no effect."""
        wide = _wide(x)
        mean, std = self._parameters(wide)
        s = expand_like(t, x).to(mean.dtype)
        slope = (s * std**2 - (1 - s)) / ((1 - s) ** 2 + s**2 * std**2)
        return (mean + slope * (wide - s * mean)).to(x.dtype)

    def solution(self, x0: Tensor) -> Tensor:
        """Return the exact state ``mean + std x0 (B, *)`` at ``t = 1``, for the start ``x0``."""
        wide = _wide(x0)
        mean, std = self._parameters(wide)
        return (mean + std * wide).to(x0.dtype)

    def log_prob(self, x1: Tensor) -> Tensor:
        """Return the log density ``(B,)`` of data ``x1 (B, *)``, in nats."""
        x1 = _wide(x1)
        mean, std = self._parameters(x1)
        log_density = -0.5 * (((x1 - mean) / std) ** 2 + math.log(2 * math.pi)) - std.log()
        return log_density.flatten(1).sum(1)

    def _parameters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation in the type and on the device of ``x``."""
        mean, std = (
            torch.as_tensor(p, dtype=x.dtype, device=x.device) for p in (self.mean, self.std)
        )
        return mean, std


@dataclass(frozen=True, eq=False)
class MixtureFlow:
    """Flow from ``N(0, I)`` to the mixture ``Σ_k weights_k N(means_k, stds_k² I)``.

    The velocity is the mean of the components' Gaussian velocities, with the posterior probability
    of each component given ``x_t`` as its weight: ``r_k ∝ weights_k N(x; t means_k, ((1−t)² + t²
    stds_k²) I)``.

    Args:
        weights: ``(K,)``, positive; normalized to sum 1.
        means: ``(K, *)``; ``*`` is the shape of a sample.
        stds: ``(K,)``, positive.

    Raises:
        ValueError: If ``weights`` or ``stds`` are not ``K`` positive, finite numbers, or a mean is
            not finite.

    >>> flow = MixtureFlow(torch.ones(2), torch.tensor([[-2.0], [2.0]]), torch.full((2,), 0.5))
    >>> flow(torch.zeros(1, 1), torch.tensor([0.5]))
    tensor([[0.]])
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self) -> None:
        check_finite(self.means, "means")
        components = len(self.means)
        for name in ("weights", "stds"):
            value = getattr(self, name)
            good = (value > 0) & value.isfinite()
            if value.shape != (components,) or not bool(good.all()):
                raise ValueError(
                    f"{name} must be {components} positive, finite numbers, one per mean, "
                    f"got {value.tolist()}"
                )

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)`` at ``x (B, *)`` and ``t (B,)``; ``cond`` has no effect."""
        wide = _wide(x)
        t = t.to(wide.dtype)
        offset, s2 = self._offsets(wide, t), self._variances(t)
        slope = (t[:, None] * self.stds.to(t) ** 2 - (1 - t[:, None])) / s2
        velocity = self.means.to(wide) + _like(slope, offset) * offset
        posterior = self._log_joint(offset, s2).softmax(1)
        return (_like(posterior, offset) * velocity).sum(1).to(x.dtype)

    def log_prob(self, x1: Tensor) -> Tensor:
        """Return the log density ``(B,)`` of data ``x1 (B, *)``, in nats."""
        x1 = _wide(x1)
        t = x1.new_ones(len(x1))
        log_joint = self._log_joint(self._offsets(x1, t), self._variances(t))
        return log_joint.logsumexp(1) - 0.5 * x1[0].numel() * math.log(2 * math.pi)

    def sample(self, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw data ``(num_samples, *)`` from the mixture."""
        index = torch.multinomial(self.weights, num_samples, True, generator=generator)
        shape = (num_samples, *self.means.shape[1:])
        like = {"dtype": self.means.dtype, "device": self.means.device}
        noise = torch.randn(shape, generator=generator, **like)
        return self.means[index] + expand_like(self.stds[index], noise) * noise

    def _offsets(self, x: Tensor, t: Tensor) -> Tensor:
        """Return ``x − t means_k`` of shape ``(B, K, *)``."""
        return x[:, None] - expand_like(t, x[:, None]) * self.means.to(x)

    def _variances(self, t: Tensor) -> Tensor:
        """Return ``(1−t)² + t² stds_k²`` of shape ``(B, K)``."""
        return (1 - t[:, None]) ** 2 + t[:, None] ** 2 * self.stds.to(t) ** 2

    def _log_joint(self, offset: Tensor, s2: Tensor) -> Tensor:
        """Return ``log weights_k N(x; t means_k, s2 I)`` of shape ``(B, K)``, up to a constant."""
        d = offset[0, 0].numel()
        log_weights = (self.weights / self.weights.sum()).to(offset).log()
        return log_weights - offset.square().flatten(2).sum(2) / (2 * s2) - 0.5 * d * s2.log()


def _wide(x: Tensor) -> Tensor:
    """Return states ``(B, *)`` in float32 at least."""
    check_samples(x, "x", floating=True)
    return x.to(at_least_float32(x.dtype))


def _like(value: Tensor, x: Tensor) -> Tensor:
    """Reshape ``value (B, K)`` to broadcast against ``x (B, K, *)``."""
    return value.reshape(*value.shape, *(1,) * (x.ndim - 2))
