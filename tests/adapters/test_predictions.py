"""Networks that predict data or noise as velocities that are trained."""

import pytest
import torch

from flowkit.adapters import (
    DataPrediction,
    NoisePrediction,
    from_data_prediction,
    from_noise_prediction,
)
from flowkit.exact import GaussianFlow
from flowkit.guidance import ClassifierFree
from flowkit.losses import flow_matching_loss
from flowkit.nn import MLP, SequenceDiT
from flowkit.paths import VP, Affine, BrownianBridge, Cosine, Linear
from flowkit.sampling import ODESampler

F64 = torch.float64
FLOW = GaussianFlow(torch.tensor([1.5, -0.5], dtype=F64), torch.tensor([0.8, 2.0], dtype=F64))
PATHS = {
    "linear": Linear(),
    "width": Linear(sigma_min=0.01),
    "cosine": Cosine(),
    "vp": VP(),
    "affine": Affine(lambda t: t**2, lambda t: 1 - t**2),
}


def data(x, t, cond=None):
    """The posterior mean of the data of `FLOW`."""
    return Linear().to_data(x, t, FLOW(x, t))


def source(x, t, cond=None):
    """The posterior mean of the noise of `FLOW`."""
    return Linear().to_noise(x, t, FLOW(x, t))


def _noise(n=7):
    return torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("kind", ["data", "noise"])
def test_away_from_the_ends_it_is_the_exact_conversion(path, kind):
    def net(x, t, cond):
        return torch.sin(3 * x + t[:, None] + cond[:, None])

    x, cond, t = _noise(), torch.arange(7.0, dtype=F64), torch.linspace(0.25, 0.75, 7, dtype=F64)
    wrapper, exact = {
        "data": (DataPrediction, from_data_prediction),
        "noise": (NoisePrediction, from_noise_prediction),
    }[kind]
    torch.testing.assert_close(wrapper(net, path)(x, t, cond), exact(net, path)(x, t, cond))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("wrapper", [DataPrediction, NoisePrediction])
def test_no_divisor_is_smaller_than_the_gap(path, wrapper):
    told = []

    def net(x, t, cond):
        told.append(t)
        return torch.ones_like(x)

    t = torch.linspace(0, 1, 201, dtype=F64)
    velocity = wrapper(net, path, min_gap=0.1)(torch.zeros(201, 1, dtype=F64), t)
    assert velocity.isfinite().all()
    a, b, *_ = path.coefficients(told[0])
    divisor = b if wrapper is DataPrediction else a
    assert divisor.min() >= 0.1 - 1e-12
    everywhere = path.coefficients(t)
    inside = (everywhere.b if wrapper is DataPrediction else everywhere.a) >= 0.1
    inside &= (everywhere.b >= 0.1) | everywhere.db[-1].isfinite()
    torch.testing.assert_close(told[0][inside], t[inside], rtol=0, atol=0)


def test_on_the_linear_path_it_is_the_published_formula():
    velocity = DataPrediction(lambda x, t, cond: 5 + 0 * x, min_gap=0.05)
    x, t = torch.zeros(3, 1), torch.tensor([0.5, 0.9, 0.99])
    torch.testing.assert_close(velocity(x, t), 5 / torch.tensor([[0.5], [0.1], [0.05]]))
    velocity = NoisePrediction(lambda x, t, cond: 5 + 0 * x, min_gap=0.05)
    torch.testing.assert_close(velocity(x, 1 - t), -5 / torch.tensor([[0.5], [0.1], [0.05]]))


@pytest.mark.parametrize(("wrapper", "net"), [(DataPrediction, data), (NoisePrediction, source)])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sampling_and_inversion_reach_both_ends(wrapper, net, method):
    x0, sampler = _noise(64), ODESampler(40, method)
    errors = []
    for gap in (0.1, 0.05):
        velocity = wrapper(net, min_gap=gap)
        there = sampler(velocity, x0)
        back = sampler.invert(velocity, FLOW.solution(x0)).x
        plain = sampler(FLOW, x0), sampler.invert(FLOW, FLOW.solution(x0)).x
        errors.append([(there - plain[0]).abs().max(), (back - plain[1]).abs().max()])
    errors = torch.tensor(errors)
    assert (errors[1] < 0.05).all()
    assert (errors[0] / errors[1] > 3).all()  # of the order of the square of the gap


def test_the_network_is_trained_and_stored():
    net = MLP((2,))
    velocity = DataPrediction(net)
    assert {k.removeprefix("net.") for k in velocity.state_dict()} == set(net.state_dict())
    flow_matching_loss(velocity, {"x1": torch.randn(8, 2)})["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for p in velocity.parameters())


@pytest.mark.parametrize("gap", [0, 1, -0.1, 2, float("nan")])
def test_gaps_out_of_range_are_refused(gap):
    with pytest.raises(ValueError, match=r"min_gap must (lie in \(0, 1\)|be finite), got"):
        DataPrediction(data, min_gap=gap)


def test_other_bad_input_is_refused():
    with pytest.raises(TypeError, match="whose prediction is not converted yet, got Noise"):
        DataPrediction(NoisePrediction(MLP((2,))))
    with pytest.raises(TypeError, match="net must be a network"):
        NoisePrediction(3)
    for path in (Linear(sigma=0.1), BrownianBridge(0.1)):
        with pytest.raises(ValueError, match="path must be a x1"):
            DataPrediction(MLP((2,)), path)


@pytest.mark.parametrize("prediction", [DataPrediction, NoisePrediction])
def test_the_network_prepares_its_condition_once_a_solve(prediction):
    net = SequenceDiT((2, 5), width=8, depth=1, heads=2, vector=3)
    torch.nn.init.normal_(net.outputs.linear.weight)
    velocity, cond = prediction(net), {"vector": torch.randn(4, 3)}
    x0, guided = torch.randn(4, 2, 5), ClassifierFree(velocity, 2.0, {"vector": 0.0})
    for field, times in ((velocity, 1), (guided, 2)):
        net.prefixes = 0
        with torch.no_grad():
            found = ODESampler(6, "euler")(field, x0, cond)
            loop, seen = x0, net.prefixes
            for k in range(6):
                loop = loop + field(loop, torch.full((4,), k / 6), cond) / 6
        assert seen == times
        torch.testing.assert_close(found, loop)
