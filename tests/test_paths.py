"""Probability paths against finite differences and Gaussian conditionals in closed form."""

import math
import re

import pytest
import torch

from flowkit.paths import VP, Affine, BrownianBridge, Cosine, Linear, Path, noise_like

QUADRATIC = Affine(a=lambda t: t**2, b=lambda t: (1 - t) * (1 + t))
PATHS = [
    Linear(),
    Linear(sigma_min=0.1),
    Linear(sigma=0.3),
    Linear(sigma_min=0.05, sigma=0.2),
    Cosine(),
    VP(),
    VP(beta_min=0.5, beta_max=8.0),
    VP(beta_min=0.0, beta_max=8.0),
    QUADRATIC,
]

SMOOTH = Affine(a=lambda t: t**2 * (3 - 2 * t), b=lambda t: (1 - t) ** 2 * (1 + 2 * t))
SINE = Affine(a=lambda t: (math.pi / 2 * t).sin(), b=lambda t: (math.pi / 2 * (1 - t)).sin())
ROOT = Affine(a=lambda t: t, b=lambda t: ((1 - t) * (1 + t)).sqrt())


def unbounded(path):
    """The velocity of the noise is unbounded at the data."""
    return path is ROOT or (isinstance(path, VP) and path.beta_min > 0)


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
@pytest.mark.parametrize("path", [Linear(), Cosine(), VP(), VP(0), QUADRATIC, BrownianBridge(1.0)])
def test_ends(path, dtype):
    x0, x1 = (x.to(dtype) for x in pair())
    if not isinstance(path, VP):  # VP leaves a trace α(0) = .0066 of the data
        assert torch.equal(path.sample(x0, x1, torch.zeros(64, dtype=dtype)).x_t, x0)
    if not unbounded(path):
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


# --- both ends, in every precision ----------------------------------------------------------------

NOISELESS = [Linear(), Linear(0.1), Cosine(), VP(), VP(0), QUADRATIC, SMOOTH, SINE, ROOT]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def near_ends(dtype):
    """Both ends, and the numbers next to them."""
    eps = torch.finfo(dtype).eps
    return [0.0, torch.finfo(dtype).tiny, eps, 0.5, 1 - eps, 1 - eps / 2, 1.0]


def determined(path, t):
    """Which of data and noise the velocity at ``t`` determines, from Taylor series at the ends.

    Data at 0: the velocity is a' x1 + b' x0 with a' > 0. Noise at 1: b' is finite and not 0.
    """
    data = t > 0 or path not in (QUADRATIC, SMOOTH)
    noise = t < 1 or not (unbounded(path) or path is SMOOTH)
    return data, noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", NOISELESS, ids=range(len(NOISELESS)))
def test_both_ends_of_a_pair_are_recovered_near_both_ends(path, dtype):
    """x_t and u hold x0 and x1 up to their own rounding, whatever is small at this time."""
    x0, x1 = torch.tensor([[0.7]], dtype=dtype), torch.tensor([[-1.3]], dtype=dtype)
    for value in near_ends(dtype):
        t = torch.tensor([value], dtype=dtype)
        data, noise = determined(path, value)
        if value == 1 and unbounded(path):
            with pytest.raises(ValueError, match=r"the velocity is finite, got 1.0"):
                path.sample(x0, x1, t)
            x_t, v = x1, torch.full_like(x1, 5.0)  # any finite velocity
        else:
            x_t, _, v = path.sample(x0, x1, t)
        for known, convert, wanted in ((data, path.to_data, x1), (noise, path.to_noise, x0)):
            if known:
                found = convert(x_t, t, v)
                assert found.dtype == dtype
                assert abs(found - wanted).item() <= 8 * torch.finfo(dtype).eps, (value, convert)
            else:
                name = "data" if wanted is x1 else "noise"
                rule = f"^t must be a time at which the velocity determines the {name}, got {value}"
                with pytest.raises(ValueError, match=rule):
                    convert(x_t, t, v)
        if 0 <= value < 0.6:
            b = path.coefficients(t.double()[:, None]).b
            score = path.to_score(x_t, t, v)
            assert score.dtype == dtype
            assert abs(score + x0 / b).item() <= 16 * torch.finfo(dtype).eps


