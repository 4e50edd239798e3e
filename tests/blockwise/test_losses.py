"""The losses of blockwise flow matching, without Lightning."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowkit.blockwise import (
    Blockwise,
    BlockwiseMLP,
    blockwise_loss,
    equal_burden,
    loss_by_time,
    losses,
    residual_loss,
)
from flowkit.blockwise.losses import SegmentDraw, draw_segments, segment_mean
from flowkit.couplings import Gibbs, MinibatchOT
from flowkit.exact import GaussianFlow
from flowkit.guidance import DropCond
from flowkit.losses import flow_matching_loss
from flowkit.paths import VP, Cosine, Linear
from flowkit.times import Beta, LogitNormal, Stratified
from flowkit.types import Pairs


def tiny(edges=6, **options):
    flow = BlockwiseMLP((2,), edges=edges, width=16, **options)
    generator = torch.Generator().manual_seed(0)
    for p in flow.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return flow


class Exact:
    """The Gaussian field in every segment."""

    def velocity(self, x, t, cond, h):
        return GaussianFlow(2.0, 0.5)(x, t)


class Zero:
    """A field of zeros."""

    def velocity(self, x, t, cond, h):
        return torch.zeros_like(x)


def test_segments_count_the_same_however_many_rows_they_have():
    """Losses 0 to 5 in 10 rows: 2.5 over segments, where the batch's mean is 2.1."""
    segment = torch.arange(10) % 6
    assert segment.float().mean().item() == pytest.approx(2.1)
    mean = segment_mean(segment.float(), segment)
    assert mean.mean.item() == 2.5
    assert mean.values.tolist() == [0, 1, 2, 3, 4, 5]
    assert segment_mean(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([4, 4, 1])).mean.item() == 3.5
    sums, counts = torch.tensor([6.0, 0.0, 3.0]), torch.tensor([2.0, 0.0, 1.0])
    assert segment_mean(sums, torch.arange(3), counts).values.tolist() == [3, 0, 3]


def test_the_loss_is_the_mean_over_segments_of_the_plain_loss():
    flow, batch = tiny(), {"x1": torch.randn(10, 2)}
    draw = draw_segments(flow, batch)
    terms, h = blockwise_loss(flow, draw)
    by_hand = {}
    for m in draw.segment.unique().tolist():
        rows = draw.segment == m
        v = flow.stacks[m].velocity(draw.x_t[rows], draw.t[rows], None, h[rows])
        by_hand[f"segment_{m}"] = (v - draw.u[rows]).square().mean()
    assert set(terms) == {"loss", "explained", *by_hand}
    for name, value in by_hand.items():
        torch.testing.assert_close(terms[name], value)
    torch.testing.assert_close(terms["loss"], torch.stack([*by_hand.values()]).mean())
    # with as many rows in each segment it is the plain loss
    even = draw_segments(flow, {"x1": torch.randn(12, 2)})
    plain = (flow(even.x_t, even.t) - even.u).square().mean()
    torch.testing.assert_close(blockwise_loss(flow, even)[0]["loss"], plain)


def test_the_loss_of_the_exact_field_is_that_of_the_plain_loss():
    flow, batch = Blockwise(None, [Exact()] * 6, 6), {"x1": 2 + torch.randn(60_000, 2) / 2}
    terms, _ = blockwise_loss(flow, draw_segments(flow, batch))
    plain = flow_matching_loss(GaussianFlow(2.0, 0.5), batch, times=Stratified())
    assert terms["loss"].item() == pytest.approx(plain["loss"].item(), rel=0.01)
    assert terms["explained"].item() == pytest.approx(plain["explained"].item(), abs=0.01)


