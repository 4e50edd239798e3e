"""Choice of ε for Gibbs weights, from samples alone, before training."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from flowkit.checks import check_choice, check_finite, check_samples
from flowkit.couplings.transport import Cost, cost_matrix, points

Target = Literal["elbow", "ess", "corr"]


class EpsilonChoice(NamedTuple):
    """Choice of ε, and the curves from which it was read; see `suggest_epsilon`.

    ``epsilon``: the chosen value. ``epsilons (n,)``: the values of ε of the curves. ``ess (n,)``:
    the effective number of pairs ``ESS/N`` at each ε. ``tilt_variance (n,)``: the relative variance
    of the tilts at each ε.
    """

    epsilon: float
    epsilons: Tensor
    ess: Tensor
    tilt_variance: Tensor

    def plot(self) -> Any:
        """Return both curves and the choice as a ``matplotlib.figure.Figure``."""
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

    The function weights all pairs ``(x0_i, x1_j)`` by ``exp(−c/ε)`` for ``ε`` from ``0.05 √d`` to
    ``50 √d``, with 20 values per decade. A smaller ε gives closer partners, but fewer effective
    pairs and a larger tilt of source and data.

    - ``"elbow"``: the ε at which the relative variance of the tilts becomes flat. The curve is the
      mean of the relative variances of ``h_x`` and ``h_y``, corrected for sampling noise, over log
      ε. The elbow is the point of the curve with the largest distance below its chord.
    - ``"ess"``: the ε at which the effective number of pairs ``ESS/N`` equals ``value`` (default
      0.5).
    - ``"corr"``: the ε at which the correlation of the weighted pairs equals ``value``. The
      correlation is ``E_q⟨x0, x1⟩``, centered and divided by both standard deviations.

    At a fixed ``ε/√d``, weights become equal as ``d`` grows. So use ``"ess"`` in many dimensions.
    Its choice may lie outside the range of the curves.

    Args:
        x0: Source samples ``(N, *)``; a few thousand are enough.
        x1: Data ``(M, *)``.
        cost: Cost of a pair, the same as in training.
        target: Rule of the choice: ``"elbow"``, ``"ess"`` or ``"corr"``.
        value: Value for ``"ess"`` and ``"corr"``, in (0, 1); ``None`` for ``"elbow"``.

    Returns:
        The choice with the curves ``epsilons``, ``ess`` and ``tilt_variance (n,)``.

    Raises:
        TypeError: If a sample is not of real numbers.
        ValueError: If there is no sample, the shapes of samples differ, a sample is not finite, or
            no ε of the range reaches the value.

    Source: Calvo-Ordoñez et al., 2025 (arXiv 2507.22270), the rule ``ε = κ √d`` with the smallest
    ``κ`` at which the curve is flat. The chord rule, ``"ess"`` and ``"corr"`` are additions of
    flowkit.

    >>> x = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    >>> choice = suggest_epsilon(*x, target="ess", value=0.5)
    >>> 0.5 < choice.epsilon < 2
    True
    """
    check_choice(target, ("elbow", "ess", "corr"), "target")
    for x, name in ((x0, "x0"), (x1, "x1")):
        check_samples(x, name)
        check_finite(x, name)
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
    # The tilt falls with ε; a rise at small ε comes from the noise of few effective pairs.
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
    """Split the variance of ``m_ij (N, M)`` into parts of rows, of columns and of interaction.

    The estimates are unbiased for rows and columns drawn at random (two-way analysis of variance
    without replicates), except that negative estimates become 0.

    >>> x = torch.tensor([1.0, 2.0, 4.0])
    >>> [round(v.item(), 4) for v in variance_components(x[:, None] + x)]
    [2.3333, 2.3333, 0.0]
    """
    n, m = matrix.shape
    centered = matrix - matrix.mean()
    total = centered.square().sum()  # a product of matrices would be rounded under autocast
    rows, columns = centered.mean(1).square().sum(), centered.mean(0).square().sum()
    rest = (total - m * rows - n * columns).clamp_min(0) / max((n - 1) * (m - 1), 1)
    of_rows, of_columns = rows / max(n - 1, 1) - rest / m, columns / max(m - 1, 1) - rest / n
    return of_rows.clamp_min(0), of_columns.clamp_min(0), rest


def _weight(matrix: Tensor, epsilon: float) -> Tensor:
    """Return the weights ``exp(−c/ε) (N, M)``, divided by their mean."""
    weight = (matrix * (-1 / epsilon)).exp_()
    return weight.div_(weight.mean())


def _ess(weight: Tensor) -> float:
    """Return ``ESS/N`` of weights of mean 1."""
    return weight.numel() / (weight.ravel() @ weight.ravel()).item()


def _checked(target: str, value: float | None) -> float:
    """Return the value of the target, with its default."""
    if target == "elbow" and value is not None:
        raise ValueError(f"value must be None for target='elbow', got {value}")
    if target == "corr" and value is None:
        raise ValueError("value must be given for target='corr', got None; for example 0.3")
    value = 0.5 if value is None else value
    if not 0 < value < 1:
        raise ValueError(f"value must lie in (0, 1), got {value}")
    return value


def _correlation(a: Tensor, b: Tensor) -> Callable[[Tensor], float]:
    """Return the correlation of rows ``a (N, d)`` and ``b (M, d)`` as a function of weights."""
    a, b = a - a.mean(0), b - b.mean(0)
    products, squares = a @ b.T, (a.square().sum(1), b.square().sum(1))

    def correlation(weight: Tensor) -> float:
        """Return the correlation under the weights ``(N, M)``."""
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
    """Return the ε at which a monotone curve takes the value.

    The search extends the range by a factor of at most 1000.
    """
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
            f"value must lie between {min(ends):.3g} and {max(ends):.3g}, the range of {name} "
            f"for these samples, got {value}"
        )
    root = brentq(lambda x: curve(math.exp(x)) - value, math.log(low), math.log(high), xtol=1e-3)
    return math.exp(cast(float, root))
