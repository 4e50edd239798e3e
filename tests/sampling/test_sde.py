"""The stochastic sampler: marginals, exact weak orders, seeds, log densities, refusals."""

import math

import pytest
import torch
from scipy import stats

from flowkit import grids
from flowkit.exact import GaussianFlow, MixtureFlow
from flowkit.guidance import ClassifierFree
from flowkit.paths import VP, BrownianBridge, Cosine, Linear
from flowkit.sampling import ODESampler, SDESampler, sde, seeded_noise

NAMES = ("constant", "sine", "sigma", "sde-rl")
FLOW = GaussianFlow(2.0, 0.5)
MODES = MixtureFlow(
    torch.tensor([0.3, 0.7]), torch.tensor([[-2.0], [1.0]]), torch.tensor([0.4, 0.6])
)


class Points:
    """One sample of the sampler holds many points of a flow: noise is drawn for all at once."""

    def __init__(self, flow):
        self.flow = flow

    def __call__(self, x, t, cond=None):
        points = x.reshape(-1, 1)
        return self.flow(points, t.repeat_interleave(x.shape[1])).reshape(x.shape)


class Basis:
    """In place of the noise: 1 in row k at step k, so that rows are the solve's coefficients."""

    def __init__(self, seeds, x):
        self.x = x

    def __call__(self, step):
        noise = torch.zeros_like(self.x)
        noise[step] = 1
        return noise


def moments(sampler, flow):
    """Mean and variance at the end, exactly: a solve is affine in its start and its noises."""
    x = torch.zeros(len(sampler.times) + 1, 1, dtype=torch.float64)
    x[-1] = 1  # row 0: the mean; rows 1, 2, …: noise of a step; the last one: the start
    mean, *others = sampler(flow, x)[:, 0]
    return mean.item(), sum((other - mean) ** 2 for other in others).item()


# --- the distribution -----------------------------------------------------------------------------


@pytest.mark.parametrize("diffusion", [*NAMES, lambda t: 1.5 - t])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_exact_weak_order(method, order, diffusion, monkeypatch):
    """A drift with g² or ¼ g² for ½ g², or noise of another variance, would have order 0."""
    monkeypatch.setattr(sde, "_Noise", Basis)
    errors = []
    for n in (80, 160):
        grid = grids.uniform(n) ** 1.2
        mean, variance = moments(SDESampler(grid, diffusion, 0.8, method), FLOW)
        assert mean == pytest.approx(2, abs=1e-12)
        errors.append(abs(variance - 0.25))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.08)


@pytest.mark.parametrize("path", [Cosine(), VP(0.0, 8.0)])
def test_the_score_is_that_of_the_path(path, monkeypatch):
    """Data ``N(m, s²)``: ``v = a' m + (a a' s² + b b') / (a² s² + b²) (x − a m)``."""
    monkeypatch.setattr(sde, "_Noise", Basis)

    def velocity(x, t, cond=None):
        a, b, da, db = (value[:, None] for value in path.coefficients(t))
        spread = (a * da * 0.25 + b * db) / (a * a * 0.25 + b * b)
        return da * 2 + spread * (x - a * 2)

    # VP starts at a(0) m + sqrt(a² s² + b²) x0, whose spread is not 1
    a, b, _, _ = path.coefficients(torch.zeros(1, dtype=torch.float64))
    start = (a * a * 0.25 + b * b).item()
    errors = []
    for n in (60, 120):
        sampler = SDESampler(n, "sigma", 1.0, "heun", path)
        x = torch.zeros(n + 2, 1, dtype=torch.float64) + 2 * a
        x[-1] += math.sqrt(start)
        mean, *others = sampler(velocity, x)[:, 0]
        variance = sum((other - mean) ** 2 for other in others).item()
        errors.append(math.hypot(mean - 2, variance - 0.25))
    assert errors[1] < 1e-3
    assert math.log2(errors[0] / errors[1]) > 1.8


