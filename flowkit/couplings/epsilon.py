"""Which ε to train Gibbs weights with, from samples alone."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from flowkit.checks import check_choice, check_finite
from flowkit.couplings.transport import Cost, cost_matrix, points

Target = Literal["elbow", "ess", "corr"]


class EpsilonChoice(NamedTuple):
    """A choice of ε and the curves ``(n,)`` that it was read from; see `suggest_epsilon`."""

    epsilon: float
    epsilons: Tensor
    ess: Tensor
    tilt_variance: Tensor

    def plot(self) -> Any:
        """Return both curves and the choice as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3), layout="constrained")
        panels = figure.subplots(1, 2)
        curves = {"ESS / N": self.ess, "relative variance of the tilt": self.tilt_variance}
        for axes, (name, curve) in zip(panels, curves.items(), strict=True):
            axes.plot(self.epsilons, curve)
            axes.axvline(self.epsilon, color="C1", label=f"ε = {self.epsilon:.3g}")
            axes.set(xscale="log", xlabel="ε", ylabel=name, ylim=(0, None))
            axes.legend()
        return figure


@torch.no_grad()
def suggest_epsilon(
    x0: Tensor,
    x1: Tensor,
    cost: Cost = "euclidean",
    target: Target = "elbow",
    value: float | None = None,
) -> EpsilonChoice:
    """Choose ε for `flowkit.couplings.Gibbs` before training.

    All pairs ``(x0_i, x1_j)`` are weighted by ``exp(−c/ε)`` for ``ε`` from ``0.05 √d`` to
    ``50 √d``, 20 values a decade. A smaller ε chooses partners more sharply, leaves fewer effective
    pairs and tilts source and data further.

    - ``"elbow"``: where the relative variance of the tilts ``h_x`` and ``h_y`` (their mean, less
      sampling noise) flattens: the largest distance below the chord of the curve over log ε.
    - ``"ess"``: where the effective number of pairs ``ESS/N`` is ``value`` (default 0.5).
    - ``"corr"``: where the correlation of the weighted pairs, ``E_q⟨x0, x1⟩`` centered and divided
      by both standard deviations, is ``value``.

    At a fixed ``ε/√d`` weights become equal as ``d`` grows: in many dimensions go by ``"ess"``,
    whose choice may lie outside of the curves' range.

    Args:
        x0: Source samples ``(N, *)``; a few thousand are plenty.
        x1: Data ``(M, *)``.
        cost: The one to train with.
        target: What decides.
        value: Its value, for ``"ess"`` and ``"corr"``.

    Returns:
        The choice with ``epsilons``, ``ess`` and ``tilt_variance (n,)``.

    Raises:
        ValueError: If samples do not fit or are not finite, or no ε of the range has the value.

    Source: Calvo-Ordoñez et al., 2025 (arXiv 2507.22270), the rule ``ε = κ √d`` at
    the smallest ``κ`` where the curve flattens; chord, ``"ess"`` and ``"corr"`` are added here.

    >>> x = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    >>> choice = suggest_epsilon(*x, target="ess", value=0.5)
    >>> 0.5 < choice.epsilon < 2
    True
    """
    check_choice(target, ("elbow", "ess", "corr"), "target")
    check_finite(x0, "x0")
    check_finite(x1, "x1")
    value = _checked(target, value)
    matrix = cost_matrix(x0, x1, cost)
    matrix -= matrix.min()
    scale = math.sqrt(x1[0].numel())
    epsilons = torch.logspace(math.log10(0.05), math.log10(50), 61, dtype=torch.float64) * scale
    ess, tilt = [], []
    for epsilon in epsilons.tolist():
        weight = _weight(matrix, epsilon)
        ess.append(_ess(weight))
        h_x, h_y, _ = variance_components(weight)
        tilt.append((h_x + h_y).item() / 2)
    ess, tilt = (torch.tensor(curve, dtype=torch.float64) for curve in (ess, tilt))
    # What rises with ε where few pairs have weight is noise.
    tilt = tilt.flip(0).cummax(0).values.flip(0)
    if target == "elbow":
        chord = torch.linspace(0, 1, len(tilt), dtype=torch.float64)
        choice = epsilons[(torch.lerp(tilt[0], tilt[-1], chord) - tilt).argmax()].item()
    else:
        measure = _ess if target == "ess" else _correlation(points(x0), points(x1))
        ends = epsilons[0].item(), epsilons[-1].item()
        choice = _solve(lambda epsilon: measure(_weight(matrix, epsilon)), value, *ends, target)
    return EpsilonChoice(choice, epsilons, ess, tilt)


