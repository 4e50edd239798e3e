"""Probability paths: where a pair ``(x0, x1)`` is at time ``t``, and how fast it moves.

Every path here is ``x_t = a(t) x1 + b(t) x0`` (plus noise of its own for two of them) with
``a(0) = b(1) = 0`` in the limit, so that ``t = 0`` is the source and ``t = 1`` the data. A
network trained on the velocity ``u = dx_t/dt`` learns ``v(x, t) = E[u | x_t = x]``, from which
the expected data, the expected noise and the score follow by algebra.

Sources: Lipman et al., *Flow Matching for Generative Modeling*, 2022 (arXiv 2210.02747);
Albergo & Vanden-Eijnden, *Building Normalizing Flows with Stochastic Interpolants*, 2022
(arXiv 2209.15571); Tong et al., *Improving and generalizing flow-based generative models with
minibatch optimal transport*, 2023 (arXiv 2302.00482).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.func import jvp

from flowkit.checks import check_at_least, check_same_shape, check_times, expand_like


class PathSample(NamedTuple):
    """A point of a path: state ``x_t (B, *)``, time ``t (B,)``, target velocity ``u (B, *)``."""

    x_t: Tensor
    t: Tensor
    u: Tensor


class Coefficients(NamedTuple):
    """``x_t = a x1 + b x0`` and the derivatives ``da = a'(t)``, ``db = b'(t)``, all at ``t``."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