@pytest.mark.parametrize("diffusion", ["constant", "sine", "sigma"])
@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("flow", [FLOW, MODES], ids=["gaussian", "mixture"])
def test_marginals_are_those_of_the_data(flow, method, diffusion):
    """Of 10,000 points, within their sampling error; Euler with steps short enough for it."""
    n, points = (100 if method == "euler" else 30), 10_000
    x = seeded_noise((points,), [3])
    found = SDESampler(n, diffusion, 1.0, method).solve(Points(flow), x, seeds=[3]).x[0].double()
    if flow is FLOW:
        mean, variance, fourth = 2.0, 0.25, 3 * 0.25**2
        cdf = stats.norm(2, 0.5).cdf
    else:
        parts = [(0.3, -2.0, 0.4), (0.7, 1.0, 0.6)]
        mean = sum(w * m for w, m, s in parts)
        gaps = [(w, m - mean, s) for w, m, s in parts]
        variance = sum(w * (d * d + s * s) for w, d, s in gaps)
        fourth = sum(w * (d**4 + 6 * d * d * s * s + 3 * s**4) for w, d, s in gaps)
        cdf = lambda y: sum(w * stats.norm(m, s).cdf(y) for w, m, s in parts)  # noqa: E731
    assert abs(found.mean() - mean) < 4 * math.sqrt(variance / points)
    bias = 0.004 if method == "euler" else 0.0
    assert abs(found.var() - variance) < 4 * math.sqrt((fourth - variance**2) / points) + bias
    assert stats.kstest(found.numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_noise_does_mix(method):
    """Ends of the same start under other seeds differ; more noise leaves less of the start."""
    x, left = torch.ones(1, 4000), []
    for scale in (0.5, 1.5):
        end = SDESampler(50, "sigma", scale, method).solve(FLOW, x, seeds=[0]).x
        left.append((end.mean().item() - 2) / 0.5)  # the correlation of start and end
    assert 0.95 > left[0] > left[1] + 0.1 > 0.1


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize(
    ("diffusion", "scale"), [*((name, 0.0) for name in NAMES), (lambda t: 0.0, 1)]
)
def test_without_noise_it_is_the_ode_bit_for_bit(diffusion, scale, method):
    x, grid = torch.randn(5, 3), grids.shifted(7, 2.0)
    ours = SDESampler(grid, diffusion, scale, method).solve(FLOW, x, return_path=True)
    ode = ODESampler(grid, method).solve(FLOW, x, return_path=True)
    assert torch.equal(ours.path, ode.path)
    assert ours[1:3] == ode[1:3]


def test_the_last_step_has_no_noise_and_no_score():
    """From the state before it, the end is that of an ODE step."""
    x = torch.randn(5, 3)
    for method in ("euler", "heun"):
        found = SDESampler(4, method=method).solve(FLOW, x, return_path=True)
        last = ODESampler([0.75, 1.0], method)(FLOW, found.path[-2])
        assert torch.equal(found.x, last)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VP(0.0, 8.0)])
@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("diffusion", NAMES)
def test_all_is_finite_from_the_first_time_on(diffusion, method, path):
    """Where 1 / t and b(t) / t are not."""
    found = SDESampler(3, diffusion, 1.0, method, path).solve(
        lambda x, t, cond: -x, torch.ones(2, 2), return_path=True
    )
    assert bool(found.path.isfinite().all())


def test_named_diffusions():
    times = torch.tensor([0.0, 0.25, 0.5, 0.8, 1.0], dtype=torch.float64)
    expected = {
        "constant": [3, 3, 3, 3],
        "sine": [0, 3 * math.sqrt(0.5), 3, 3 * math.sin(0.8 * math.pi)],
        "sigma": [3, 3 * math.sqrt(0.75), 3 * math.sqrt(0.5), 3 * math.sqrt(0.2)],
        "sde-rl": [3, 3, 3, 1.5],
    }
    for name, values in expected.items():
        widths = SDESampler(times, name, 3.0)._widths(times)
        assert [left for left, _ in widths[:-1]] == pytest.approx(values[:3], abs=1e-12)
        assert [right for _, right in widths[:-1]] == pytest.approx(values[1:], abs=1e-12)
        assert widths[-1] == (0, 0)
    cosine = SDESampler(times, "sigma", 1.0, path=Cosine())._widths(times)
    assert cosine[1][0] ** 2 == pytest.approx(math.cos(math.pi / 8))