def variance_components(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the variance of ``m_ij (N, M)`` into that of rows, of columns and of interaction.

    Unbiased for rows and columns drawn at random (two-way analysis of variance without
    replicates), but for negative estimates, which become 0.

    >>> x = torch.tensor([1.0, 2.0, 4.0])
    >>> [round(v.item(), 4) for v in variance_components(x[:, None] + x)]
    [2.3333, 2.3333, 0.0]
    """
    n, m = matrix.shape
    centered = (matrix - matrix.mean()).ravel()
    total, centered = centered @ centered, centered.reshape(n, m)
    rows, columns = centered.mean(1).square().sum(), centered.mean(0).square().sum()
    rest = (total - m * rows - n * columns).clamp_min(0) / max((n - 1) * (m - 1), 1)
    of_rows, of_columns = rows / max(n - 1, 1) - rest / m, columns / max(m - 1, 1) - rest / n
    return of_rows.clamp_min(0), of_columns.clamp_min(0), rest


def _weight(matrix: Tensor, epsilon: float) -> Tensor:
    """Return weights of mean 1."""
    weight = (matrix * (-1 / epsilon)).exp_()
    return weight.div_(weight.mean())


def _ess(weight: Tensor) -> float:
    return weight.numel() / (weight.ravel() @ weight.ravel()).item()


def _checked(target: str, value: float | None) -> float:
    if target == "elbow" and value is not None:
        raise ValueError(f"value must be None for target='elbow', got {value}")
    if target == "corr" and value is None:
        raise ValueError("value must be given for target='corr', got None; 0.3, say")
    value = 0.5 if value is None else value
    if not 0 < value < 1:
        raise ValueError(f"value must lie in (0, 1), got {value}")
    return value


def _correlation(a: Tensor, b: Tensor) -> Callable[[Tensor], float]:
    """Return the correlation of rows ``a (N, d)`` and ``b (M, d)`` as a function of weights."""
    a, b = a - a.mean(0), b - b.mean(0)
    products, squares = a @ b.T, (a.square().sum(1), b.square().sum(1))

    def correlation(weight: Tensor) -> float:
        ends = [h / h.sum() for h in (weight.sum(1), weight.sum(0))]
        means = [p @ x for p, x in zip(ends, (a, b), strict=True)]
        variances = [
            p @ square - mean @ mean for p, square, mean in zip(ends, squares, means, strict=True)
        ]
        covariance = (weight * products).mean() - means[0] @ means[1]
        return (covariance / (variances[0] * variances[1]).sqrt()).item()

    return correlation


def _solve(
    curve: Callable[[float], float], value: float, low: float, high: float, name: str
) -> float:
    """Return the ε at which a monotone curve has the value, up to a thousandfold off the range."""
    from scipy.optimize import brentq

    ends = [curve(low), curve(high)]
    for _ in range(3):
        if min(ends) < value < max(ends):
            break
        if abs(ends[0] - value) < abs(ends[1] - value):
            ends[0] = curve(low := low / 10)
        else:
            ends[1] = curve(high := high * 10)
    if not min(ends) < value < max(ends):
        raise ValueError(
            f"value must lie between {min(ends):.3g} and {max(ends):.3g}, which the {name} of "
            f"these samples takes, got {value}"
        )
    root = brentq(lambda x: curve(math.exp(x)) - value, math.log(low), math.log(high), xtol=1e-3)
    return math.exp(cast(float, root))
