"""Probability paths: the state ``x_t`` between ``x0`` and ``x1`` at time ``t``, and its velocity.

Every path here is ``x_t = a(t) x1 + b(t) x0``; two paths can add noise. At ``t = 0`` the state is
the source (``a(0) = 0``), at ``t = 1`` the state is the data (``b(1) = 0``). Small exceptions, such
as ``sigma_min``, are stated by the class. A network trained on the velocity ``u = dx_t/dt`` learns
``v(x, t) = E[u | x_t = x]``. The expected data, the expected noise and the score follow from ``v``
by algebra.

Coefficients are computed in float32 at least. States, velocities and conversions have the type of
``x1`` or ``x_t``, whatever the type of the times is.

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

from flowkit import checks


class PathSample(NamedTuple):
    """Point of a path: state ``x_t (B, *)``, time ``t (B,)``, target velocity ``u (B, *)``."""

    x_t: Tensor
    t: Tensor
    u: Tensor


class Coefficients(NamedTuple):
    """Coefficients ``a, b`` of ``x_t = a x1 + b x0`` at ``t``, and their derivatives ``da, db``."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


@runtime_checkable
class Path(Protocol):
    """Protocol of a path: an object with the method ``sample``."""

    def sample(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> PathSample:
        """Return ``x_t`` and ``u`` for pairs ``x0, x1 (B, *)`` at times ``t (B,)`` in [0, 1]."""
        ...


class Interpolant:
    """Common part of all paths ``x_t = a(t) x1 + b(t) x0 + sigma ε`` with ``ε ~ N(0, I)``.

    Subclasses define the coefficients ``a`` and ``b``. The noise ``ε`` does not depend on time, so
    it does not enter ``u``.
    """

    sigma: float = 0.0

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return ``a, b, a', b'`` at ``t``, elementwise.

        Raises:
            NotImplementedError: If a subclass does not define the coefficients.
        """
        raise NotImplementedError

    def sample(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> PathSample:
        """Interpolate pairs: ``x_t = a x1 + b x0 + sigma ε`` and ``u = a' x1 + b' x0``.

        Args:
            x0: Source samples ``(B, *)``.
            x1: Data ``(B, *)``.
            t: Times ``(B,)`` in [0, 1].
            generator: Source of ``ε``, for ``sigma > 0``.

        Raises:
            TypeError: If samples or times are not floats.
            ValueError: If shapes differ, a time lies outside [0, 1], or the velocity is unbounded
                at a time.
        """
        a, b, da, db = self._checked(x0, x1, t)
        _refuse(~torch.isfinite(da + db), t, "the velocity is finite")
        x_t = a * x1 + b * x0
        if self.sigma:
            x_t = x_t + self.sigma * noise_like(x1, generator)
        return PathSample(x_t.to(x1.dtype), t, (da * x1 + db * x0).to(x1.dtype))

    def to_data(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return the expected data ``E[x1 | x_t]`` for states and velocities ``x_t, v (B, *)``.

        The equation is ``(s² v − b b' x_t) / (a' s² − a b b')`` with ``s² = b² + sigma²``. With
        ``sigma = 0``, the equation is exact for any source; at ``b = 0`` it becomes ``x_t / a``.
        With ``sigma > 0``, it assumes a standard normal source.

        Raises:
            TypeError: If states or times are not floats.
            ValueError: If shapes differ, a time lies outside [0, 1], or the velocity at a time
                holds nothing of the data, as at ``a = a' = 0``.

        >>> Linear().to_data(torch.zeros(1, 2), torch.tensor([0.5]), torch.ones(1, 2))
        tensor([[0.5000, 0.5000]])
        """
        a, b, da, db = self._checked(v, x_t, t, ("v", "x_t"))
        if self.sigma:
            s2 = b**2 + self.sigma**2
            of_v, of_x, divisor = s2, -b * db, da * s2 - a * b * db
        else:
            of_v, of_x, divisor = b, -db, da * b - a * db
            of_v, of_x, divisor = _at(b == 0, (0, 1, a), (of_v, of_x, divisor))
        _refuse(~divisor.isfinite() | (divisor == 0), t, "the velocity determines the data")
        return (of_v / divisor * v + of_x / divisor * x_t).to(x_t.dtype)

    def to_noise(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return the expected source ``E[x0 | x_t]`` for states and velocities ``x_t, v (B, *)``.

        The equation is ``(a' x_t − a v) / (a' b − a b')`` with ``sigma = 0``, for any source; at
        ``a = 0`` it becomes ``x_t / b``. With ``sigma > 0``, it is
        ``b (x_t − a E[x1 | x_t]) / (b² + sigma²)``, for a standard normal source.

        Raises:
            TypeError: If states or times are not floats.
            ValueError: If shapes differ, a time lies outside [0, 1], or the velocity at a time
                holds nothing of the source: at ``b = 0``, if ``b'`` is 0 or unbounded there.

        >>> Linear().to_noise(torch.zeros(1, 2), torch.tensor([0.5]), torch.ones(1, 2))
        tensor([[-0.5000, -0.5000]])
        """
        a, b, da, db = self._checked(v, x_t, t, ("v", "x_t"))
        if self.sigma:
            noise = b * (x_t - a * self.to_data(x_t, t, v)) / (b**2 + self.sigma**2)
            return noise.to(x_t.dtype)
        of_v, of_x, divisor = _at(a == 0, (0, 1, b), (-a, da, da * b - a * db))
        _refuse(~divisor.isfinite() | (divisor == 0), t, "the velocity determines the noise")
        return (of_v / divisor * v + of_x / divisor * x_t).to(x_t.dtype)

    def to_score(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return the score ``∇ log p_t(x_t)`` for states and velocities ``x_t, v (B, *)``.

        The equation is ``−(x_t − a E[x1 | x_t]) / (b² + sigma²)``, for a standard normal source.
        With ``sigma = 0``, the score is unbounded at ``b = 0``, so at ``t = 1``.

        Raises:
            TypeError: If states or times are not floats.
            ValueError: If shapes differ, a time lies outside [0, 1], or ``t = 1`` with ``b(1) = 0``
                and ``sigma = 0``.

        >>> Linear().to_score(torch.zeros(1, 2), torch.tensor([0.5]), torch.ones(1, 2))
        tensor([[1., 1.]])
        """
        a, b, _, _ = self._checked(v, x_t, t, ("v", "x_t"))
        if self.sigma:
            score = -(x_t - a * self.to_data(x_t, t, v)) / (b**2 + self.sigma**2)
            return score.to(x_t.dtype)
        if bool(((checks.expand_like(t, b) == 1) & (b < 1e-6)).any()):
            raise ValueError(
                "t must lie in [0, 1) for to_score, got 1.0; the score is unbounded at t = 1"
            )
        return (-self.to_noise(x_t, t, v) / b).to(x_t.dtype)

    def _checked(
        self, x: Tensor, like: Tensor, t: Tensor, names: tuple[str, str] = ("x0", "x1")
    ) -> Coefficients:
        """Check two tensors ``(B, *)`` and times, and return the coefficients at the times."""
        return self.coefficients(_checked_times(x, like, t, names))


@dataclass(frozen=True)
class Linear(Interpolant):
    """Straight path ``x_t = (1 − (1−σ_min) t) x0 + t x1 + σ ε``, ``u = x1 − (1−σ_min) x0``.

    With the defaults (both widths are 0) this is the path of rectified flow (Liu et al., 2022,
    arXiv 2209.03003).

    Args:
        sigma_min: Width of the source that remains at ``t = 1``, in [0, 1): Lipman et al. (2022),
            equation 22.
        sigma: Constant width, at least 0: Tong et al. (2023), equation 14. The noise ``ε`` does not
            depend on time, so it does not enter ``u``.

    Raises:
        ValueError: If a width is out of its range or not finite.

    >>> x0, x1 = torch.zeros(1, 2), torch.ones(1, 2)
    >>> Linear().sample(x0, x1, torch.tensor([0.25])).x_t
    tensor([[0.2500, 0.2500]])
    """

    sigma_min: float = 0.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"sigma_min must lie in [0, 1), got {self.sigma_min}")
        checks.check_number(self.sigma, "sigma")
        checks.check_at_least(self.sigma, 0, "sigma")

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return ``a = t``, ``b = 1 − (1 − sigma_min) t`` and their derivatives."""
        one = torch.ones_like(t)
        return Coefficients(t, 1 - (1 - self.sigma_min) * t, one, (self.sigma_min - 1) * one)


@dataclass(frozen=True)
class Cosine(Interpolant):
    """Trigonometric path ``x_t = sin(πt/2) x1 + cos(πt/2) x0``, of constant variance.

    Source: Albergo & Vanden-Eijnden (2022), equation 5.

    >>> Cosine().sample(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1)).x_t
    tensor([[1.]])
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return ``a = sin(πt/2)``, ``b = cos(πt/2)`` and their derivatives."""
        half_pi = math.pi / 2
        # This form of cos(πt/2) is exactly 0 at t = 1, also in float32.
        a, b = torch.sin(half_pi * t), torch.sin(half_pi * (1 - t))
        return Coefficients(a, b, half_pi * b, -half_pi * a)


@dataclass(frozen=True)
class VP(Interpolant):
    """Variance-preserving diffusion path ``x_t = α(t) x1 + √(1 − α(t)²) x0``.

    The coefficient is ``log α(t) = −¼ (1−t)² (beta_max − beta_min) − ½ (1−t) beta_min``: Lipman et
    al. (2022), equation 18, with time from noise to data. At ``t = 0``, a small part ``α(0)`` of
    the data remains. With ``beta_min > 0``, the velocity of the noise is unbounded at ``t = 1``, so
    `sample` refuses this time. With ``beta_min = 0``, the velocity there is
    ``−√(beta_max / 2) x0``.

    Args:
        beta_min: Noise rate at the data, at least 0.
        beta_max: Noise rate at the noise, above ``beta_min``, finite.

    Raises:
        ValueError: If ``beta_min`` lies outside [0, ``beta_max``) or ``beta_max`` is not finite.

    >>> VP(beta_min=0, beta_max=8).sample(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1)).u
    tensor([[-2.]])
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        checks.check_number(self.beta_max, "beta_max")
        if not 0 <= self.beta_min < self.beta_max:
            raise ValueError(
                "beta_min must lie in [0, beta_max), "
                f"got beta_min={self.beta_min} and beta_max={self.beta_max}"
            )

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return ``a = α(t)``, ``b = √(1 − α(t)²)`` and their derivatives."""
        s, spread = 1 - t, self.beta_max - self.beta_min
        rate = s * spread + self.beta_min
        minus_2_log_a = s * (0.5 * s * spread + self.beta_min)
        a = torch.exp(-0.5 * minus_2_log_a)
        b2 = -torch.expm1(-minus_2_log_a)
        # rate / b, whose parts are both 0 at t = 1 if beta_min is 0.
        if self.beta_min == 0:
            share = torch.where(minus_2_log_a > 0, minus_2_log_a / b2, 1.0)
            rate_over_b = (2 * spread * share).sqrt()
        else:
            rate_over_b = rate / b2.sqrt()
        return Coefficients(a, b2.sqrt(), 0.5 * a * rate, -0.5 * a.square() * rate_over_b)


@dataclass(frozen=True)
class Affine(Interpolant):
    """Path ``x_t = a(t) x1 + b(t) x0`` of any coefficients.

    The derivatives of the coefficients are computed by forward differentiation.

    Args:
        a: Weight of the data, a torch function with ``a(0) = 0`` and ``a(1) = 1``.
        b: Weight of the source, a torch function with ``b(1) = 0``.

    Raises:
        ValueError: If a value at an end point is not finite or differs by more than 1e-3. The
            sampler starts at the source and ends at the data, so the path must do the same.

    >>> quadratic = Affine(a=lambda t: t**2, b=lambda t: 1 - t**2)
    >>> quadratic.sample(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.5])).u
    tensor([[1.]])
    """

    a: Callable[[Tensor], Tensor]
    b: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        for name, function, rule in (("a", self.a, (0, 1)), ("b", self.b, (None, 0))):
            for time, value, wanted in zip((0, 1), function(ends).tolist(), rule, strict=True):
                checks.check_number(value, f"{name} at t = {time}")
                if wanted is not None and not abs(value - wanted) <= 1e-3:
                    raise ValueError(
                        f"{name} must be {wanted} at t = {time}, got {value}; "
                        "a weighs the data (t = 1), b the noise (t = 0)"
                    )

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return ``a(t), b(t)`` and their derivatives by forward differentiation."""
        (a, da), (b, db) = (jvp(f, (t,), (torch.ones_like(t),))[:2] for f in (self.a, self.b))
        return Coefficients(a, b, da, db)