def test_one_time_without_a_velocity_is_refused_among_others():
    x, t = torch.zeros(3, 1), torch.tensor([0.5, 1.0, 0.2])
    with pytest.raises(ValueError, match=r"t must be a time at which the velocity is .* got 1\.0"):
        VP().sample(x, x, t)
    with pytest.raises(ValueError, match=r"the velocity is finite, got 0\.0"):
        Affine(lambda t: t.sqrt(), lambda t: 1 - t).sample(x, x, 1 - t)
    with pytest.raises(ValueError, match=r"the velocity determines the data, got 0\.0"):
        QUADRATIC.to_data(x, 1 - t, x)


@pytest.mark.parametrize("beta_min", [0.0, 0.1, 3.0])
def test_vp_has_its_series_at_the_data(beta_min):
    """For s = 1 − t → 0: b² = β s + ½ γ s² − ½ β² s² + O(s³), with γ = β_max − β_min."""
    path, s = VP(beta_min, 20.0), torch.tensor([1e-3, 1e-4, 1e-5, 1e-6], dtype=torch.float64)
    a, b, da, db = path.coefficients(1 - s)
    spread = 20.0 - beta_min
    b2 = beta_min * s + (spread - beta_min**2) / 2 * s**2
    db2 = beta_min + (spread - beta_min**2) * s
    error = 100 * spread * s**2 + 1e-9
    assert ((b**2 / b2 - 1).abs() < error + 300 * s * s / b2 * s).all()
    assert ((-2 * b * db / db2 - 1).abs() < error + 1000 * s).all()
    assert ((da - (beta_min + spread * s) / 2 * a).abs() < 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vp_without_noise_at_the_data_has_a_velocity_there(dtype):
    """β_min = 0: b = s √(γ/2) + O(s³), so b' = −√(γ/2) and a' = 0 at t = 1."""
    a, b, da, db = VP(beta_min=0.0, beta_max=18.0).coefficients(torch.ones(1, dtype=dtype))
    assert (a.item(), b.item(), da.item(), db.item()) == (1, 0, 0, -3)


@pytest.mark.parametrize("path", NOISELESS, ids=range(len(NOISELESS)))
def test_half_precision_times_do_not_coarsen_coefficients(path):
    """The state at a bfloat16 time differs from that in float64 by its own rounding alone."""
    t = torch.linspace(0, 1, 60)[:-1].bfloat16()
    x0, x1 = (x.bfloat16() for x in pair(len(t)))
    ours = path.sample(x0, x1, t)
    exact = path.sample(x0.double(), x1.double(), t.double())
    for found, wanted in ((ours.x_t, exact.x_t), (ours.u, exact.u)):
        assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("path", [*NOISELESS, Linear(sigma=0.3)], ids=range(10))
def test_results_have_the_type_of_the_states(path):
    (x0, x1), t = pair(), times()
    for dtype in DTYPES:
        x_t, _, u = path.sample(x0.to(dtype), x1.to(dtype), t)
        results = [x_t, u, *(f(x_t, t, u) for f in (path.to_data, path.to_noise, path.to_score))]
        assert {x.dtype for x in results} == {dtype}


@pytest.mark.parametrize("path", [ROOT, QUADRATIC, SMOOTH, Cosine()], ids=range(4))
def test_gradients_of_conversions_at_the_ends_are_finite(path):
    x, v = (x.requires_grad_() for x in pair(4))
    at_data, at_noise = torch.ones(4).double(), torch.zeros(4).double()
    both = path.to_data(x, at_data, v).sum() + 2 * path.to_noise(x, at_noise, v).sum()
    of_x, of_v = torch.autograd.grad(both, (x, v))
    torch.testing.assert_close(of_x, torch.full_like(x, 1 + 2 / path.coefficients(at_noise).b[0]))
    assert torch.equal(of_v, torch.zeros_like(v))


@pytest.mark.parametrize("path", [Linear(sigma=0.5), BrownianBridge(0.5)])
def test_noise_follows_the_generator(path):
    (x0, x1), t = pair(), times()
    a, b, c = (path.sample(x0, x1, t, torch.Generator().manual_seed(k)).x_t for k in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("path", [Linear(sigma=0.3), BrownianBridge(0.3)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_samples_with_noise_keep_their_type_and_their_times(path, dtype):
    x0, x1 = (x.to(dtype) for x in pair())
    assert noise_like(x1).dtype == dtype
    x_t, t, u = path.sample(x0, x1, time := times())
    assert t is time
    assert (x_t.dtype, u.dtype) == (dtype, dtype)


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
    if path == Linear():
        for convert in (path.to_data, path.to_noise, path.to_score):
            with pytest.raises(ValueError, match=r"^v must have the shape of x_t, \(2, 3\), got"):
                convert(x, torch.full((2,), 0.5), x[:1])


WRONG = [
    (
        torch.zeros(2, 3, dtype=torch.long),
        TypeError,
        "must be a floating-point tensor, got torch.i",
    ),
    (torch.zeros(2, 3, dtype=torch.cfloat), TypeError, "must be a floating-point tensor, got tor"),
    (
        torch.zeros(2, 3, device="meta"),
        TypeError,
        "must hold data, got a tensor on the meta device",
    ),
    (torch.zeros(0, 3), ValueError, r"must hold at least one sample, .* got shape \(0, 3\)"),
    ([[0.0]], TypeError, "must be a floating-point tensor, got list"),
]


@pytest.mark.parametrize(("x", "error", "message"), WRONG)
@pytest.mark.parametrize("path", [Linear(), BrownianBridge(1.0)], ids=name_of)
def test_bad_kinds_are_refused(path, x, error, message):
    good, t = torch.zeros(2, 3), torch.full((2,), 0.5)
    with pytest.raises(error, match=f"x0 {message}"):
        path.sample(x, good, t)
    with pytest.raises(error, match=f"x1 {message}"):
        path.sample(good, x, t)
    if path == Linear():
        for convert in (path.to_data, path.to_noise, path.to_score):
            with pytest.raises(error, match=f"v {message}"):
                convert(good, t, x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(sigma=math.inf), "sigma must be finite, got inf"),
        (lambda: BrownianBridge(math.nan), "sigma must be finite, got nan"),
        (lambda: VP(beta_max=math.inf), "beta_max must be finite, got inf"),
        (lambda: Affine(lambda t: t / t, lambda t: 1 - t), "a at t = 0 must be finite, got nan"),
        (lambda: Affine(lambda t: t, lambda t: 1 / t - 1), "b at t = 0 must be finite, got inf"),
        (lambda: Linear(sigma_min=1.0), r"sigma_min must lie in \[0, 1\), got 1.0"),
        (lambda: Linear(sigma=-0.1), "sigma must be at least 0, got -0.1"),
        (lambda: VP(beta_min=3, beta_max=2), r"beta_min must lie in \[0, beta_max\)"),
        (lambda: VP(beta_min=2, beta_max=2), r"beta_min must lie in \[0, beta_max\)"),
        (lambda: BrownianBridge(-1), "sigma must be at least 0, got -1"),
        (lambda: Affine(lambda t: 1 - t, lambda t: t), "a must be 0 at t = 0, got 1.0"),
        (lambda: Affine(lambda t: t, lambda t: 1 - t / 2), "b must be 0 at t = 1, got 0.5"),
    ],
)
def test_bad_paths_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_end_may_differ_by_a_thousandth():
    """As a number of float64; in float32 this number is larger."""
    path = Affine(lambda t: t, lambda t: (1 - t).clamp_min(1e-3))
    assert path.coefficients(torch.ones(1, dtype=torch.float64)).b.item() == 1e-3


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
