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
        (lambda: LogitNormal(std=0.0), "std must be positive and finite, got 0.0"),
        (lambda: Beta(0.0, 1.0), "a must be positive and finite, got 0.0"),
        (lambda: Beta(1.0, float("inf")), "b must be positive and finite, got inf"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_extreme_beta_gives_no_nan():
    t = Beta(1e-3, 1e-3)(10_000, generator=generator())
    assert ((t >= 0) & (t <= 1)).all()
    assert t.mean().item() == pytest.approx(0.5, abs=0.02)