def test_a_batch_of_one_segment_leaves_other_stacks_without_gradient():
    flow = tiny()
    for chosen in ([2], range(6)):
        flow.zero_grad(set_to_none=True)
        batch = {"x1": torch.randn(12, 2)}
        blockwise_loss(flow, draw_segments(flow, batch, segments=chosen))[0]["loss"].backward()
        got = [
            m
            for m, stack in enumerate(flow.stacks)
            if any(p.grad is not None and p.grad.any() for p in stack.parameters())
        ]
        assert got == list(chosen)
        missing = [stack for m, stack in enumerate(flow.stacks) if m not in chosen]
        assert all(p.grad is None for stack in missing for p in stack.parameters())
        assert all(p.grad is not None for p in flow.trunk.blocks.parameters())


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 40), num_segments=st.integers(1, 9), seed=st.integers(0, 99))
def test_successive_batches_cover_every_segment_evenly(batch, num_segments, seed):
    """Also batches smaller than the number of segments; times lie in their own segments."""
    flow = Blockwise(None, [Exact()] * num_segments, num_segments)
    generator, counts = torch.Generator().manual_seed(seed), torch.zeros(num_segments)
    turns = -(-num_segments // batch) * 3
    for turn in range(turns):
        x1 = {"x1": torch.zeros(batch, 1)}
        draw = draw_segments(flow, x1, generator=generator, turn=turn)
        assert torch.equal(flow.segment_of(draw.t), draw.segment)
        mine = torch.bincount(draw.segment, minlength=num_segments)
        assert mine.max() - mine.min() <= 1
        counts += mine
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("edges", [6, [0.0, 0.05, 0.3, 1.0]])
def test_times_are_stratified_inside_each_segment(edges):
    flow = tiny(edges)
    draw = draw_segments(flow, {"x1": torch.randn(90, 2)})
    for m in range(flow.num_segments):
        t = draw.t[draw.segment == m].sort().values
        slices = flow.fraction(t, m) * len(t)
        assert slices.floor().tolist() == list(range(len(t)))
    # rows are dealt out at random, so that an order of the data is not one of time
    assert draw.segment[:12].tolist() != sorted(draw.segment[:12].tolist())


def test_rounding_of_times_does_not_reach_the_next_segment(monkeypatch):
    """The largest draws of float32 round to the end of their slice."""
    largest = torch.nextafter(torch.ones(()), torch.zeros(())).item()
    monkeypatch.setattr(
        losses.torch, "rand", lambda shape, *, dtype, **_: torch.full(shape, largest, dtype=dtype)
    )
    flow = tiny(3)
    draw = draw_segments(flow, {"x1": torch.zeros(90, 2), "x0": torch.zeros(90, 2)})
    assert torch.equal(flow.segment_of(draw.t), draw.segment)
    assert draw.t.max() < 1


@pytest.mark.parametrize("times", [LogitNormal(), Beta(3.0, 1.5)])
def test_any_density_is_restricted_to_the_segments(times):
    flow = tiny([0.0, 0.4, 1.0])
    draw = draw_segments(flow, {"x1": torch.zeros(40_000, 1)}, times=times)
    reference = times(400_000)
    for m, (low, high) in enumerate([(0.0, 0.4), (0.4, 1.0)]):
        t = draw.t[draw.segment == m]
        expected = reference[(reference >= low) & (reference < high)]
        quantiles = torch.tensor([0.1, 0.5, 0.9])
        torch.testing.assert_close(
            t.quantile(quantiles), expected[:200_000].quantile(quantiles), rtol=0, atol=0.01
        )


def test_a_density_that_misses_a_segment_is_refused():
    def late(batch, device=None, generator=None):
        return 0.5 + torch.rand(batch, generator=generator) / 2

    with pytest.raises(ValueError, match=r"times must reach every segment, .* missed \[0, 1\]"):
        draw_segments(tiny(4), {"x1": torch.randn(8, 2)}, times=late)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_those_of_float32(dtype):
    """Squares of 300 are beyond float16; weights and counts of masks are not rounded to it."""
    flow, x = Blockwise(None, [Zero(), Zero()], 2), torch.randn(2, 16, 64, 64)
    x0, x1 = x[0].to(dtype), (300 * x[1]).to(dtype)
    mask = (torch.rand(16, 64, 64) < 0.7).to(dtype)
    for options in ({}, {"mask": mask}):
        draw = draw_segments(flow, {"x0": x0, "x1": x1, **options})
        draw = draw._replace(pairs=draw.pairs._replace(log_weight=torch.linspace(0, 12, 16)))
        terms, _ = blockwise_loss(flow, draw)
        wide = draw._replace(u=draw.u.double(), x_t=draw.x_t.double())
        if options:
            wide = wide._replace(mask=mask.double())
        exact, _ = blockwise_loss(flow, wide)
        assert terms["loss"].dtype == torch.float32
        torch.testing.assert_close(terms["loss"].double(), exact["loss"], rtol=1e-5, atol=0)
        assert terms["explained"].item() == 0


def test_the_residuals_loss_of_half_precision_is_a_sum_in_float32():
    """Features of size 1000, whose squares are beyond float16; a residual of 0 explains nothing."""
    flow = cast(Any, SimpleNamespace())
    flow.edges, flow.fraction = (0.0, 1.0), lambda t, segment: t
    flow.features = lambda x, t, cond: 1000 * x
    flow.residual = lambda x, t, cond, start: torch.zeros_like(x)
    x0, x1, t = torch.zeros(4, 2).half(), torch.ones(4, 2).half(), torch.full((4,), 0.5)
    zero = torch.zeros(4, dtype=torch.long)
    draw = SegmentDraw(Pairs(x0, x1), (x1 / 2), t, x1, None, zero, None)
    terms = residual_loss(flow, draw)
    assert (terms["loss"].item(), terms["ratio"].item()) == (500**2, 1)


def test_a_batch_of_padding_alone_has_no_loss():
    batch = {"x1": torch.randn(6, 2), "mask": torch.zeros(6, 2)}
    flow = tiny(2)
    terms, _ = blockwise_loss(flow, draw_segments(flow, batch))
    assert terms["loss"].item() == terms["explained"].item() == 0
    terms["loss"].backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in flow.parameters())


