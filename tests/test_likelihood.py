"""Log-likelihoods against closed forms, and whether their errors cover the truth."""

import math

import pytest
import torch

from flowkit import grids
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
    assert (probed.probe_error == 0).all()


def test_stderr_sees_what_lies_off_the_diagonal():
    """v = x A with A swapping two coordinates: no trace, and estimates that are all noise."""
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    x1 = torch.randn(200, 2, dtype=torch.float64)
    sampler = ODESampler(50, "rk4")
    exact = log_likelihood(sampler, lambda x, t, cond: x @ swap, x1, divergence="exact")
    noisy = log_likelihood(sampler, lambda x, t, cond: x @ swap, x1)
    two = torch.full((200,), 2.0).double()
    torch.testing.assert_close((noisy.value - exact.value).abs(), two)
    torch.testing.assert_close(noisy.probe_error, two)
    torch.testing.assert_close(noisy.stderr, noisy.probe_error.hypot(noisy.integration_error))


class Linear:
    """``v = A x``: every estimate is ``εᵀAε``, and ``log p`` is that of a Gaussian."""

    def __init__(self, matrix):
        self.matrix, self.back = matrix, torch.matrix_exp(-matrix)

    def __call__(self, x, t, cond=None):
        return x @ self.matrix.T

    def log_prob(self, x1):
        normal = torch.distributions.Normal(0, 1)
        return normal.log_prob(x1 @ self.back.T).sum(1) - self.matrix.trace()


def matrix(d, *, symmetric):
    square = torch.randn(d, d, generator=generator(d), dtype=torch.float64) / math.sqrt(d)
    return square + square.T if symmetric else square + 0.5 * square.T


@pytest.mark.parametrize("d", [2, 3, 8, 9])
@pytest.mark.parametrize("probes", [1, 4])
def test_probe_errors_are_those_of_quadratic_forms(probes, d):
    """Symmetric: the variance ``2 Σ_{i≠j} A_ij² / P`` of the estimate. Any other: its bound."""
    for symmetric in (True, False):
        flow, x1 = Linear(matrix(d, symmetric=symmetric)), torch.zeros(6000, d).double()
        found = log_likelihood(ODESampler(2, "rk4"), flow, x1, probes=probes)
        stated = found.probe_error.square().mean().sqrt()
        off = flow.matrix - flow.matrix.diag().diag()
        torch.testing.assert_close(
            stated, (2 * off.square().sum() / probes).sqrt(), rtol=0.03, atol=0
        )
        true = ((off.square() + off * off.T).sum() / probes).sqrt()
        torch.testing.assert_close(found.value.std(), true, rtol=0.05, atol=0)


def test_probes_are_unbiased_and_their_error_falls_as_their_root():
    x1 = MIXTURE.sample(3, generator())
    truth = MIXTURE.log_prob(x1)
    spread, stated = {}, {}
    for probes in (1, 4, 16):
        found = log_likelihood(
            ODESampler(10, "rk4"),
            MIXTURE,
            x1.repeat_interleave(500, 0),
            probes=probes,
            generator=generator(1),
        )
        errors = found.value.reshape(3, -1) - truth[:, None]
        spread[probes] = errors.std(1)
        stated[probes] = found.probe_error.reshape(3, -1).square().mean(1).sqrt()
        assert (errors.mean(1).abs() < 4 * spread[probes] / math.sqrt(500) + 1e-3).all()
        torch.testing.assert_close(stated[probes], spread[probes], rtol=0.15, atol=0)
    assert (spread[1] > 0.05).all(), "the case must have probe noise"
    for few, many in ((1, 4), (4, 16)):
        for error in (spread, stated):
            torch.testing.assert_close(
                error[few] / error[many], torch.full((3,), 2.0).double(), rtol=0.15, atol=0
            )


def mixture(d):
    means = torch.randn(3, *d, generator=generator(3), dtype=torch.float64)
    return MixtureFlow(torch.ones(3).double(), means, torch.tensor([0.4, 0.6, 0.8]).double())


@pytest.mark.parametrize("shape", [(12,), (2, 3, 2)])
@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize(
    ("method", "steps", "overstated"),
    [("euler", 20, 3.0), ("heun", 20, 1.15), ("rk4", 10, 1.15), ("dopri5", 2, 1.3)],
)
def test_the_stated_error_covers_the_true_one(method, steps, overstated, probes, shape):
    flow = mixture(shape)
    x1 = flow.sample(500, generator())
    sampler = ODESampler(steps, method, rtol=1e-3, atol=1e-3)
    result = log_likelihood(sampler, flow, x1, probes=probes, generator=generator(1))
    error = (result.value - flow.log_prob(x1)).abs()
    assert (error <= 1.96 * result.stderr).double().mean().item() >= 0.92
    assert rms(result.stderr) / rms(error) <= overstated


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("kind", ["uniform", "power"])
@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("euler", 20),
        ("euler", 60),
        ("heun", 10),
        ("ab2", 20),
        ("rk4", 8),
    ],
)
def test_the_integration_error_covers_the_true_one(method, steps, kind):
    """The difference to half the steps is the error itself for Euler, and often too small."""
    grid = grids.uniform(steps) if kind == "uniform" else grids.power(steps, 1.5)
    for flow in (
        mixture((6,)),
        GaussianFlow(torch.zeros(3).double(), torch.tensor([1.5, 0.3, 0.2]).double()),
    ):
        if isinstance(flow, GaussianFlow):
            x1 = flow.solution(torch.randn(300, 3, generator=generator()).double())
        else:
            x1 = flow.sample(300, generator())
        result = log_likelihood(ODESampler(grid, method), flow, x1, divergence="exact")
        error = (result.value - flow.log_prob(x1)).abs()
        assert (result.probe_error == 0).all()
        assert torch.equal(result.stderr, result.integration_error)
        assert (error <= 1.96 * result.integration_error).double().mean().item() >= 0.95


