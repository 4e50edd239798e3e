"""Log-likelihoods against closed forms, and whether their errors cover the truth."""

import math

import pytest
import torch

from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.guidance import Autoguidance, ClassifierFree
from flowkit.likelihood import log_likelihood
from flowkit.sampling import ODESampler

MIXTURE = MixtureFlow(
    torch.tensor([0.3, 0.7]).double(),
    torch.tensor([[-1.0, 0.5, 0.0], [1.0, 0.0, -0.5]]).double(),
    torch.tensor([0.4, 0.6]).double(),
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "sampler",
    [ODESampler(100, "rk4"), ODESampler(1, "dopri5", rtol=1e-8, atol=1e-8)],
    ids=["rk4", "dopri5"],
)
@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
def test_exact_divergence_gives_the_density_of_a_gaussian(sampler, shape):
    flow = GaussianFlow(torch.randn(shape).double(), torch.rand(shape).double() + 0.3)
    x1 = flow.solution(torch.randn(5, *shape).double())
    result = log_likelihood(sampler, flow, x1, divergence="exact")
    torch.testing.assert_close(result.value, flow.log_prob(x1), rtol=0, atol=1e-5)
    bits = -flow.log_prob(x1) / (math.prod(shape) * math.log(2))
    torch.testing.assert_close(result.bits_per_dim, bits, rtol=0, atol=1e-5)
    assert (result.stderr < 1e-3).all()


def test_exact_divergence_gives_the_density_of_a_mixture():
    x1 = MIXTURE.sample(20, generator())
    result = log_likelihood(ODESampler(100, "rk4"), MIXTURE, x1, divergence="exact")
    torch.testing.assert_close(result.value, MIXTURE.log_prob(x1), rtol=0, atol=1e-4)


def test_one_probe_is_exact_for_a_diagonal_jacobian():
    flow = GaussianFlow(torch.zeros(2, 2).double(), torch.full((2, 2), 0.4).double())
    x1 = flow.solution(torch.randn(4, 2, 2).double())
    result = log_likelihood(ODESampler(100, "rk4"), flow, x1, generator=generator())
    torch.testing.assert_close(result.value, flow.log_prob(x1), rtol=0, atol=1e-5)


def test_a_probe_makes_no_error_in_one_dimension():
    flow = GaussianFlow(1.0, 0.4)
    x1 = flow.solution(torch.randn(4, 1).double())
    exact, probed = (
        log_likelihood(ODESampler(100, "rk4"), flow, x1, divergence=divergence)
        for divergence in ("exact", "hutchinson")
    )
    assert torch.equal(probed.value, exact.value)
    assert torch.equal(probed.stderr, exact.stderr)


def test_stderr_sees_what_lies_off_the_diagonal():
    """v = x A with A swapping two coordinates: no trace, and estimates that are all noise."""
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    x1 = torch.randn(200, 2, dtype=torch.float64)
    sampler = ODESampler(50, "rk4")
    exact = log_likelihood(sampler, lambda x, t, cond: x @ swap, x1, divergence="exact")
    noisy = log_likelihood(sampler, lambda x, t, cond: x @ swap, x1)
    error = (noisy.value - exact.value).abs()
    assert error.min() > 1.9
    assert (noisy.stderr >= error - 1e-6).all()


def test_probes_are_unbiased_and_more_of_them_are_better():
    x1 = MIXTURE.sample(1, generator()).expand(1500, 3)
    truth = MIXTURE.log_prob(x1)
    errors = {}
    for probes in (1, 16):
        value = log_likelihood(
            ODESampler(10, "rk4"), MIXTURE, x1, probes=probes, generator=generator(1)
        ).value
        errors[probes] = value - truth
    assert errors[1].std() > 0.05, "the case must have probe noise"
    for error in errors.values():
        assert error.mean().abs() < 4 * error.std() / math.sqrt(1500) + 1e-3
    assert (errors[1].std() / errors[16].std()).item() == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1)])