@dataclass(frozen=True)
class BrownianBridge:
    """Brownian bridge ``x_t = (1−t) x0 + t x1 + σ √(t(1−t)) ε`` of diffusion ``σ``.

    Its conditional velocity is ``u = x1 − x0 + σ (1−2t) / (2 √(t(1−t))) ε``. The second term is
    unbounded at both ends. Exactly at ``t = 0`` and ``t = 1``, which are drawn with probability 0,
    this class leaves the second term out. With `couplings.Sinkhorn(reg=2 σ²)`, the path is the
    Schrödinger bridge of Tong et al. (2023), equation 17.

    Args:
        sigma: Diffusion ``σ``, at least 0.

    Raises:
        ValueError: If ``sigma`` is negative or not finite.

    >>> x0, x1 = torch.zeros(1, 2), torch.ones(1, 2)
    >>> BrownianBridge(sigma=0.5).sample(x0, x1, torch.ones(1)).x_t
    tensor([[1., 1.]])
    """

    sigma: float

    def __post_init__(self) -> None:
        checks.check_number(self.sigma, "sigma")
        checks.check_at_least(self.sigma, 0, "sigma")

    def sample(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: torch.Generator | None = None
    ) -> PathSample:
        """Draw a point of the bridge and its velocity.

        Args:
            x0: Source samples ``(B, *)``.
            x1: Data ``(B, *)``.
            t: Times ``(B,)`` in [0, 1].
            generator: Source of ``ε``.

        Raises:
            TypeError: If samples or times are not floats.
            ValueError: If shapes differ or a time lies outside [0, 1].
        """
        s = _checked_times(x0, x1, t)
        width = (s * (1 - s)).sqrt()
        slope = torch.where(width > 0, (1 - 2 * s) / (2 * width), 0.0)
        noise = self.sigma * noise_like(x1, generator)
        x_t, u = (1 - s) * x0 + s * x1 + width * noise, x1 - x0 + slope * noise
        return PathSample(x_t.to(x1.dtype), t, u.to(x1.dtype))


def _checked_times(
    x: Tensor, like: Tensor, t: Tensor, names: tuple[str, str] = ("x0", "x1")
) -> Tensor:
    """Check two tensors ``(B, *)`` and times ``(B,)``; return the times as ``(B, 1, ..., 1)``."""
    for value, name in zip((x, like), names, strict=True):
        checks.check_samples(value, name, floating=True)
    checks.check_same_shape(x, like, names)
    checks.check_times(t, len(like))
    return checks.expand_like(t, like).to(checks.at_least_float32(t.dtype))


def _at(
    where: Tensor, limits: tuple[float, float, Tensor], values: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Replace values by their limits, times at which ``where`` holds."""
    return tuple(torch.where(where, a, b) for a, b in zip(limits, values, strict=True))


def _refuse(where: Tensor, t: Tensor, rule: str) -> None:
    """Raise an error if the condition ``where`` holds at a time."""
    if bool(where.any()):
        raise ValueError(
            f"t must be a time at which {rule}, got {t[where.flatten()][0].item()}; "
            "draw or choose times between 0 and 1"
        )


def noise_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal noise of the shape, type and device of ``x``.

    >>> noise_like(torch.zeros(2, 3, dtype=torch.float64)).dtype
    torch.float64
    """
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