@pytest.mark.parametrize(
    ("method", "diffusion", "stable", "unstable"),
    [
        ("euler", "constant", 0.3, 1.0),
        ("heun", "constant", 0.2, 1.0),
        ("euler", "sigma", 2.4, 5.0),
        ("heun", "sigma", 2.0, 4.0),
    ],
)
def test_stability_near_the_end(method, diffusion, stable, unstable, monkeypatch):
    """Data of spread 0.001; without noise 100 Heun steps leave 0.005."""
    monkeypatch.setattr(sde, "_Noise", Basis)
    point = GaussianFlow(0.0, 1e-3)
    spread = [
        math.sqrt(moments(SDESampler(100, diffusion, scale, method), point)[1])
        for scale in (stable, unstable)
    ]
    assert spread[0] < 0.012
    assert spread[1] > 0.05


# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [None, [5, 0, 2**31 + 7, 5]])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_samples_do_not_depend_on_the_batch(method, seeds):
    sampler, x = SDESampler(5, method=method), torch.randn(4, 3)
    whole = sampler.solve(FLOW, x, seeds=seeds, return_path=True)
    halves = [
        sampler.solve(FLOW, x[rows], seeds=seeds and seeds[rows], return_path=True)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert torch.equal(torch.cat([half.path for half in halves], 1), whole.path)
    assert not torch.equal(whole.x, sampler.solve(FLOW, x, seeds=range(4)).x)


def test_step_k_takes_draw_k_after_the_start():
    """Also where steps before it have no noise: by hand, with one generator per sample."""
    seeds = [11, 12]
    for shape in ((3,), (2, 16)):
        draws = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            draws.append(torch.stack([torch.randn(shape, generator=generator) for _ in range(4)]))
        start, *noises = torch.stack(draws, 1)
        x0 = seeded_noise(shape, seeds)
        assert torch.equal(x0, start)
        steps = SDESampler([0.0, 0.25, 0.5, 0.75, 1.0], lambda t: float(t > 0.1))
        path = steps.solve(
            lambda x, t, cond: torch.zeros_like(x), x0, seeds=seeds, return_path=True
        ).path
        for k, t in ((1, 0.25), (2, 0.5)):  # the score at v = 0 is −x / (1 − t)
            expected = path[k] * (1 - 0.25 * 0.5 / (1 - t)) + 0.5 * noises[k]
            torch.testing.assert_close(path[k + 1], expected)
        assert torch.equal(path[1], x0)
        assert torch.equal(path[4], path[3])


def test_seeds_come_from_the_start_alone():
    x, sampler = torch.randn(3, 2), SDESampler(4)
    torch.manual_seed(1)
    first = sampler(FLOW, x)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(sampler(FLOW, x), first)
    assert torch.equal(torch.get_rng_state(), before)
    double = sampler(FLOW, x.double())
    torch.testing.assert_close(double.float(), first)
    twice = sampler(lambda x, t, cond: torch.zeros_like(x), torch.ones(2, 2))
    assert torch.equal(twice[0], twice[1])
    starts = torch.arange(4000.0)[:, None].expand(4000, 2)
    ends = SDESampler(2)(lambda x, t, cond: 0 * x, starts) - starts * (1 - 0.25)
    assert stats.kstest(ends.flatten().numpy(), stats.norm(0, math.sqrt(0.5)).cdf).pvalue > 0.01
    assert abs(torch.corrcoef(ends.T)[0, 1]) < 0.06


# --- log densities --------------------------------------------------------------------------------


@pytest.mark.parametrize("diffusion", ["constant", "sine", "sde-rl"])
def test_log_densities_are_those_of_the_steps(diffusion):
    """By torch's own density, from the states of the path; all steps without noise have 0."""
    n, x = 6, torch.randn(4, 3, 2, dtype=torch.float64)
    sampler = SDESampler(n, diffusion, 0.7)
    found = sampler.solve(FLOW, x, return_path=True, return_log_prob=True)
    assert found.log_prob.shape == (n, 4)
    for k in range(n):
        t, g = k / n, sampler._widths(sampler.times)[k][0]
        if g == 0:
            assert torch.equal(found.log_prob[k], torch.zeros(4).double())
            continue
        x, times = found.path[k], torch.full((4,), t, dtype=torch.float64)
        v = FLOW(x, times)
        score = -(x - 2 * t) / ((1 - t) ** 2 + 0.25 * t * t)  # of N(2t, (1 − t)² + t² / 4)
        step = torch.distributions.Normal(x + (v + g * g / 2 * score) / n, g / math.sqrt(n))
        expected = step.log_prob(found.path[k + 1]).flatten(1).sum(1)
        torch.testing.assert_close(found.log_prob[k], expected, rtol=1e-9, atol=1e-9)
    plain = sampler.solve(FLOW, found.path[0])
    assert plain.log_prob is None
    assert torch.equal(plain.x, found.x)


def test_log_densities_of_float32_states_are_in_float64():
    x = torch.randn(2, 5000)
    found = SDESampler(4).solve(FLOW, x, seeds=[0, 1], return_log_prob=True).log_prob
    exact = SDESampler(4).solve(FLOW, x.double(), seeds=[0, 1], return_log_prob=True).log_prob
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)  # of 5,000 numbers each
    assert found.dtype == torch.float64