@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize(("method", "steps"), [("euler", 20), ("heun", 20), ("rk4", 10)])
def test_the_stated_error_covers_the_true_one(method, steps, probes, shape):
    flow = MixtureFlow(MIXTURE.weights, MIXTURE.means.reshape(2, *shape), MIXTURE.stds)
    x1 = flow.sample(500, generator())
    result = log_likelihood(
        ODESampler(steps, method), flow, x1, probes=probes, generator=generator(1)
    )
    error = (result.value - flow.log_prob(x1)).abs()
    assert (error <= 3 * result.stderr).double().mean() >= 0.97
    # and is no wild overstatement
    assert result.stderr.median() <= 12 * error.square().mean().sqrt()


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_few_steps_report_a_large_error(method):
    flow = GaussianFlow(torch.zeros(4).double(), 0.05)
    x1 = flow.solution(torch.randn(50, 4).double())
    errors, stated = [], []
    for steps in (2, 8, 256):
        result = log_likelihood(ODESampler(steps, method), flow, x1, divergence="exact")
        errors.append((result.value - flow.log_prob(x1)).abs().mean().item())
        stated.append(result.stderr.mean().item())
    assert errors[1] > 1, "the case must be hard"
    assert stated[1] > 0.3 * errors[1]
    assert stated[2] < 0.1 * stated[1]


def test_evaluations_of_both_solves_are_counted():
    calls = []

    def field(x, t, cond=None):
        calls.append(len(x))
        return -x

    result = log_likelihood(ODESampler(8, "heun"), field, torch.zeros(2, 3))
    assert result.nfe == len(calls) == 16 + 8


def test_odd_numbers_of_steps_are_halved_too():
    flow, x1 = GaussianFlow(0.0, 0.5), torch.zeros(2, 3).double()
    result = log_likelihood(ODESampler(7), flow, x1)
    assert result.nfe == 7 + 4


def test_parameters_receive_no_gradient_and_may_require_one():
    net = torch.nn.Linear(2, 2)
    result = log_likelihood(ODESampler(4), lambda x, t, cond: net(x), torch.zeros(3, 2))
    assert not result.value.requires_grad
    assert net.weight.grad is None


def test_it_works_under_no_grad():
    flow, x1 = GaussianFlow(0.0, 0.5), torch.ones(2, 3).double()
    with torch.no_grad():
        result = log_likelihood(ODESampler(100, "rk4"), flow, x1)
    torch.testing.assert_close(result.value, flow.log_prob(x1), rtol=0, atol=1e-5)


def test_guided_fields_have_a_likelihood():
    """Guidance between Gaussian fields of one std shifts the mean: a Gaussian again."""
    high, low = GaussianFlow(2.0, 0.5), GaussianFlow(0.0, 0.5)
    shifted, x1 = GaussianFlow(3.0, 0.5), torch.randn(4, 2).double() * 0.5 + 3.0

    def by_label(x, t, cond):
        return torch.where(cond[:, None] == 1, high(x, t), low(x, t))

    sampler, cond = ODESampler(100, "rk4"), torch.ones(4, dtype=torch.long)
    for field in (ClassifierFree(by_label, 1.5, 0), Autoguidance(high, low, 1.5)):
        value = log_likelihood(sampler, field, x1, cond, divergence="exact").value
        torch.testing.assert_close(value, shifted.log_prob(x1), rtol=0, atol=1e-5)


def test_generator_fixes_the_probes():
    x1 = MIXTURE.sample(5, generator())
    a, b, c = (
        log_likelihood(ODESampler(4), MIXTURE, x1, generator=generator(k)).value for k in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (ODESampler([0.0, 0.5, 0.9]), {}, "sampler.grid must run from 0 to 1, got 0.0 to 0.9"),
        (ODESampler(1), {}, "the number of steps of sampler.grid must be at least 2, got 1"),
        (ODESampler(2), {"probes": 0}, "probes must be at least 1, got 0"),
        (ODESampler(2), {"divergence": "none"}, "divergence must be one of exact, hutchinson"),
    ],
)
def test_bad_arguments_are_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(sampler, MIXTURE, torch.zeros(1, 3).double(), **options)


def test_a_field_without_gradient_is_refused():
    @torch.no_grad()
    def field(x, t, cond=None):
        return -x

    with pytest.raises(RuntimeError, match="velocity must be differentiable in x"):
        log_likelihood(ODESampler(2), field, torch.zeros(1, 3))


def test_adaptive_methods_stop_at_every_time_of_the_grid():
    """The tolerances judge the state; short steps keep the divergence accurate, too."""
    x1 = MIXTURE.sample(20, generator())
    exact, found = MIXTURE.log_prob(x1), {}
    for steps in (1, 20):
        sampler = ODESampler(steps, "dopri5", rtol=1e-2, atol=1e-2)
        result = log_likelihood(sampler, MIXTURE, x1, divergence="exact")
        found[steps] = (result.value - exact).abs().max().item(), result.nfe
    # Each of the 20 intervals takes at least a step of 6 new evaluations, in both solves.
    assert found[20][1] >= 2 * 20 * 6
    assert found[20][0] < 1e-4
    assert found[20][0] < found[1][0] / 10