def test_pairs_conditions_masks_and_weights_enter_as_in_the_plain_loss():
    flow = BlockwiseMLP((2,), edges=2, width=8, num_classes=3)
    x0, x1 = torch.randn(2, 8, 2)
    batch = {"x1": x1, "x0": x0, "cond": torch.arange(8) % 3}
    draw = draw_segments(flow, batch, drop_cond=DropCond(1.0, 3))
    assert torch.equal(draw.u, x1 - x0)
    assert draw.cond.tolist() == [3] * 8
    paired = draw_segments(flow, {"x0": x0, "x1": x1}, coupling=MinibatchOT())
    assert paired.u.square().sum() < draw.u.square().sum()
    # masked elements carry no loss
    mask = torch.tensor([1.0, 0.0]).expand(8, 2)
    draw = draw_segments(flow, {**batch, "mask": mask})
    torch.nn.init.normal_(flow.trunk.outputs.weight)
    masked, _ = blockwise_loss(flow, draw)
    v = flow(draw.x_t, draw.t, draw.cond)
    rows = (v - draw.u)[:, 0].square()
    torch.testing.assert_close(masked["loss"], segment_mean(rows, draw.segment).mean)
    # one value for all elements of a row counts as often as there are elements
    rowwise = torch.rand(8, 1)
    draw = draw_segments(flow, {**batch, "mask": rowwise})
    full = draw._replace(mask=rowwise.expand(8, 2))
    found, expected = (blockwise_loss(flow, d)[0]["loss"] for d in (draw, full))
    torch.testing.assert_close(found, expected)
    # a row without any counted element counts for nothing, as in the plain loss
    one = BlockwiseMLP((2,), edges=1, width=8, num_classes=3)
    torch.nn.init.normal_(one.trunk.outputs.weight)
    mask = torch.rand(8, 2) * (torch.arange(8) < 4)[:, None]
    draw = draw_segments(one, {**batch, "mask": mask})
    error = one(draw.x_t, draw.t, draw.cond) - draw.u
    by_hand = (error.square() * mask).sum() / mask.sum()
    torch.testing.assert_close(blockwise_loss(one, draw)[0]["loss"], by_hand)
    # weights multiply rows
    draw = draw_segments(flow, batch, coupling=Gibbs(1.0, normalize="class"))
    rows = (flow(draw.x_t, draw.t, draw.cond) - draw.u).square().mean(1)
    weighted = segment_mean(rows * draw.pairs.log_weight.exp(), draw.segment).mean
    torch.testing.assert_close(blockwise_loss(flow, draw)[0]["loss"], weighted)
    with pytest.raises(ValueError, match="batch must hold no t0 and t1, got chords"):
        draw_segments(flow, {**batch, "t0": torch.zeros(8), "t1": torch.ones(8)}, path=Cosine())