@pytest.mark.parametrize(
    ("method", "steps", "factor"),
    [("euler", 400, 2), ("midpoint", 80, 3), ("heun", 160, 3), ("ab2", 160, 3), ("rk4", 32, 15)],
)
def test_the_integration_error_of_short_steps_is_a_known_multiple(method, steps, factor):
    flow, x1 = Linear(matrix(3, symmetric=False)), torch.ones(1, 3).double()
    result = log_likelihood(ODESampler(steps, method), flow, x1, divergence="exact")
    error = (result.value - flow.log_prob(x1)).abs().item()
    assert result.integration_error.item() / error == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_block_has_steps_to_halve(steps):
    """With one step a block, half the steps would be the same steps, and no error seen."""

    class Blocks:
        edges = (0.25, 0.5, 0.8)

        def bind(self, cond, grid):
            return self

        def __call__(self, x, t, cond=None):  # x1 = e^{-1} x0
            return -2 * x * t[:, None]

    x1 = torch.ones(3, 2).double()
    grid = grids.blockwise([0.0, 0.25, 0.5, 0.8, 1.0], steps)
    result = log_likelihood(ODESampler(grid), Blocks(), x1, divergence="exact")
    start = torch.distributions.Normal(0, 1).log_prob(math.e * x1).sum(1)
    error = (result.value - (start + 2)).abs()
    assert (error > 0.01).all()
    assert (error <= 1.96 * result.stderr).all()
    assert result.nfe == {1: 8 + 4 + 4, 2: 8 + 4 + 4, 3: 12 + 8 + 4}[steps]


def test_adaptive_methods_promise_their_tolerances_at_most():
    """They may take the same steps for any tolerance, and differ by nothing then."""
    flow, x1 = Linear(matrix(3, symmetric=True)), torch.ones(2, 3).double()
    for grid in (1, 10):
        sampler = ODESampler(grid, "dopri5", rtol=1e-2, atol=1e-3)
        result = log_likelihood(sampler, flow, x1, divergence="exact")
        floor = 1e-3 + 1e-2 * result.value.abs()
        assert (result.integration_error >= floor).all()
        assert ((result.value - flow.log_prob(x1)).abs() <= result.integration_error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_sums_are_in_float64_for_any_data(dtype, divergence):
    """Kept in float32, values of float32 data would have ten times the error."""
    d = 8 if divergence == "exact" else 4096
    flow = GaussianFlow(2.0, 0.5)
    x1 = flow.solution(torch.randn(2, d)).to(dtype)

    def field(x, t, cond=None):  # sums in the network's type are not what is judged here
        assert x.dtype == dtype
        assert t.dtype == torch.float32
        return flow(x.double(), t.double())

    result = log_likelihood(ODESampler(20, "rk4"), field, x1, divergence=divergence)
    assert {part.dtype for part in (*result[:3], *result[4:])} == {torch.float64}
    exact = log_likelihood(ODESampler(20, "rk4"), flow, x1.double(), divergence=divergence)
    torch.testing.assert_close(exact.value, flow.log_prob(x1.double()), rtol=1e-4, atol=0)
    close = 3e-8 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(result.value, exact.value, rtol=close, atol=0)


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


def test_evaluations_of_all_solves_are_counted():
    calls = []

    def field(x, t, cond=None):
        calls.append(len(x))
        return -x

    result = log_likelihood(ODESampler(8, "heun"), field, torch.zeros(2, 3))
    assert result.nfe == len(calls) == 16 + 8 + 4


def test_odd_numbers_of_steps_are_halved_too():
    flow, x1 = GaussianFlow(0.0, 0.5), torch.zeros(2, 3).double()
    result = log_likelihood(ODESampler(7), flow, x1)
    assert result.nfe == 7 + 4 + 2


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
        (ODESampler(2), {"probes": -1}, "probes must be at least 1, got -1"),
        (ODESampler(2), {"divergence": "none"}, "divergence must be one of exact, hutchinson"),
    ],
)
def test_bad_arguments_are_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(sampler, MIXTURE, torch.zeros(1, 3).double(), **options)


def test_a_number_of_probes_is_whole():
    with pytest.raises(TypeError, match=r"probes must be an integer, got 1\.5"):
        log_likelihood(ODESampler(2), MIXTURE, torch.zeros(1, 3).double(), probes=1.5)


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