@runtime_checkable
class Path(Protocol):
    """What training needs of a path."""

    def sample(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> PathSample:
        """Return ``x_t`` and ``u`` for pairs ``(x0, x1)`` of shape ``(B, *)`` at ``t (B,)``."""
        ...


class Interpolant:
    """What all paths ``x_t = a(t) x1 + b(t) x0 + sigma ε`` share; only the coefficients differ."""

    sigma: float = 0.0

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return ``a, b, a', b'`` at ``t``, elementwise."""
        raise NotImplementedError

    def sample(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> PathSample:
        """Interpolate pairs: ``x_t = a x1 + b x0 + sigma ε`` and ``u = a' x1 + b' x0``.

        Args:
            x0: Source samples ``(B, *)``.
            x1: Data ``(B, *)``.
            t: Times ``(B,)`` in [0, 1].
            generator: Draws ``ε`` where the path has noise of its own.

        Raises:
            ValueError: If shapes differ or a time lies outside [0, 1].
        """
        check_same_shape(x0, x1)
        check_times(t, len(x1))
        a, b, da, db = self.coefficients(expand_like(t, x1))
        x_t = a * x1 + b * x0
        if self.sigma:
            x_t = x_t + self.sigma * noise_like(x1, generator)
        return PathSample(x_t.to(x1.dtype), t, (da * x1 + db * x0).to(x1.dtype))

    def to_data(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Expected data ``E[x1 | x_t]``: ``(s² v − b b' x_t) / (a' s² − a b b')``.

        Here ``s² = b² + sigma²``; with ``sigma = 0`` this is plain algebra for any source, with
        ``sigma > 0`` it takes the source to be standard normal.
        """
        a, b, da, db = self._checked(x_t, t, v)
        if not self.sigma:
            return (b * v - db * x_t) / (da * b - a * db)
        s2 = b**2 + self.sigma**2
        return (s2 * v - b * db * x_t) / (da * s2 - a * b * db)

    def to_noise(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Expected source ``E[x0 | x_t]`` from the velocity, ``(a' x_t − a v) / (a' b − a b')``.

        With ``sigma > 0`` it is ``b (x_t − a E[x1 | x_t]) / (b² + sigma²)``, for a standard
        normal source.
        """
        a, b, da, db = self._checked(x_t, t, v)
        if not self.sigma:
            return (da * x_t - a * v) / (da * b - a * db)
        return b * (x_t - a * self.to_data(x_t, t, v)) / (b**2 + self.sigma**2)

    def to_score(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Score ``∇ log p_t(x_t) = −(x_t − a E[x1 | x_t]) / (b² + sigma²)`` of a normal source.

        Without noise of its own a path's score is unbounded where ``b = 0``, at ``t = 1``.

        Raises:
            ValueError: If ``t = 1`` occurs on a path that ends in the data, without any noise.
        """
        if not self.sigma:
            b = self._checked(x_t, t, v).b
            if bool(((expand_like(t, b) == 1) & (b < 1e-6)).any()):
                raise ValueError(
                    "t must lie in [0, 1) for to_score, got 1.0; the score is unbounded there"
                )
            return -self.to_noise(x_t, t, v) / b
        a, b, _, _ = self._checked(x_t, t, v)
        return -(x_t - a * self.to_data(x_t, t, v)) / (b**2 + self.sigma**2)

    def _checked(self, x_t: Tensor, t: Tensor, v: Tensor) -> Coefficients:
        check_same_shape(v, x_t, ("v", "x_t"))
        check_times(t, len(x_t))
        return self.coefficients(expand_like(t, x_t))


@dataclass(frozen=True)
class Linear(Interpolant):
    """The straight path ``x_t = (1 − (1−σ_min) t) x0 + t x1 + σ ε``, ``u = x1 − (1−σ_min) x0``.

    ``sigma_min`` is Lipman et al. (2022), equation 22; ``sigma`` is the constant width of Tong et
    al. (2023), equation 14, whose ``ε`` does not move and so does not enter ``u``. Both default
    to 0: rectified flow (Liu et al. 2022, arXiv 2209.03003).

    >>> x0, x1 = torch.zeros(1, 2), torch.ones(1, 2)
    >>> Linear().sample(x0, x1, torch.tensor([0.25])).x_t
    tensor([[0.2500, 0.2500]])
    """

    sigma_min: float = 0.0
    sigma: float = 0.0

    def __post_init__(self):
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1), got {self.sigma_min}")
        check_at_least(self.sigma, 0, "sigma")

    def coefficients(self, t: Tensor) -> Coefficients:
        """``a = t``, ``b = 1 − (1 − sigma_min) t``."""
        one = torch.ones_like(t)
        return Coefficients(t, 1 - (1 - self.sigma_min) * t, one, (self.sigma_min - 1) * one)


@dataclass(frozen=True)
class Cosine(Interpolant):
    """The trigonometric path ``x_t = sin(πt/2) x1 + cos(πt/2) x0``, of constant variance.

    Source: Albergo & Vanden-Eijnden (2022), equation 5.

    >>> Cosine().sample(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1)).x_t
    tensor([[1.]])
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """``a = sin(πt/2)``, ``b = cos(πt/2)``."""
        half_pi = math.pi / 2
        # cos(πt/2) as a sine, which is exactly 0 at t = 1 also in float32
        a, b = torch.sin(half_pi * t), torch.sin(half_pi * (1 - t))
        return Coefficients(a, b, half_pi * b, -half_pi * a)


@dataclass(frozen=True)
class VP(Interpolant):
    """The variance-preserving diffusion path, ``x_t = α(t) x1 + √(1 − α(t)²) x0``.

    ``log α(t) = −¼ (1−t)² (beta_max − beta_min) − ½ (1−t) beta_min``: Lipman et al. (2022),
    equation 18, with time running from noise to data. At ``t = 0`` a trace ``α(0)`` of the data is
    left, and at ``t = 1`` the velocity of the noise is unbounded (a number of order 1e18 there).

    >>> VP().sample(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1)).x_t
    tensor([[1.]])
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 <= self.beta_min < self.beta_max:
            raise ValueError(
                "beta_min must lie in [0, beta_max), "
                f"got beta_min={self.beta_min} and beta_max={self.beta_max}"
            )

    def coefficients(self, t: Tensor) -> Coefficients:
        """``a = α(t)``, ``b = √(1 − α(t)²)``."""
        s, spread = 1 - t, self.beta_max - self.beta_min
        log_a = -0.25 * s**2 * spread - 0.5 * s * self.beta_min
        # the floor keeps u and the conversions free of 0/0 at t = 1
        a, b = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt().clamp_min(1e-20)
        da = a * (0.5 * s * spread + 0.5 * self.beta_min)
        return Coefficients(a, b, da, -a * da / b)


@dataclass(frozen=True)
class Affine(Interpolant):
    """Any path ``x_t = a(t) x1 + b(t) x0``, with derivatives by forward differentiation.

    Args:
        a: Weight of the data, a torch function with ``a(0) = 0`` and ``a(1) = 1``.
        b: Weight of the source, with ``b(1) = 0``.

    Raises:
        ValueError: If an end point is missed by more than 1e-3, so that source and data are
            not where the sampler looks for them.

    >>> quadratic = Affine(a=lambda t: t**2, b=lambda t: 1 - t**2)
    >>> quadratic.sample(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.5])).u
    tensor([[1.]])
    """

    a: Callable[[Tensor], Tensor]
    b: Callable[[Tensor], Tensor]

    def __post_init__(self):
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        for name, function, rule in (("a", self.a, (0, 1)), ("b", self.b, (None, 0))):
            for time, value, wanted in zip((0, 1), function(ends).tolist(), rule, strict=True):
                if wanted is not None and not abs(value - wanted) <= 1e-3:
                    raise ValueError(
                        f"{name} must be {wanted} at t = {time}, got {value}; "
                        "a weighs the data (t = 1), b the noise (t = 0)"
                    )

    def coefficients(self, t: Tensor) -> Coefficients:
        """``a(t), b(t)`` and their forward derivatives."""
        (a, da), (b, db) = (jvp(f, (t,), (torch.ones_like(t),))[:2] for f in (self.a, self.b))
        return Coefficients(a, b, da, db)


@dataclass(frozen=True)
class BrownianBridge:
    """The bridge ``x_t = (1−t) x0 + t x1 + σ √(t(1−t)) ε`` of diffusion ``σ``.

    Its conditional velocity is ``u = x1 − x0 + σ (1−2t) / (2 √(t(1−t))) ε``, unbounded at both
    ends, where this class leaves the (almost surely never drawn) second term out. With
    `couplings.Sinkhorn(reg=2 σ²)` it is the Schrödinger bridge of Tong et al. (2023), equation 17.

    >>> x0, x1 = torch.zeros(1, 2), torch.ones(1, 2)
    >>> BrownianBridge(sigma=0.5).sample(x0, x1, torch.ones(1)).x_t
    tensor([[1., 1.]])
    """

    sigma: float

    def __post_init__(self):
        check_at_least(self.sigma, 0, "sigma")

    def sample(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> PathSample:
        """Draw a point of the bridge and its velocity.

        Args:
            x0: Source samples ``(B, *)``.
            x1: Data ``(B, *)``.
            t: Times ``(B,)`` in [0, 1].
            generator: Draws ``ε``.

        Raises:
            ValueError: If shapes differ or a time lies outside [0, 1].
        """
        check_same_shape(x0, x1)
        check_times(t, len(x1))
        s = expand_like(t, x1)
        width = (s * (1 - s)).sqrt()
        slope = torch.where(width > 0, (1 - 2 * s) / (2 * width), 0.0)
        noise = self.sigma * noise_like(x1, generator)
        x_t, u = (1 - s) * x0 + s * x1 + width * noise, x1 - x0 + slope * noise
        return PathSample(x_t.to(x1.dtype), t, u.to(x1.dtype))


def noise_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal noise of the shape, type and device of ``x``.

    >>> noise_like(torch.zeros(2, 3, dtype=torch.float64)).dtype
    torch.float64
    """
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