def test_the_target_is_the_velocity_on_a_curved_path_too():
    """On the cosine path with 6 segments the chord is 13.07 % off at a segment's end."""
    flow, batch = tiny(), {"x1": torch.randn(6, 2), "x0": torch.randn(6, 2)}
    draw = draw_segments(flow, batch, path=Cosine())
    half_pi = torch.pi / 2
    a, b = torch.cos(half_pi * draw.t)[:, None], torch.sin(half_pi * draw.t)[:, None]
    torch.testing.assert_close(draw.u, half_pi * (a * batch["x1"] - b * batch["x0"]))
    ends = torch.tensor([0.0, 1 / 6], dtype=torch.float64)
    basis = Cosine().coefficients(ends)
    chord = torch.stack([basis.a.diff(), basis.b.diff()]) * 6
    velocity = torch.stack([basis.da[:1], basis.db[:1]])
    error = (chord - velocity).norm() / velocity.norm()
    assert error.item() == pytest.approx(0.1307, abs=1e-4)


# --- feature residuals -----------------------------------------------------------------------


def test_residual_loss_by_hand_and_its_gradients():
    flow = tiny(3, residual_depth=1, num_classes=2)
    batch = {"x1": torch.randn(9, 2), "x0": torch.randn(9, 2), "cond": torch.arange(9) % 2}
    draw = draw_segments(flow, batch, drop_cond=DropCond(0.5, 2))
    terms = residual_loss(flow, draw)
    errors, starts = [], []
    for i in range(9):
        m = int(draw.segment[i])
        s = torch.tensor([m / 3])
        x_s = (1 - s) * batch["x0"][i] + s * batch["x1"][i]
        rows = slice(i, i + 1)
        x, t, c = draw.x_t[rows], draw.t[rows], draw.cond[rows]
        start, target = flow.trunk.features(x_s[None], s, c), flow.trunk.features(x, t, c)
        estimate = start + (3 * t - m) * flow.feature_residual(x, t, c)
        errors.append((estimate - target).square().mean())
        starts.append((start - target).square().mean())
    errors = torch.stack(errors)
    mean = segment_mean(errors, draw.segment)
    torch.testing.assert_close(terms["loss"], mean.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["segment_1"], mean.values[1], rtol=1e-4, atol=1e-6)
    ratio = errors.sum() / torch.stack(starts).sum()
    torch.testing.assert_close(terms["ratio"], ratio, rtol=1e-4, atol=1e-6)
    terms["loss"].backward()
    with_gradient = {n.split(".")[0] for n, p in flow.named_parameters() if p.grad is not None}
    assert with_gradient <= {"feature_residual", "trunk"}  # of the trunk: embedding and first layer
    assert all(p.grad is not None for p in flow.feature_residual.parameters())
    assert all(p.grad is None for p in flow.trunk.blocks.parameters())


def test_an_untrained_residual_starts_at_the_cached_feature():
    flow = BlockwiseMLP((2,), edges=3, width=16, residual_depth=1)
    for p in flow.trunk.blocks.parameters():
        torch.nn.init.normal_(p, std=0.3)
    draw = draw_segments(flow, {"x1": torch.randn(30, 2)})
    assert residual_loss(flow, draw)["ratio"].item() == 1.0


def test_weights_of_pairs_weigh_residuals():
    flow = tiny(3, residual_depth=1)
    draw = draw_segments(flow, {"x1": torch.randn(30, 2)})
    weight = torch.zeros(30).where(draw.segment != 1, math.log(3))  # as if its loss were thrice
    weighted = residual_loss(flow, draw._replace(pairs=draw.pairs._replace(log_weight=weight)))
    plain = residual_loss(flow, draw)
    torch.testing.assert_close(weighted["segment_1"], 3 * plain["segment_1"])
    torch.testing.assert_close(weighted["segment_2"], plain["segment_2"])