def test_gradients_of_log_densities_hold_states_fixed():
    """The mean of their gradient over paths is 0, as a policy gradient needs; states' is not."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5000, 1, dtype=torch.float64)
    found = SDESampler(3, scale=0.5).solve(
        lambda x, t, cond: theta * x, x, seeds=range(5000), return_path=True, return_log_prob=True
    )
    assert not found.x.requires_grad
    gradient = torch.zeros(5000).double()
    for k, t in ((0, 0.0), (1, 1 / 3)):
        # mean(theta) = x + h (theta x + g²/2 score), score = -(x - t theta x) / (1 - t)
        h, variance, y = 1 / 3, 0.25 / 3, found.path[k, :, 0]
        slope = h * (y + 0.125 * t * y / (1 - t))
        mean = y + h * (0.3 * y - 0.125 * (y - t * 0.3 * y) / (1 - t))
        gradient += (found.path[k + 1, :, 0] - mean) * slope / variance
    found.log_prob.sum().backward()
    assert theta.grad.item() == pytest.approx(gradient.sum().item(), rel=1e-9)
    assert abs(gradient.mean()) < 4 * gradient.std() / math.sqrt(5000)


# --- the protocol of a solve ----------------------------------------------------------------------


class Told:
    """A velocity with an edge that keeps what it is told; it reuses its output."""

    def __init__(self):
        self.steps, self.calls, self.edges, self.buffer = [], [], (0.6,), None

    def bind(self, cond, grid):
        self.cond = cond
        return self

    def begin_step(self, left, right):
        self.steps.append((left, right))

    def __call__(self, x, t, cond=None):
        self.calls.append(t[0].item())
        if self.buffer is None:
            self.buffer = torch.empty_like(x)
        return self.buffer.copy_(FLOW(x, t))


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_steps_are_told_and_end_at_edges(method):
    x, field, cond = torch.randn(3, 2), Told(), torch.arange(3)
    sampler = SDESampler([0.0, 0.5, 1.0], "sine", 1.0, method)
    found = sampler.solve(field, x, cond, seeds=range(3), return_path=True)
    assert field.steps == [(0.0, 0.5), (0.5, 0.6), (0.6, 1.0)]
    assert field.cond is cond
    assert found.nfe == len(field.calls) == (3 if method == "euler" else 6)
    assert found.rows == 3 * found.nfe
    fine = SDESampler([0.0, 0.5, 0.6, 1.0], "sine", 1.0, method)
    expected = fine.solve(FLOW, x, seeds=range(3), return_path=True).path[[0, 1, 3]]
    assert torch.equal(found.path, expected)


def test_guidance_acts_on_drift_and_score():
    """Guided towards the right of two Gaussians: exact, since the field is that of a Gaussian."""

    def field(x, t, cond):
        return torch.where(cond[:, None] == 1, FLOW(x, t), GaussianFlow(0.0, 0.5)(x, t))

    guided, x = ClassifierFree(field, 2.0, 0), torch.randn(6, 3)
    labels = torch.ones(6, dtype=torch.long)
    sampler = SDESampler(10, "sigma")
    ours = sampler.solve(guided, x, labels)
    exact = sampler.solve(GaussianFlow(4.0, 0.5), x)
    torch.testing.assert_close(ours.x, exact.x, rtol=1e-5, atol=1e-5)
    assert (ours.nfe, ours.rows) == (10, 120)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_states_in_half_precision_are_solved_in_float32(method, dtype):
    """The result is that of float32, rounded; states in half precision would be 20 times off."""
    x = torch.randn(64, 3).to(dtype)
    sampler = SDESampler(100, "sigma", 0.5, method)

    def network(x, t, cond=None):
        assert x.dtype == dtype
        assert t.dtype == torch.float32
        return FLOW(x.float(), t).to(dtype)

    exact = sampler(FLOW, x.float())
    found = sampler.solve(network, x, return_path=True)
    assert found.x.dtype == found.path.dtype == dtype
    rounding = (exact.to(dtype) - exact).square().mean().sqrt()
    assert (found.x.float() - exact).square().mean().sqrt() < 2.5 * rounding


def test_gradients_flow_through_a_solve():
    def end(theta, x):
        return SDESampler(3, "sde-rl", 0.5, "heun").solve(
            lambda x, t, cond: torch.sin(theta * x) * t[:, None] + theta, x, seeds=[1, 2]
        ).x  # fmt: skip

    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (theta, x), eps=1e-6, atol=1e-5)


def test_the_input_is_not_changed():
    x = torch.randn(3, 2)
    before = x.clone()
    for scale in (0.0, 1.0):
        SDESampler(3, scale=scale)(FLOW, x)
        assert torch.equal(x, before)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SDESampler([1.0, 0.0]), ValueError, "grid must increase strictly"),
        (lambda: SDESampler(4, method="rk4"), ValueError, "method must be one of euler, heun, got"),
        (
            lambda: SDESampler(4, "cosine"),
            ValueError,
            "diffusion must be one of constant, sde-rl, sigma, sine, got",
        ),
        (lambda: SDESampler(4, 0.5), TypeError, "diffusion must be a name or a function of the t"),
        (lambda: SDESampler(4, scale=-1.0), ValueError, "scale must be at least 0, got -1.0"),
        (lambda: SDESampler(4, scale=math.nan), ValueError, "scale must be finite, got nan"),
        (
            lambda: SDESampler(4, lambda t: 1 / t if t else math.inf),
            ValueError,
            "diffusion must be finite and at least 0 before the end of the grid, got inf at t=0",
        ),
        (lambda: SDESampler(4, lambda t: 0.6 - t), ValueError, r"got -0\.15\d* at t=0\.75"),
        (
            lambda: SDESampler(4, path=BrownianBridge(0.1)),
            TypeError,
            "path must be one whose velocity gives a score, such as Linear, got BrownianBridge",
        ),
        (
            lambda: SDESampler(4).solve(FLOW, torch.zeros(2, 1), seeds=[1]),
            ValueError,
            "seeds must hold one seed per sample, 2, got 1",
        ),
        (
            lambda: SDESampler(4).solve(FLOW, torch.zeros(2, 1), seeds=2),
            TypeError,
            "seeds must be a sequence of integers, one per sample, got 2",
        ),
        (
            lambda: SDESampler(4, lambda t: torch.ones(2)).solve(FLOW, torch.zeros(2, 1)),
            TypeError,
            r"diffusion must return one number, got tensor\(\[1., 1.\]\) at t=0",
        ),
        (
            lambda: SDESampler(4, lambda t: None).solve(FLOW, torch.zeros(2, 1)),
            TypeError,
            "diffusion must return one number, got None at t=0",
        ),
        (
            lambda: SDESampler(4, method="heun").solve(
                FLOW, torch.zeros(2, 1), return_log_prob=True
            ),
            ValueError,
            "method must be 'euler' for log densities, got 'heun'; only its steps are Gaussian",
        ),
        (
            lambda: SDESampler(4)(FLOW, torch.full((2, 1), math.nan)),
            ValueError,
            "x must be finite, got 2 NaN",
        ),
    ],
)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_function_is_not_asked_for_the_end():
    """Where it may be infinite."""
    sampler = SDESampler(4, lambda t: 1 / (1 - t))
    assert bool(sampler(FLOW, torch.zeros(1, 1)).isfinite().all())
