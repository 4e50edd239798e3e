"""The flow-matching loss against its known values."""

import math

import pytest
import torch

from flowkit.couplings import Independent, MinibatchOT, Sinkhorn
from flowkit.exact import GaussianFlow
from flowkit.guidance import DropCond
from flowkit.losses import draw_pairs, flow_matching_loss
from flowkit.paths import VP, BrownianBridge, Cosine, Linear, PathSample
from flowkit.times import Beta, LogitNormal, Stratified, Uniform
from flowkit.types import Pairs


def zero(x, t, cond=None):
    return torch.zeros_like(x)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class OneEnd:
    """The state stays at the source."""

    def sample(self, x0, x1, t, generator=None):
        return PathSample(x0, t, x1 - x0)


ONE_END = OneEnd()


class Weighted:
    """Independent pairs with given log weights."""

    def __init__(self, log_weight):
        self.log_weight = log_weight

    def pair(self, x0, x1, cond=None, generator=None):
        return Pairs(x0, x1, cond, self.log_weight)


def test_zero_network_loses_one_plus_the_energy_of_the_data():
    z = torch.randn(50_000, 4)
    result = flow_matching_loss(zero, {"x1": z}, generator=generator(1))
    assert result["loss"].item() == pytest.approx(2.0, abs=0.02)
    assert result["explained"].item() == 0.0
    shifted = flow_matching_loss(zero, {"x1": 3 + 0.5 * z}, generator=generator(1))
    assert shifted["loss"].item() == pytest.approx(1 + 9 + 0.25, rel=0.01)


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_exact_velocity_loses_the_irreducible_part(std):
    x1 = 2.0 + std * torch.randn(400_000, 1, dtype=torch.float64)
    result = flow_matching_loss(GaussianFlow(2.0, std), {"x1": x1}, generator=generator(1))
    assert result["loss"].item() == pytest.approx(std * math.pi / 2, rel=0.01)
    energy = 1 + 4 + std**2
    assert result["explained"].item() == pytest.approx(1 - std * math.pi / 2 / energy, abs=0.01)


@pytest.mark.parametrize("path", [Linear(sigma=0.1), Cosine(), VP(), BrownianBridge(0.5)], ids=str)
def test_velocity_is_compared_with_the_paths(path):
    x0, x1 = torch.randn(2, 64, 3, dtype=torch.float64).unbind()
    samples = []

    class Spy:
        def sample(self, *arguments):
            samples.append(path.sample(*arguments))
            return samples[-1]

    def field(x, t, cond):
        assert x is samples[0].x_t
        assert t is samples[0].t
        return samples[0].u + 2

    result = flow_matching_loss(field, {"x0": x0, "x1": x1}, path=Spy())
    assert result["loss"].item() == pytest.approx(4)
    assert result["explained"].item() == pytest.approx(1 - 4 / samples[0].u.square().mean().item())


def test_given_pairs_need_no_noise():
    x0, x1 = torch.randn(2, 64, 3).unbind()
    result = flow_matching_loss(
        lambda x, t, c: x1 - x0,
        {"x0": x0, "x1": x1},
        observe=lambda pairs: {"gap": pairs.x1 - pairs.x0},
    )
    assert result["loss"].item() == pytest.approx(0, abs=1e-12)
    assert torch.equal(result["gap"], x1 - x0)


def test_coupled_pairs_are_used():
    x0, x1 = torch.randn(2, 64, 2).unbind()
    batch = {"x0": x0, "x1": x1}
    independent, coupled = (
        flow_matching_loss(zero, batch, coupling=coupling)["loss"]
        for coupling in (Independent(), MinibatchOT())
    )
    pairs = MinibatchOT().pair(x0, x1)
    torch.testing.assert_close(coupled, (pairs.x1 - pairs.x0).square().mean())
    assert coupled < independent


