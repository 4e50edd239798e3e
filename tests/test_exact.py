"""Closed-form flows against brute force: quadrature, distributions, transport."""

import math

import pytest
import torch
from torch import distributions

from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.sampling import ODESampler

WEIGHTS = torch.tensor([0.2, 0.5, 0.3]).double()
MEANS = torch.tensor([-2.0, 0.3, 1.5]).double()
STDS = torch.tensor([0.3, 0.6, 0.2]).double()
MIXTURE = MixtureFlow(WEIGHTS, MEANS[:, None], STDS)


def mixture():
    return distributions.MixtureSameFamily(
        distributions.Categorical(WEIGHTS), distributions.Normal(MEANS, STDS)
    )


def expected_velocity(density, x, t):
    """E[x1 − x0 | x_t = x] in one dimension, by quadrature over x1."""
    x1 = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    x0 = (x[:, None] - t * x1) / (1 - t)
    joint = (density(x1) - x0**2 / 2).softmax(1)
    return (joint * (x1 - x0)).sum(1)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("flow", "density"),
    [
        (GaussianFlow(2.0, 0.5), distributions.Normal(2.0, 0.5).log_prob),
        (MIXTURE, lambda x: mixture().log_prob(x)),
    ],
    ids=["gaussian", "mixture"],
)
def test_velocity_is_the_conditional_expectation(flow, density, t):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    v = flow(x[:, None], torch.full((13,), t, dtype=torch.float64))[:, 0]
    torch.testing.assert_close(v, expected_velocity(density, x, t), rtol=1e-7, atol=1e-7)


def test_gaussian_solution_is_reached():
    mean, std = torch.randn(2, 3).double(), torch.rand(2, 3).double() + 0.1
    flow, x0 = GaussianFlow(mean, std), torch.randn(5, 2, 3).double()
    x = ODESampler(200, "rk4")(flow, x0)
    torch.testing.assert_close(x, mean + std * x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.solution(x0), mean + std * x0)


def test_mixture_is_transported_monotonically():
    """In one dimension the flow preserves ranks: F(x1) = Φ(x0)."""
    x0 = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)
    x1 = ODESampler(1, "dopri5", rtol=1e-9, atol=1e-9)(MIXTURE, x0[:, None])[:, 0]
    torch.testing.assert_close(
        mixture().cdf(x1), distributions.Normal(0.0, 1.0).cdf(x0), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_one_component_is_the_gaussian_flow(shape):
    mean = torch.randn(shape).double()
    gaussian = GaussianFlow(mean, 0.7)
    mixture = MixtureFlow(torch.tensor([3.0]), mean[None], torch.tensor([0.7]).double())
    x, t = torch.randn(9, *shape).double(), torch.linspace(0, 1, 9).double()
    torch.testing.assert_close(mixture(x, t), gaussian(x, t))
    torch.testing.assert_close(mixture.log_prob(x), gaussian.log_prob(x))


def test_log_prob_is_that_of_torch():
    x = torch.randn(50, 1).double() * 2
    torch.testing.assert_close(MIXTURE.log_prob(x), mixture().log_prob(x[:, 0]))
    mean, std = torch.randn(2, 3).double(), torch.rand(2, 3).double() + 0.1
    x = torch.randn(50, 2, 3).double()
    theirs = distributions.Normal(mean, std).log_prob(x).sum((1, 2))
    torch.testing.assert_close(GaussianFlow(mean, std).log_prob(x), theirs)


def test_weights_need_not_sum_to_one():
    scaled = MixtureFlow(WEIGHTS * 7, MEANS[:, None], STDS)
    x = torch.randn(9, 1).double()
    torch.testing.assert_close(scaled.log_prob(x), MIXTURE.log_prob(x))


def test_log_density_far_out_is_finite():
    x, t = torch.full((1, 1), 1e3), torch.full((1,), 0.999)
    assert MIXTURE(x, t).isfinite().all()
    assert MIXTURE.log_prob(x).isfinite().all()


def test_samples_of_the_mixture_have_its_moments():
    x = MIXTURE.sample(200_000, torch.Generator().manual_seed(0))
    mean = (WEIGHTS * MEANS).sum().item()
    second = (WEIGHTS * (MEANS**2 + STDS**2)).sum().item()
    assert x.shape == (200_000, 1)
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.square().mean().item() == pytest.approx(second, rel=0.02)
    assert torch.equal(x, MIXTURE.sample(200_000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("flow", [GaussianFlow(torch.zeros(1).double(), 0.5), MIXTURE])
def test_float32_states_stay_float32_beside_float64_parameters(flow):
    x, t = torch.zeros(2, 1), torch.full((2,), 0.5)
    assert flow(x, t).dtype == flow.log_prob(x).dtype == torch.float32
    assert flow(x, t.double()).dtype == torch.float32


@pytest.mark.parametrize("flow", [GaussianFlow(1 / 3, 0.3), MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_lose_their_own_digits_only(flow, dtype):
    x, t = torch.linspace(-3, 3, 41)[:, None].to(dtype), torch.linspace(0, 1, 41)
    v, exact = flow(x, t), flow(x.double(), t.double())
    assert v.dtype == dtype
    assert ((v.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()
    torch.testing.assert_close(flow.log_prob(x), flow.log_prob(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize("flow", [GaussianFlow(0.5, 0.5), MIXTURE])
def test_integers_are_refused(flow):
    x, t = torch.zeros(2, 1, dtype=torch.long), torch.full((2,), 0.5)
    for call in (lambda: flow(x, t), lambda: flow.log_prob(x)):
        with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64"):
            call()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianFlow(0.0, 0.0), "std must be positive and finite, got 0.0"),
        (lambda: GaussianFlow(math.nan, 1.0), "mean must be finite, got nan"),
        (lambda: GaussianFlow(0.0, math.inf), "std must be positive and finite, got inf"),
        (
            lambda: MixtureFlow(torch.ones(1), torch.tensor([[math.inf]]), torch.ones(1)),
            "means must be finite, got 1 NaN or infinite of 1 values",
        ),
        (lambda: GaussianFlow(0.0, torch.tensor([1.0, -1.0])), "std must be positive and finite"),
        (
            lambda: MixtureFlow(torch.tensor([1.0, 0.0]), torch.zeros(2, 1), torch.ones(2)),
            r"weights must be 2 positive, finite numbers, one per mean, got \[1.0, 0.0\]",
        ),
        (
            lambda: MixtureFlow(torch.ones(2), torch.zeros(2, 1), torch.ones(3)),
            "stds must be 2 positive, finite numbers, one per mean",
        ),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_entropy_of_samples_matches_log_prob():
    """E[−log p] of a Gaussian is d (½ log 2πe + log std)."""
    flow = GaussianFlow(1.0, 0.3)
    x = flow.solution(torch.randn(100_000, 2, dtype=torch.float64))
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.3))
    assert -flow.log_prob(x).mean().item() == pytest.approx(entropy, abs=0.02)
