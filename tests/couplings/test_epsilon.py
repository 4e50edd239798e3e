"""The choice of epsilon against closed forms of Gaussians."""

import math

import pytest
import torch
from matplotlib.colors import same_color

from flowkit.couplings import Gibbs, suggest_epsilon
from flowkit.couplings.epsilon import _correlation, _solve, variance_components


def normals(batch: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, batch, dim, generator=torch.Generator().manual_seed(seed))
    return x[0], x[1]


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_curves_are_those_of_equal_gaussians(dim):
    choice = suggest_epsilon(*normals(2000, dim), "sqeuclidean")
    s = choice.epsilons + 2
    tilt = ((1 + 2 / s) / (1 + 4 / s).sqrt()) ** dim - 1
    torch.testing.assert_close(choice.tilt_variance, tilt, rtol=0.12, atol=0)
    ess = ((1 + 8 / choice.epsilons).sqrt() / (1 + 4 / choice.epsilons)) ** dim
    torch.testing.assert_close(choice.ess, ess, rtol=0.12, atol=0)


@pytest.mark.parametrize("cost", ["euclidean", "sqeuclidean", "cityblock"])
def test_curves_are_monotone_over_the_stated_range(cost):
    choice = suggest_epsilon(*normals(1000, 3), cost)
    assert len(choice.epsilons) == 61
    assert choice.epsilons[0].item() == pytest.approx(0.05 * math.sqrt(3))
    assert choice.epsilons[-1].item() == pytest.approx(50 * math.sqrt(3))
    steps = choice.epsilons.log().diff()
    torch.testing.assert_close(steps, steps[:1].expand(60), rtol=1e-6, atol=0)
    assert (choice.tilt_variance.diff() <= 0).all()
    assert (choice.ess.diff() > 0).all()


def test_elbow_is_farthest_below_the_chord():
    choice = suggest_epsilon(*normals(2048, 1), "sqeuclidean")
    x, y = choice.epsilons.log(), choice.tilt_variance
    direction = torch.stack([x[-1] - x[0], y[-1] - y[0]])
    offset = torch.stack([x - x[0], y - y[0]], 1)
    distance = direction[1] * offset[:, 0] - direction[0] * offset[:, 1]
    assert choice.epsilon == choice.epsilons[distance.argmax()]
    # The elbow of the closed form, on the same range.
    fine = torch.logspace(math.log10(0.05), math.log10(50), 2000, dtype=torch.float64)
    s = fine + 2
    exact = (1 + 2 / s) / (1 + 4 / s).sqrt() - 1
    chord = torch.lerp(exact[0], exact[-1], torch.linspace(0, 1, 2000, dtype=torch.float64))
    elbow = fine[(chord - exact).argmax()].item()
    assert choice.epsilon == pytest.approx(elbow, rel=0.15)


@pytest.mark.parametrize("dim", [2, 50, 800])
@pytest.mark.parametrize("value", [None, 0.9])
def test_chosen_sample_size_is_that_of_the_weights(dim, value):
    x0, x1 = normals(1500, dim)
    choice = suggest_epsilon(x0, x1, target="ess", value=value)
    more = normals(40_000, dim, seed=1) if dim < 800 else normals(8000, dim, seed=1)
    log_weight = Gibbs(choice.epsilon).pair(*more).log_weight
    w = log_weight.double().exp()
    assert 1 / w.square().mean() == pytest.approx(value or 0.5, rel=0.1)


@pytest.mark.parametrize("correlation", [0.6, 1 / 3, 0.1])
def test_chosen_correlation_is_that_of_the_closed_form(correlation):
    """It is a/(1+a) at a = 2/ε."""
    x0, x1 = normals(1000, 2)
    epsilon = suggest_epsilon(x0, x1, "sqeuclidean", "corr", correlation).epsilon
    assert epsilon == pytest.approx(2 * (1 - correlation) / correlation, rel=0.1)


def test_elbow_follows_the_scale_of_the_samples():
    x0, x1 = normals(1000, 2)
    near, far = suggest_epsilon(x0, x1), suggest_epsilon(3 * x0, 3 * x1)
    assert 2 < far.epsilon / near.epsilon < 4