def test_masked_elements_do_not_count():
    x0, x1 = torch.randn(2, 8, 4).unbind()
    mask = (torch.arange(4) < torch.tensor([1, 2, 3, 4] * 2)[:, None]).float()
    x1_padded = torch.where(mask.bool(), x1, 1e6)
    result = flow_matching_loss(zero, {"x0": x0, "x1": x1_padded, "mask": mask})
    ours = result["loss"]
    torch.testing.assert_close(ours, (x1 - x0)[mask.bool()].square().mean())
    assert result["explained"].item() == 0
    boolean = flow_matching_loss(zero, {"x0": x0, "x1": x1_padded, "mask": mask.bool()})["loss"]
    assert torch.equal(ours, boolean)


def test_a_mask_is_counted_over_all_ranks_while_gradients_are_enabled(monkeypatch):
    """As if another rank counted 9 elements: here 3 with squares of 4, so 12 / mean(3, 9)."""
    monkeypatch.setattr("flowkit.losses.mean_over_ranks", lambda count: (count + 9) / 2)
    x0, mask = torch.zeros(2, 4), torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0]])
    batch = {"x0": x0, "x1": x0 + 2, "mask": mask}
    assert flow_matching_loss(zero, batch)["loss"].item() == 2
    with torch.no_grad():
        assert flow_matching_loss(zero, batch)["loss"].item() == 4


def test_mask_is_broadcast_over_channels():
    x0, x1 = torch.randn(2, 5, 3, 4, 4).unbind()
    mask = torch.zeros(5, 1, 4, 4)
    mask[:, :, :2] = 1
    ours = flow_matching_loss(zero, {"x0": x0, "x1": x1, "mask": mask})["loss"]
    torch.testing.assert_close(ours, (x1 - x0)[:, :, :2].square().mean())


