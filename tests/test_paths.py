"""Probability paths against finite differences and Gaussian conditionals in closed form."""

import math
import re

import pytest
import torch

from flowkit.paths import VP, Affine, BrownianBridge, Cosine, Linear, Path

QUADRATIC = Affine(a=lambda t: t**2, b=lambda t: (1 - t) * (1 + t))
PATHS = [
    Linear(),
    Linear(sigma_min=0.1),
    Linear(sigma=0.3),
    Linear(sigma_min=0.05, sigma=0.2),
    Cosine(),
    VP(),
    VP(beta_min=0.5, beta_max=8.0),
    QUADRATIC,
]


def name_of(path):
    """An id that is the same in every process: functions print with their addresses."""
    return re.sub(r" at 0x\w+", "", str(path))


def pair(batch=64, shape=(3,)):
    return torch.randn(2, batch, *shape, dtype=torch.float64).unbind()


def times(batch=64, low=0.05, high=0.95):
    return torch.linspace(low, high, batch, dtype=torch.float64)


@pytest.mark.parametrize("path", [*PATHS, BrownianBridge(0.7)], ids=name_of)
def test_velocity_is_the_derivative(path):
    (x0, x1), t, h = pair(), times(), 1e-5

    def at(t):
        return path.sample(x0, x1, t, torch.Generator().manual_seed(0))

    slope = (at(t + h).x_t - at(t - h).x_t) / (2 * h)
    torch.testing.assert_close(at(t).u, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_conversions_are_gaussian_conditionals(path):
    """Data N(m, s²), noise N(0, 1): all conditional expectations given x_t are linear."""
    m, s, t = 1.5, 0.6, times()[:, None]
    zero, one = torch.zeros_like(t), torch.ones_like(t)

    def weigh(x0, x1):  # the deterministic part
        sample = path.sample(x0, x1, t[:, 0], torch.Generator().manual_seed(0))
        return torch.stack([sample.x_t, sample.u])

    offset = weigh(zero, zero)
    (a, da), (b, db) = weigh(zero, one) - offset, weigh(one, zero) - offset
    variance = a**2 * s**2 + b**2 + path.sigma**2
    x_t = a * m + variance.sqrt() * torch.randn_like(t)
    score = -(x_t - a * m) / variance
    data, noise = m - a * s**2 * score, -b * score

    v = da * data + db * noise
    t = t[:, 0]
    torch.testing.assert_close(path.to_data(x_t, t, v), data, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.to_noise(x_t, t, v), noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.to_score(x_t, t, v), score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [Linear(), Linear(0.1), Cosine(), VP(), QUADRATIC], ids=name_of)
def test_one_pair_is_recovered_at_any_time(path):
    (x0, x1), t = pair(shape=(2, 4)), times(low=0.1, high=0.99)
    x_t, t, u = path.sample(x0, x1, t)
    torch.testing.assert_close(path.to_data(x_t, t, u), x1, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(path.to_noise(x_t, t, u), x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", [Linear(), Cosine(), VP(), QUADRATIC, BrownianBridge(1.0)])
def test_ends(path, dtype):
    x0, x1 = (x.to(dtype) for x in pair())
    if not isinstance(path, VP):  # VP leaves a trace α(0) = .0066 of the data
        assert torch.equal(path.sample(x0, x1, torch.zeros(64, dtype=dtype)).x_t, x0)
    assert torch.equal(path.sample(x0, x1, torch.ones(64, dtype=dtype)).x_t, x1)


def test_sigma_min_leaves_that_much_noise():
    x0, x1 = pair()
    end = Linear(sigma_min=0.1).sample(x0, x1, torch.ones(64).double()).x_t
    torch.testing.assert_close(end, x1 + 0.1 * x0)


def test_constant_width_is_added_noise():
    x0, x1 = torch.zeros(2, 100_000, 1, dtype=torch.float64).unbind()
    x_t = Linear(sigma=0.1).sample(x0, x1, torch.full((100_000,), 0.3).double()).x_t
    assert x_t.std().item() == pytest.approx(0.1, rel=0.02)


def test_vp_is_the_diffusion_of_linear_rates():
    """d log α / dt = ½ β(1−t) with β(s) from beta_min to beta_max, and α² + b² = 1."""
    t = times()
    a, b, da, db = VP(beta_min=0.5, beta_max=8.0).coefficients(t)
    torch.testing.assert_close(da / a, 0.5 * (0.5 + (1 - t) * 7.5))
    torch.testing.assert_close(a**2 + b**2, torch.ones_like(t))
    torch.testing.assert_close(a * da + b * db, torch.zeros_like(t), rtol=0, atol=1e-12)
    assert VP().coefficients(torch.zeros(1)).a.item() == pytest.approx(math.exp(-5.025))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vp_converts_at_the_data_end_too(dtype):
    x0, x1 = (x.to(dtype) for x in pair())
    x0[0] = 0.0
    x_t, t, u = VP().sample(x0, x1, torch.ones(64, dtype=dtype))
    assert u.isfinite().all()
    torch.testing.assert_close(VP().to_data(x_t, t, u), x1)
    torch.testing.assert_close(VP().to_noise(x_t, t, u), x0)


@pytest.mark.parametrize(
    ("affine", "path"),
    [
        (Affine(lambda t: t, lambda t: 1 - t), Linear()),
        (Affine(lambda t: (math.pi / 2 * t).sin(), lambda t: (math.pi / 2 * t).cos()), Cosine()),
    ],
)
def test_affine_equals_the_named_path(affine, path):
    (x0, x1), t = pair(), times(low=0.0, high=1.0)
    for ours, theirs in zip(affine.sample(x0, x1, t), path.sample(x0, x1, t), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_affine_derivatives_are_exact():
    t = times()
    a, b, da, db = QUADRATIC.coefficients(t)
    torch.testing.assert_close(
        torch.stack([a, b, da, db]), torch.stack([t**2, 1 - t**2, 2 * t, -2 * t])
    )


def test_bridge_has_its_width_and_drift():
    sigma, t = 0.8, torch.full((200_000,), 0.3, dtype=torch.float64)
    x0, x1 = torch.full((200_000, 1), -1.0).double(), torch.full((200_000, 1), 2.0).double()
    x_t, _, u = BrownianBridge(sigma).sample(x0, x1, t)
    assert x_t.mean().item() == pytest.approx(-0.1, abs=0.01)
    assert x_t.var().item() == pytest.approx(sigma**2 * 0.3 * 0.7, rel=0.02)
    torch.testing.assert_close(u, 3 + (1 - 0.6) / (2 * 0.3 * 0.7) * (x_t + 0.1))


def test_bridge_is_finite_at_both_ends():
    x0, x1 = pair()
    for t in (torch.zeros(64), torch.ones(64)):
        assert torch.equal(BrownianBridge(1.0).sample(x0, x1, t.double()).u, x1 - x0)


@pytest.mark.parametrize(
    "path", [Linear(sigma=0.1), Cosine(), VP(), QUADRATIC, BrownianBridge(1.0)]
)
def test_half_precision_data_meets_full_precision_times(path):
    x0, x1 = (x.bfloat16() for x in pair())
    t = torch.linspace(0.001, 0.999, 64)
    x_t, _, u = path.sample(x0, x1, t, torch.Generator().manual_seed(0))
    assert x_t.dtype == u.dtype == torch.bfloat16
    if not hasattr(path, "sigma") or not path.sigma:
        exact = path.sample(x0.double(), x1.double(), t.double())
        torch.testing.assert_close(x_t.double(), exact.x_t, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("path", [Linear(sigma=0.5), BrownianBridge(0.5)])
def test_noise_follows_the_generator(path):
    (x0, x1), t = pair(), times()
    a, b, c = (path.sample(x0, x1, t, torch.Generator().manual_seed(k)).x_t for k in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_every_path_is_a_path():
    assert all(isinstance(path, Path) for path in [*PATHS, BrownianBridge(1.0)])


@pytest.mark.parametrize("path", [Linear(), BrownianBridge(1.0)], ids=name_of)
def test_bad_samples_are_refused(path):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got values in \[5.0, 5.0\]"):
        path.sample(x, x, torch.full((2,), 5.0))
    with pytest.raises(ValueError, match=r"x0 must have the shape of x1, \(2, 3\), got \(1, 3\)"):
        path.sample(x[:1], x, torch.zeros(2))
    with pytest.raises(ValueError, match=r"t must have shape \(2,\), got \(2, 1\)"):
        path.sample(x, x, torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(sigma_min=1.0), r"sigma_min must lie in \[0, 1\), got 1.0"),
        (lambda: Linear(sigma=-0.1), "sigma must be at least 0, got -0.1"),
        (lambda: VP(beta_min=3, beta_max=2), r"beta_min must lie in \[0, beta_max\)"),
        (lambda: BrownianBridge(-1), "sigma must be at least 0, got -1"),
        (lambda: Affine(lambda t: 1 - t, lambda t: t), "a must be 0 at t = 0, got 1.0"),
        (lambda: Affine(lambda t: t, lambda t: 1 - t / 2), "b must be 0 at t = 1, got 0.5"),
    ],
)
def test_bad_paths_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_misspelt_keyword_is_refused():
    with pytest.raises(TypeError, match="sigma_mim"):
        Linear(sigma_mim=0.1)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("path", [Linear(), Cosine(), VP(), QUADRATIC], ids=name_of)
def test_score_at_the_data_end_is_refused(path):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\) for to_score, got 1.0"):
        path.to_score(x, torch.tensor([0.5, 1.0]), x)


@pytest.mark.parametrize("path", [Linear(sigma_min=0.1), Linear(sigma=0.1)], ids=name_of)
def test_score_at_the_data_end_exists_where_noise_is_left(path):
    """x_1 = x1 + 0.1 noise; with data at 0, E[u | x_1] = −E[(1−σ_min) x0 | x_1]."""
    x = torch.full((1, 1), 0.02, dtype=torch.float64)
    v = -(1 - path.sigma_min) * 10 * x * bool(path.sigma_min)
    score = path.to_score(x, torch.ones(1).double(), v)
    torch.testing.assert_close(score, -x / 0.1**2)