def test_residuals_may_be_compared_by_velocity():
    flow = tiny(3, residual_depth=1)
    draw = draw_segments(flow, {"x1": torch.randn(30, 2)})
    features, velocity = (residual_loss(flow, draw, compare=c) for c in ("features", "velocity"))
    assert features["ratio"] == velocity["ratio"]
    s = draw.segment / 3
    x_s = (1 - s[:, None]) * draw.pairs.x0 + s[:, None] * draw.pairs.x1
    c = (3 * draw.t - draw.segment)[:, None]
    estimate = flow.trunk.features(x_s, s) + c * flow.feature_residual(draw.x_t, draw.t)
    v, exact = (
        flow.velocity(draw.x_t, draw.t, None, h, draw.segment)
        for h in (estimate, flow.trunk.features(draw.x_t, draw.t))
    )
    by_hand = segment_mean((v - exact).square().mean(1), draw.segment).mean
    torch.testing.assert_close(velocity["loss"], by_hand, rtol=1e-4, atol=1e-7)
    same = tiny(3, residual_depth=1)
    same.trunk.outputs.weight.data.zero_()  # stacks that make nothing of their features
    assert residual_loss(same, draw, compare="velocity")["loss"] == 0
    with pytest.raises(ValueError, match="compare must be one of features, velocity, got 'both'"):
        residual_loss(flow, draw, compare="both")


# --- burden ----------------------------------------------------------------------------------


def test_loss_by_time_and_edges_of_equal_burden():
    """The loss of the exact field is known: ``Var(u | x_t) = std² / ((1 − t)² + t² std²)``."""
    batch = {"x1": 2 + torch.randn(40_000, 1) / 2}
    ends, loss = loss_by_time(GaussianFlow(2.0, 0.5), batch, 10, Linear())
    fine = (torch.arange(1000) + 0.5) / 1000
    density = 0.25 / ((1 - fine) ** 2 + fine**2 / 4)
    torch.testing.assert_close(
        loss.double(), density.reshape(10, 100).mean(1).double(), rtol=0.03, atol=0
    )
    edges = equal_burden(ends, loss, 4)
    assert edges[1] > 0.3  # the burden lies near the data


@pytest.mark.filterwarnings("ignore:MinibatchOT ignores cond")
@pytest.mark.parametrize(
    ("options", "sums", "cond", "segment"),
    [
        ({}, (8.166901394724846, 2.7397346701473, 11.417877301573753), range(6), 0),
        (
            {"coupling": MinibatchOT(), "turn": 2},
            (7.287773162126541, 2.7397346701473, 11.41787737980485),
            range(6),
            0,
        ),
        (
            {"path": VP(), "times": LogitNormal(), "drop_cond": DropCond(0.5, null=10)},
            (6.9558360055089, 2.917829141020775, 16.182293815072626),
            [10, 10, 2, 3, 4, 10],
            0,
        ),
        (
            {"path": Linear(sigma=0.1), "segments": [0, 2], "drop_cond": DropCond(0.5, null=10)},
            (10.284729182720184, 2.826489740051329, 11.417877301573753),
            [10, 1, 2, 10, 10, 10],
            1,
        ),
    ],
    ids=["plain", "coupling", "path, times and dropped", "noise of the path"],
)
def test_the_order_of_the_draws_is_fixed(options, sums, cond, segment):
    """Values of an earlier release: a resumed run goes on with the same noise and times."""
    batch = {"x1": torch.arange(12.0).reshape(6, 2) / 5, "cond": torch.arange(6)}
    draw = draw_segments(
        tiny(edges=3), batch, generator=torch.Generator().manual_seed(3), **options
    )
    found = [x.double().sum().item() for x in (draw.x_t, draw.t, draw.u)]
    assert found == pytest.approx(list(sums), rel=1e-5)
    assert draw.cond.tolist() == list(cond)
    assert draw.segment.tolist() == [[0, 1, 0, 2, 1, 2], [0, 0, 2, 0, 2, 2]][segment]