def test_masked_elements_have_no_gradient():
    theta = torch.zeros(4, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    flow_matching_loss(lambda x, t, c: theta.expand_as(x), {"x1": torch.ones(6, 4), "mask": mask})[
        "loss"
    ].backward()
    assert (theta.grad != 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("mask", [None, torch.tensor([[1.0, 0.0, 1.0]])])
def test_weights_multiply_each_pair(mask):
    x0, x1 = torch.randn(2, 8, 3).unbind()
    log_weight = torch.randn(8)
    batch = {"x0": x0, "x1": x1} | ({} if mask is None else {"mask": mask})
    ours = flow_matching_loss(zero, batch, coupling=Weighted(log_weight))["loss"]
    square = log_weight.exp()[:, None] * (x1 - x0).square()
    if mask is not None:
        square = square[:, mask[0].bool()]
    torch.testing.assert_close(ours, square.mean())


def segments(batch=64):
    """Chords of a curve whose speed depends on time."""
    t0 = torch.rand(batch) * 0.8
    t1 = t0 + 0.05 + torch.rand(batch) * 0.1
    speed = torch.randn(batch, 3)
    x0 = torch.randn(batch, 3)
    x1 = x0 + (t1 - t0)[:, None] * speed
    return {"x0": x0, "x1": x1, "t0": t0, "t1": t1}, speed


def test_the_constant_chord_of_a_segment_has_no_loss():
    batch, speed = segments()
    loss = flow_matching_loss(lambda x, t, c: speed, batch)["loss"]
    assert loss.item() == pytest.approx(0, abs=1e-9)


def test_times_of_a_segment_lie_in_it_and_fit_its_states():
    batch, speed = segments()

    def check(x, t, cond):
        assert ((batch["t0"] <= t) & (t <= batch["t1"])).all()
        expected = batch["x0"] + (t - batch["t0"])[:, None] * speed
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
        return speed

    flow_matching_loss(check, batch)


@pytest.mark.parametrize("times", [Uniform(), LogitNormal(), Stratified()], ids=str)
def test_generator_fixes_the_loss(times):
    cond, drop = torch.zeros(64, dtype=torch.long), DropCond(0.5, 1)
    batch = {"x1": torch.randn(64, 2), "cond": cond}
    a, b, c = (
        flow_matching_loss(
            lambda x, t, c: x * t[:, None] * c[:, None],
            batch,
            path=Linear(sigma=0.1),
            times=times,
            drop_cond=drop,
            generator=generator(k),
        )["loss"]
        for k in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_stratified_times_lower_the_variance_of_the_loss():
    """Of a loss that depends on time: here 4 t² exactly, for pairs without velocity."""
    batch = {"x0": torch.zeros(64, 1), "x1": torch.zeros(64, 1)}

    def variance(times):
        losses = [
            flow_matching_loss(
                lambda x, t, c: 2 * t[:, None], batch, times=times, generator=generator(k)
            )["loss"]
            for k in range(200)
        ]
        assert torch.stack(losses).mean().item() == pytest.approx(4 / 3, abs=0.05)
        return torch.stack(losses).var().item()

    assert variance(Stratified()) < 0.01 * variance(Uniform())


def test_conditions_are_dropped_before_the_velocity_sees_them():
    seen = []

    def field(x, t, cond):
        seen.append(cond)
        return x

    batch = {"x1": torch.randn(8, 2), "cond": torch.arange(8)}
    flow_matching_loss(field, batch)
    flow_matching_loss(field, batch, drop_cond=DropCond(1.0, 9))
    assert torch.equal(seen[0], torch.arange(8))
    assert torch.equal(seen[1], torch.full((8,), 9))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_times_are_never_in_half_precision(dtype, expected):
    def field(x, t, cond):
        assert x.dtype == dtype
        assert t.dtype == expected
        return x

    flow_matching_loss(field, {"x1": torch.randn(8, 2, dtype=dtype)})


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_data_lose_as_in_full_precision(dtype):
    """Latents of std 300: their squares are beyond float16."""
    x0, x1 = torch.randn(64, 4, 8, 8).to(dtype), (300 * torch.randn(64, 4, 8, 8)).to(dtype)
    weight = 12 * torch.rand(64)
    ours = flow_matching_loss(
        lambda x, t, c: -x0, {"x0": x0, "x1": x1}, coupling=Weighted(weight), path=ONE_END
    )
    square = (x1.double() ** 2).mean((1, 2, 3)) * weight.double().exp()
    energy = ((x1.double() - x0.double()).to(dtype).double() ** 2).mean((1, 2, 3))
    assert ours["loss"].dtype == ours["explained"].dtype == torch.float32
    assert ours["loss"].item() == pytest.approx(square.mean().item(), rel=1e-3)
    share = 1 - square.mean() / (energy * weight.double().exp()).mean()
    assert ours["explained"].item() == pytest.approx(share.item(), abs=1e-3)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_mask_in_half_precision_counts_exactly(dtype):
    """70 001 elements: beyond float16, and 70 144 in bfloat16."""
    mask = (torch.arange(100_000) < 70_001).to(dtype)[None]
    x1 = torch.ones(1, 100_000, dtype=dtype)
    loss = flow_matching_loss(zero, {"x0": torch.zeros_like(x1), "x1": x1, "mask": mask})["loss"]
    assert loss.item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_times_of_segments_in_half_precision_are_exact(dtype):
    t0, t1 = torch.tensor([0.1, 0.3]).to(dtype), torch.tensor([0.4, 1.0]).to(dtype)
    batch = {"x0": torch.zeros(2, 1), "x1": torch.ones(2, 1), "t0": t0, "t1": t1}
    batch = {name: x.to(dtype) for name, x in batch.items()}

    def field(x, t, cond):
        assert t.dtype == torch.float32
        assert ((t0 < t) & (t < t1)).all()
        return 1 / (t1.float() - t0.float())[:, None]

    assert flow_matching_loss(field, batch)["loss"].item() < 1e-12


def test_a_batch_of_padding_alone_has_no_loss_and_no_gradient():
    theta = torch.ones(3, requires_grad=True)
    batch = {"x1": torch.randn(4, 3), "mask": torch.zeros(4, 1)}
    result = flow_matching_loss(lambda x, t, c: theta.expand_as(x), batch)
    result["loss"].backward()
    assert (result["loss"].item(), result["explained"].item()) == (0, 0)
    assert torch.equal(theta.grad, torch.zeros(3))


def test_pairs_without_velocity_explain_nothing():
    x = torch.randn(4, 3)
    result = flow_matching_loss(lambda x, t, c: torch.ones_like(x), {"x0": x, "x1": x})
    assert (result["loss"].item(), result["explained"].item()) == (1, 0)


def test_nan_is_not_hidden():
    result = flow_matching_loss(zero, {"x1": torch.tensor([[math.nan, 1.0]])})
    assert result["loss"].isnan()
    assert result["explained"].isnan()


@pytest.mark.parametrize("times", [Beta(1.0, 0.05), LogitNormal(0.0, 20.0)], ids=str)
def test_no_time_meets_the_unbounded_velocity_of_a_diffusion_path(times):
    """u² ≈ β x0² / (4 s) for s = 1 − t: with s ≥ 2⁻²⁴, at most 4.2e5 per unit of x0²."""
    batch = {"x0": torch.ones(50_000, 1), "x1": torch.zeros(50_000, 1)}
    loss = flow_matching_loss(zero, batch, path=VP(), times=times, generator=generator())["loss"]
    assert loss.item() < 0.1 * 2**24 / 4


def test_gradient_is_that_of_the_mean_square():
    theta = torch.tensor(0.3, requires_grad=True)
    batch = {"x0": torch.zeros(4, 1), "x1": torch.ones(4, 1)}
    result = flow_matching_loss(lambda x, t, c: theta * torch.ones_like(x), batch)
    result["loss"].backward()
    assert theta.grad.item() == pytest.approx(2 * (0.3 - 1))
    assert not result["explained"].requires_grad


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda b: flow_matching_loss(zero, without(b, "t1")),
            r"batch must hold x0, t0 and t1 together .* got \['t0', 'x0', 'x1'\]",
        ),
        (
            lambda b: flow_matching_loss(zero, without(b, "x0")),
            "batch must hold x0, t0 and t1 together",
        ),
        (
            lambda b: flow_matching_loss(zero, b, path=Cosine()),
            r"path and coupling must be Linear\(\) and Independent\(\) for segments",
        ),
        (
            lambda b: flow_matching_loss(zero, b, coupling=MinibatchOT()),
            r"path and coupling must be Linear\(\) and Independent\(\) for segments",
        ),
        (
            lambda b: flow_matching_loss(zero, b | {"t1": b["t0"]}),
            "t1 must be larger than t0, got t1 − t0 = 0.0",
        ),
        (
            lambda b: flow_matching_loss(zero, b | {"t1": torch.cat([b["t1"][:-1], b["t0"][-1:]])}),
            "t1 must be larger than t0, got t1 − t0 = 0.0",
        ),
        (
            lambda b: flow_matching_loss(zero, b | {"t1": b["t1"] + 5}),
            r"t1 must lie in \[0, 1\], got values in",
        ),
        (
            lambda b: flow_matching_loss(zero, b | {"t0": b["t0"] - 5}),
            r"t0 must lie in \[0, 1\], got values in",
        ),
        (
            lambda b: flow_matching_loss(lambda x, t, c: x[:, :1], {"x1": b["x1"]}),
            r"velocity\(x, t, cond\) must have the shape of x",
        ),
        (
            lambda b: flow_matching_loss(zero, {"x1": b["x1"], "x0": b["x0"][:, :1]}),
            "x0 must have the shape of x1",
        ),
    ],
)
def test_bad_batches_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(segments()[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x1": torch.ones(4, 2, dtype=torch.long)}, TypeError, "x1 must be a floating-point tens"),
        ({"x1": torch.ones(4, 2, dtype=torch.cfloat)}, TypeError, "x1 must be a floating-point"),
        ({"x1": torch.ones(4, 2, device="meta")}, TypeError, "x1 must hold data, got a tensor on"),
        ({"x1": torch.ones(0, 2)}, ValueError, r"x1 must hold at least one sample, .*\(0, 2\)"),
        ({"x1": torch.tensor(1.0)}, ValueError, r"x1 must hold at least one sample, .* shape \(\)"),
        ({"x0": torch.ones(4, 2, dtype=torch.long)}, TypeError, "x0 must be a floating-point tens"),
        ({"mask": torch.ones(2)}, ValueError, r"mask must have the 2 dimensions of x1, \(4, 2\), "),
        ({"mask": torch.ones(4, 2, 1)}, ValueError, r"mask must .*, got shape \(4, 2, 1\)"),
        ({"mask": torch.ones(2, 2)}, ValueError, r"mask must .*, got shape \(2, 2\)"),
        (
            {"mask": torch.ones(4, 2, dtype=torch.cfloat)},
            TypeError,
            "mask must be a tensor of real numbers, got torch.complex64",
        ),
        ({"mask": [[1.0]]}, TypeError, "mask must be a tensor of real numbers, got list"),
    ],
)
def test_bad_kinds_are_refused(change, error, message):
    batch = {"x1": torch.ones(4, 2), **change}
    with pytest.raises(error, match=message):
        flow_matching_loss(zero, batch)
    with pytest.raises(error, match=message):
        draw_pairs(batch)


