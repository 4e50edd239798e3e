"""Training-time distributions against their closed-form laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import flowkit.times
from flowkit.times import Beta, LogitNormal, Stratified, Times, Uniform

LAWS = [
    (Uniform(), stats.uniform.cdf),
    (Stratified(), stats.uniform.cdf),
    (LogitNormal(), lambda t: stats.norm.cdf(torch.logit(torch.as_tensor(t)))),
    (LogitNormal(0.5, 2.0), lambda t: stats.norm.cdf(torch.logit(torch.as_tensor(t)), 0.5, 2.0)),
    (Beta(2.0, 1.0), stats.beta(2, 1).cdf),
    (Beta(0.5, 0.7), stats.beta(0.5, 0.7).cdf),
    (Beta(3.0, 8.0), stats.beta(3, 8).cdf),
    (Beta(1.5, 1.0, 0.999, reverse=True), stats.beta(1.0, 1.5, scale=0.999).cdf),
    (Beta(2.0, 5.0, scale=0.5), stats.beta(2, 5, scale=0.5).cdf),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("times", "cdf"), LAWS, ids=[str(times) for times, _ in LAWS])
def test_law(times, cdf):
    t = times(20_000, generator=generator())
    assert stats.kstest(t.double().numpy(), cdf).pvalue > 0.01


@pytest.mark.parametrize("times", [times for times, _ in LAWS], ids=str)
def test_generator_fixes_the_draw(times):
    a, b, c = (times(100, generator=generator(k)) for k in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.dtype == torch.float32
    assert isinstance(times, Times)


def test_times_of_action_chunks_are_the_published_ones():
    """Mean 0.999 · 2/5 = 0.3996, and 1 − (1 − 0.1/0.999)^1.5 = 0.1463 of them below 0.1."""
    t = Beta(1.5, 1.0, scale=0.999, reverse=True)(400_000, generator=generator()).double()
    assert abs(t.mean() - 0.3996) < 4 * t.std() / len(t) ** 0.5
    assert abs((t < 0.1).double().mean() - 0.1463) < 4 * (0.125 / len(t)) ** 0.5
    assert t.max() <= 0.999


def test_logit_normal_times_follow_the_generators_normal_numbers():
    """In the order of earlier versions, so that a resumed run goes on with the same times."""
    z = torch.randn(100, generator=generator())
    assert torch.equal(LogitNormal(0.5, 2.0)(100, generator=generator()), (0.5 + 2 * z).sigmoid())


@given(batch=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_stratified_covers_every_slice_once(batch, seed):
    t = Stratified()(batch, generator=generator(seed)).double()
    assert ((t >= 0) & (t < 1)).all()
    edges = torch.arange(batch + 1).double() / batch
    # a rounding to float32 may leave a slice by its last digit
    assert (t.sort().values >= edges[:-1] - 1e-7).all()
    assert (t.sort().values <= edges[1:] + 1e-7).all()


def test_stratified_order_is_random():
    first = torch.stack([Stratified()(8, generator=generator(k))[0] for k in range(2000)])
    assert stats.kstest(first.numpy(), stats.uniform.cdf).pvalue > 0.01


@pytest.mark.parametrize("world", [2, 3])
def test_stratified_over_ranks_is_stratified_as_a_whole(monkeypatch, world):
    parts = []
    for rank in range(world):
        monkeypatch.setattr(flowkit.times, "place", lambda rank=rank: (rank, world))
        parts.append(Stratified()(8, generator=generator(rank)))
    slices = (torch.cat(parts).sort().values * 8 * world).floor()
    assert torch.equal(slices, torch.arange(8.0 * world))
    assert all((part * 8).floor().unique().numel() == 8 for part in parts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitNormal(mean=float("nan")), "mean must be finite, got nan"),
        (lambda: LogitNormal(mean=float("inf")), "mean must be finite, got inf"),
        (lambda: LogitNormal(std=float("nan")), "std must be positive and finite, got nan"),
        (lambda: LogitNormal(std=0.0), "std must be positive and finite, got 0.0"),
        (lambda: Beta(0.0, 1.0), "a must be positive and finite, got 0.0"),
        (lambda: Beta(-1.0, 1.0), "a must be positive and finite, got -1.0"),
        (lambda: Beta(float("nan"), 1.0), "a must be positive and finite, got nan"),
        (lambda: Stratified()(-1), "batch must be at least 0, got -1"),
        (lambda: Beta(1.0, 1.0, scale=0.0), "scale must be positive and finite, got 0.0"),
        (lambda: Beta(1.0, 1.0, scale=1.5), r"scale must lie in \[0, 1\], got 1.5"),
        (lambda: Beta(1.0, float("inf")), "b must be positive and finite, got inf"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


EXTREME = [
    Beta(1.5, 1e-3),
    Beta(1e-3, 1e-3),
    Beta(0.1, 0.3),
    Beta(1e-30, 2e-30),
    Beta(1e30, 1.0),
    LogitNormal(0.0, 50.0),
    LogitNormal(40.0),
    LogitNormal(-200.0),
    Uniform(),
    Stratified(),
]


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("times", EXTREME, ids=str)
def test_no_time_is_rounded_to_an_end(times, default):
    """Also if a trainer makes another type torch's default."""
    torch.set_default_dtype(default)
    try:
        t = times(20_000, generator=generator())
    finally:
        torch.set_default_dtype(torch.float32)
    assert t.dtype == torch.float32
    assert ((t >= 2**-24) & (t <= 1 - 2**-24)).all()
    assert torch.equal(t, times(20_000, generator=generator()))


@pytest.mark.parametrize(
    ("a", "b", "share"), [(1e-3, 1e-3, 0.5), (0.1, 0.3, 0.75), (1e-30, 2e-30, 2 / 3)]
)
def test_extreme_beta_has_its_weight_at_both_ends(a, b, share):
    """For a, b → 0 the law is 0 with probability b / (a + b), and 1 otherwise."""
    t = Beta(a, b)(100_000, generator=generator())
    below = stats.beta(a, b).cdf(0.5) if a > 1e-10 else share
    assert (t < 0.5).float().mean().item() == pytest.approx(below, abs=0.006)


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-24])
def test_the_ends_of_a_uniform_draw_stay_inside(monkeypatch, drawn):
    def rand(*size, **options):
        return torch.full(size, drawn, dtype=options["dtype"])

    monkeypatch.setattr(torch, "rand", rand)
    for times in (Uniform(), Stratified(), Beta(0.5, 0.5)):
        t = times(1000, generator=generator())
        assert ((t >= 2**-24) & (t <= 1 - 2**-24)).all()
