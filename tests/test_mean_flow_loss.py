"""The loss of mean flows against closed forms and definitions."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowkit.exact import GaussianFlow
from flowkit.guidance import DropCond
from flowkit.losses import flow_matching_loss, mean_flow_loss
from flowkit.nn import MLP, DiT, ResidualMLP, unet2d
from flowkit.paths import Cosine, Linear
from flowkit.times import LogitNormal
from tests.exact_means import gaussian_mean

F64 = torch.float64
FLOW = GaussianFlow(torch.tensor([1.5, -0.5], dtype=F64), torch.tensor([0.3, 2.0], dtype=F64))


def _batch(size=16, dtype=F64):
    generator = torch.Generator().manual_seed(5)
    return {"x1": torch.randn(size, 2, dtype=dtype, generator=generator)}


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tangent", ["network", "conditional"])
def test_the_true_mean_velocity_solves_the_equation(tangent):
    def loss(net):
        terms = mean_flow_loss(
            net,
            _batch(64),
            times=LogitNormal(),
            tangent=tangent,
            flow_share=0.25,
            power=0,
            field=lambda draw: FLOW(draw.x_t, draw.t),
            generator=_seeded(),
        )
        return terms["loss"].item()

    exact = gaussian_mean(FLOW)
    assert loss(exact) < 1e-20
    assert loss(lambda x, t, cond: exact(x, t.flip(1) if t[0, 0] != t[0, 1] else t)) > 1e-4


def test_without_means_and_weights_it_is_flow_matching():
    net = MLP((2,), num_times=2).double()
    batch, options = _batch(), {"path": Cosine(), "times": LogitNormal()}
    found = mean_flow_loss(net, batch, **options, flow_share=1, power=0, generator=_seeded())
    plain = flow_matching_loss(
        lambda x, t, cond: net(x, torch.stack([t, t], 1)), batch, **options, generator=_seeded()
    )
    assert found["loss"] == plain["loss"]
    torch.testing.assert_close(found["explained"], plain["explained"])
    assert found["explained_mean"] == 0


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tangent", ["network", "conditional"])
def test_targets_weights_and_gradients_by_hand(tangent, power):
    net, batch, seen = MLP((2,), num_times=2).double(), _batch(10), []

    def recorded(x, t, cond):
        seen.append((x, t))
        return net(x, t, cond)

    def keep(draw):
        seen.append(draw)
        return draw.u

    options = {"flow_share": 0.6, "power": power, "field": keep, "tangent": tangent}
    mean_flow_loss(recorded, batch, **options, generator=_seeded())["loss"].backward()
    given = [p.grad.clone() for p in net.parameters()]
    (x, times), draw = seen[0], seen[1]
    t, s = times.unbind(1)
    assert (t[:4] < s[:4]).all()
    assert (t[4:] == s[4:]).all()

    net.zero_grad()
    v = draw.u if tangent == "conditional" else net(x, torch.stack([t, t], 1)).detach()
    h = 1e-6
    with torch.no_grad():  # central differences along the tangent (v, 1, 0)
        ends = [net(x + a * v, torch.stack([t + a, s], 1)) for a in (h, -h)]
    target = draw.u + (s - t)[:, None] * (ends[0] - ends[1]) / (2 * h)
    error = net(x, times) - target
    weight = ((error.square().sum(1) + 1e-3) / 2).detach() ** -power
    (weight[:, None] * error.square()).mean().backward()
    for found, expected in zip(given, (p.grad for p in net.parameters()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_masked_elements_carry_no_loss():
    net = MLP((2,), num_times=2).double()
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=F64).repeat(4, 1)
    found = []
    for far in (0.0, 1e3):  # what is masked may be anything, if the network does not see it
        batch = _batch(8)
        batch["x1"] = batch["x1"] + far * (1 - mask)
        batch |= {"mask": mask, "x0": torch.zeros(8, 2, dtype=F64)}

        def blind(x, t, cond):
            return net(x * mask[: len(x)], t) * mask[: len(x)]

        found.append(mean_flow_loss(blind, batch, flow_share=0.5, generator=_seeded()))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])
    assert found[0]["loss"] > 0.9  # each pair has the weight of one over its own error


NETWORKS = {
    "dit": lambda n: DiT((1, 8, 8), 2, 32, 2, 2, num_classes=3, num_times=n),
    "unet": lambda n: unet2d((1, 8, 8), 3, width=8, num_times=n),
    "mlp": lambda n: MLP((1, 8, 8), num_classes=3, num_times=n),
    "residual": lambda n: ResidualMLP((1, 8, 8), 32, 2, num_classes=3, num_times=n),
}


def _shaken(net):
    """Some layers are zero at the start; nothing should be."""
    generator = _seeded(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


@pytest.mark.parametrize("name", NETWORKS)
def test_the_slope_of_every_network(name):
    net, generator = _shaken(NETWORKS[name](2)).double().eval(), _seeded()
    x1 = torch.randn(4, 1, 8, 8, dtype=F64, generator=generator)
    batch = {"x1": x1, "cond": torch.tensor([0, 1, 2, 3])}
    draws, targets = [], []

    def keep(draw):
        draws.append(draw)
        return draw.u

    def recorded(x, t, cond):
        targets.append((t, net(x, t, cond)))
        return targets[-1][1]

    options = {"flow_share": 0, "power": 0, "tangent": "conditional", "field": keep}
    found = mean_flow_loss(recorded, batch, **options, generator=generator)["loss"]
    (times, u), draw = targets[0], draws[0]
    t, s = times.unbind(1)

    def along(x, t):
        return net(x, torch.stack([t, s], 1), draw.cond)

    with sdpa_kernel(SDPBackend.MATH):  # by two backward passes
        _, slope = torch.autograd.functional.jvp(along, (draw.x_t, t), (draw.u, torch.ones_like(t)))
    expected = (u - draw.u - (s - t)[:, None, None, None] * slope).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_one_time_is_extended_exactly(name):
    one, two = _shaken(NETWORKS[name](1)).eval(), NETWORKS[name](2).eval()
    two.load_state_dict(two.with_second_time(one.state_dict()))
    x, t = torch.randn(4, 1, 8, 8, generator=_seeded()), torch.rand(4, generator=_seeded())
    cond = torch.tensor([0, 1, 2, 3])
    for s in (t, torch.ones(4), torch.rand(4)):
        torch.testing.assert_close(two(x, torch.stack([t, s], 1), cond), one(x, t, cond))


def test_dropped_conditions_reach_all_parts():
    seen = []

    def net(x, t, cond):
        seen.append(cond)
        return x * t.sum(1, keepdim=True) * cond[:, None]

    batch = {**_batch(6), "cond": torch.arange(6.0, dtype=F64)}
    mean_flow_loss(net, batch, flow_share=0.5, drop_cond=DropCond(1.0, 9.0), generator=_seeded())
    assert [c.tolist() for c in seen] == [[9.0] * 6, [9.0] * 3, [9.0] * 3]


def _net(x, t, cond):
    return x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tangent": "other"}, "tangent must be one of conditional, network"),
        ({"flow_share": 1.5}, r"flow_share must lie in \[0, 1\], got 1.5"),
        ({"power": -1}, "power must be at least 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mean_flow_loss(_net, _batch(), path=Linear(), **options)


def test_segments_and_other_shapes_are_refused():
    ends = {"x0": torch.zeros(16, 2, dtype=F64), "t0": torch.zeros(16), "t1": torch.ones(16)}
    with pytest.raises(ValueError, match="batch must hold no segments"):
        mean_flow_loss(_net, _batch() | ends)
    with pytest.raises(ValueError, match=r"net\(x, t, cond\) must have"):
        mean_flow_loss(lambda x, t, cond: x[:, :1], _batch())