@pytest.mark.parametrize("log_weight", [torch.zeros(()), torch.zeros(1), torch.zeros(4, 1)])
def test_weights_that_broadcast_are_refused(log_weight):
    with pytest.raises(
        ValueError, match=r"log_weight of a coupling must have shape \(4,\), got \("
    ):
        flow_matching_loss(zero, {"x1": torch.ones(4, 2)}, coupling=Weighted(log_weight))


def test_a_complex_velocity_is_refused():
    with pytest.raises(TypeError, match=r"velocity\(x, t, cond\) must be a floating-point tensor"):
        flow_matching_loss(lambda x, t, c: x + 1j, {"x1": torch.ones(4, 2)})


def test_misspelt_keyword_is_refused():
    with pytest.raises(TypeError, match="tmies"):
        flow_matching_loss(zero, {"x1": torch.zeros(1, 1)}, tmies=Uniform())


@pytest.mark.filterwarnings("ignore:MinibatchOT ignores cond")
@pytest.mark.parametrize(
    ("options", "loss", "explained"),
    [
        ({}, 5.333756923675537, -1.8719031810760498),
        ({"coupling": MinibatchOT()}, 6.202022552490234, -3.64786434173584),
        (
            {"path": VP(), "times": LogitNormal(), "drop_cond": DropCond(0.5, null=10)},
            54.98555374145508,
            -9.065281867980957,
        ),
        (
            {"path": Linear(sigma=0.1), "coupling": MinibatchOT(), "drop_cond": DropCond(0.5, 10)},
            30.036657333374023,
            -21.509803771972656,
        ),
    ],
    ids=["plain", "coupling", "path, times and dropped", "noise of the path"],
)
def test_the_order_of_the_draws_is_fixed(options, loss, explained):
    """Values of an earlier release: a resumed run goes on with the same noise and times."""
    batch = {"x1": torch.arange(12.0).reshape(6, 2) / 5, "cond": torch.arange(6)}

    def field(x, t, cond=None):
        return x * t[:, None] + cond[:, None]

    result = flow_matching_loss(field, batch, generator=generator(3), **options)
    assert result["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert result["explained"].item() == pytest.approx(explained, rel=1e-5)


def test_draws_come_from_one_stream_in_turn():
    x1, cond = torch.randn(50, 2), torch.arange(50)
    seen = {}

    def field(x, t, cond=None):
        seen.update(x=x, t=t, cond=cond)
        return torch.zeros_like(x)

    drop = DropCond(0.5, null=99)
    batch, coupling = {"x1": x1, "cond": cond}, Sinkhorn(1.0, cond_weight=0.0)
    options = {"coupling": coupling, "drop_cond": drop, "times": Stratified()}
    flow_matching_loss(field, batch, **options, generator=generator(5))
    stream = generator(5)
    x0 = torch.randn(50, 2, generator=stream)
    x0 = coupling.pair(x0, x1, cond, stream).x0
    t = Stratified()(50, None, stream)
    assert torch.equal(seen["t"], t)
    assert torch.equal(seen["x"], Linear().sample(x0, x1, t).x_t)
    assert torch.equal(seen["cond"], drop(cond, stream))
    assert 0 < (seen["cond"] == 99).sum() < 50