@pytest.mark.parametrize("curve", [lambda e: e / (1 + e), lambda e: 1 / (1 + e)])
@pytest.mark.parametrize("epsilon", [0.05 / 990, 0.05 / 12, 2.0, 50 * 12, 50 * 990])
def test_the_search_goes_up_to_a_thousand_times_beyond_the_range(curve, epsilon):
    """A rising and a falling curve with a known inverse."""
    found = _solve(curve, curve(epsilon), 0.05, 50, "ess")
    assert found == pytest.approx(epsilon, rel=1e-3)
    beyond = 0.05 / 1010 if epsilon < 1 else 50 * 1010
    with pytest.raises(ValueError, match=r"value must lie between .* the range of ess"):
        _solve(curve, curve(beyond), 0.05, 50, "ess")


def test_plot_marks_the_choice():
    choice = suggest_epsilon(*normals(100, 2))
    left, right = choice.plot().axes
    assert left.get_position().y0 == right.get_position().y0
    curves = {"ESS / N": choice.ess, "relative variance of the tilt": choice.tilt_variance}
    for axes, (name, curve) in zip((left, right), curves.items(), strict=True):
        line, mark = axes.lines
        assert list(line.get_xdata()) == choice.epsilons.tolist()
        assert list(line.get_ydata()) == curve.tolist()
        assert mark.get_xdata() == [choice.epsilon, choice.epsilon]
        assert not same_color(mark.get_color(), line.get_color())
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("ε", name)
        assert (axes.get_xscale(), axes.get_ylim()[0]) == ("log", 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cost": "l2"}, "cost must be one of"),
        ({"target": "kappa"}, "target must be one of corr, elbow, ess, got 'kappa'"),
        ({"value": 0.5}, "value must be None for target='elbow', got 0.5"),
        ({"target": "corr"}, "value must be given for target='corr', got None"),
        ({"target": "ess", "value": 1.5}, r"value must lie in \(0, 1\), got 1.5"),
        (
            {"target": "corr", "value": 0.5, "cost": lambda a, b: 0 * (a - b).sum(-1)},
            r"value must lie between .* and .*, the range of corr for these samples, got 0.5",
        ),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        suggest_epsilon(*normals(50, 2), **options)


def test_bad_samples():
    x0, x1 = normals(50, 2)
    with pytest.raises(ValueError, match="x1 must be finite, got 1 NaN"):
        suggest_epsilon(x0, torch.where(torch.arange(100).reshape(50, 2) == 7, math.nan, x1))
    with pytest.raises(ValueError, match="x0 must have samples of the same shape as x1"):
        suggest_epsilon(x0, x1[:, :1])


def test_variance_components_of_a_random_effects_model():
    """m = r_i + c_j + e_ij with known variances; the estimates are unbiased."""
    generator = torch.Generator().manual_seed(0)
    totals = torch.zeros(3)
    for _ in range(400):
        rows = 2 * torch.randn(12, 1, generator=generator)
        columns = 0.5 * torch.randn(1, 30, generator=generator)
        rest = 3 * torch.randn(12, 30, generator=generator)
        totals += torch.stack(variance_components(rows + columns + rest))
    torch.testing.assert_close(totals[[0, 2]] / 400, torch.tensor([4.0, 9.0]), rtol=0.1, atol=0)
    # The small one is truncated at 0 now and then.
    assert totals[1] / 400 == pytest.approx(0.25, abs=0.06)


def test_the_correlation_under_weights_is_that_of_the_weighted_pairs():
    """Sums over all pairs, for weights of mean 1 that favor some rows and some columns."""
    generator = torch.Generator().manual_seed(0)
    a = 3 + torch.randn(7, 2, generator=generator, dtype=torch.float64)
    b = 2 * torch.randn(9, 2, generator=generator, dtype=torch.float64) - 5
    weight = torch.rand(7, 9, generator=generator, dtype=torch.float64) ** 3
    weight *= torch.arange(1, 8)[:, None] * torch.arange(1, 10) ** 2
    mass = weight / weight.sum()
    from_a, from_b = (x - m @ x for x, m in ((a, mass.sum(1)), (b, mass.sum(0))))
    variances = [m @ x.square().sum(1) for x, m in ((from_a, mass.sum(1)), (from_b, mass.sum(0)))]
    expected = (mass * (from_a @ from_b.T)).sum() / (variances[0] * variances[1]).sqrt()
    assert _correlation(a, b)(weight / weight.mean()) == pytest.approx(expected.item(), rel=1e-9)
