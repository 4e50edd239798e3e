"""The module of mean flows: what it learns, distils and refuses."""

import pytest
import torch

from flowkit.adapters import DataPrediction
from flowkit.exact import GaussianFlow
from flowkit.guidance import ClassifierFree, DropCond
from flowkit.losses import mean_flow_loss
from flowkit.modules import ConditionalFlowMatching, MeanFlowMatching, Straightening
from flowkit.nn import MLP
from flowkit.paths import Cosine
from flowkit.sampling import ODESampler, seeded_noise


def _net(num_times=2, width=16):
    torch.manual_seed(1)
    return MLP((2,), width, num_classes=3, activation="tanh", num_times=num_times)


def _batch():
    return {"x1": torch.randn(8, 2), "cond": torch.arange(8) % 4}


@pytest.fixture
def flow(monkeypatch):
    """What `load_run` gives: a labeled network of odd weights."""
    torch.manual_seed(2)
    drop = DropCond(0.1, 3)
    module = ConditionalFlowMatching(
        MLP((2,), 16, num_classes=3, activation="tanh"), drop_cond=drop
    )
    module.loss(_batch())
    module.eval().requires_grad_(False)
    monkeypatch.setattr("flowkit.modules.mean_flow.load_run", lambda folder: module)
    return module


def test_a_network_learns_the_whole_way_of_a_flow():
    flow = GaussianFlow(2.0, 0.3)
    torch.manual_seed(0)
    net = MLP((1,), width=64, activation="silu", num_times=2)
    module = MeanFlowMatching(net, flow_share=0.25, power=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        loss = module.loss({"x1": 2 + 0.3 * torch.randn(256, 1)})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x0 = torch.randn(500, 1)
    with torch.no_grad():
        error = (ODESampler(1)(module.velocity, x0) - flow.solution(x0)).square().mean().sqrt()
    before = (ODESampler(1)(flow, x0) - flow.solution(x0)).square().mean().sqrt()
    assert error < before / 2


def test_the_network_starts_as_the_flow_exactly(flow):
    module = MeanFlowMatching(_net(), start="run", drop_cond=DropCond(0.1, 3))
    module.on_fit_start()
    x, t, cond = torch.randn(7, 2), torch.rand(7), torch.randint(4, (7,))
    for s in (t, torch.ones(7)):
        found = module.net(x, torch.stack([t, s], 1), cond)
        torch.testing.assert_close(found, flow(x, t, cond))
    assert module.sample_shape == (2,)


def test_guidance_is_learnt_from_the_network_itself():
    module = MeanFlowMatching(
        _net(), guidance_scale=3.0, flow_share=0.5, drop_cond=DropCond(0.1, 3)
    )
    module.eval()  # no condition is dropped
    batch = _batch()

    def field(draw):
        both = torch.stack([draw.t, draw.t], 1)
        null = module.net(draw.x_t, both, torch.full_like(draw.cond, 3)).detach()
        return torch.where(draw.cond[:, None] == 3, draw.u, 3 * draw.u - 2 * null)

    expected = mean_flow_loss(
        module.net, batch, flow_share=0.5, field=field, generator=torch.Generator().manual_seed(4)
    )
    found = module.loss(batch, torch.Generator().manual_seed(4))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_samples_take_four_euler_steps_unless_told_otherwise():
    module = MeanFlowMatching(_net(), drop_cond=DropCond(0.1, 3))
    module.loss(_batch())
    cond, noise = torch.arange(3), seeded_noise((2,), range(3))
    expected = ODESampler(4)(module.velocity, noise, cond)
    torch.testing.assert_close(module.sample(3, cond=cond, seeds=range(3)), expected)
    guided = module.sample(3, ODESampler(1), cond=cond, seeds=range(3), guidance=2.0)
    ends = torch.tensor([[0.0, 1.0]]).expand(3, 2)
    steps = [module.net(noise, ends, c) for c in (cond, torch.full((3,), 3))]
    torch.testing.assert_close(guided, noise + 2 * steps[0] - steps[1])
    field = module.guided(2.0)
    assert isinstance(field, ClassifierFree)


def test_learnt_guidance_is_not_added_again():
    module = MeanFlowMatching(_net(), guidance_scale=2.0, drop_cond=DropCond(0.1, 3))
    assert module.guided(None) is module.velocity
    assert module.guided(1) is module.velocity
    for guidance in (2.0, lambda velocity: velocity):
        with pytest.raises(ValueError, match=r"guidance must be null or 1 .* learnt guidance 2.0"):
            module.guided(guidance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity": _net(1)}, "velocity must take two times, got num_times=1; build it with"),
        ({"tangent": "own"}, "tangent must be one of"),
        ({"flow_share": -0.1}, r"flow_share must lie in \[0, 1\]"),
        ({"power": -1}, "power must be at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"guidance_scale": 2.0}, "guidance_scale must be None for a network that never trains"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MeanFlowMatching(**{"velocity": _net(), **options})


def test_a_prediction_is_no_mean_velocity():
    with pytest.raises(TypeError, match="velocity must be a network whose result is a mean vel"):
        MeanFlowMatching(DataPrediction(_net()))


def test_flows_that_cannot_be_distilled_are_refused(flow, monkeypatch):
    with pytest.raises(ValueError, match="velocity must be the network of the run r with num_ti"):
        MeanFlowMatching(_net(width=8), start="r").on_fit_start()
    with pytest.raises(ValueError, match=r"path must be that of the run in start, Linear\("):
        MeanFlowMatching(_net(), start="r", path=Cosine()).on_fit_start()
    other = MeanFlowMatching(_net())
    monkeypatch.setattr("flowkit.modules.mean_flow.load_run", lambda folder: other)
    with pytest.raises(ValueError, match="start must be a run whose network is the velocity of"):
        MeanFlowMatching(_net(), start="r").on_fit_start()
    monkeypatch.setattr("flowkit.modules.straightening.load_run", lambda folder: other)
    with pytest.raises(ValueError, match="velocity must be the network of the run r"):
        Straightening(_net(), start="r").on_fit_start()
