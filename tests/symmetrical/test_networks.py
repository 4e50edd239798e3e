"""Networks around constant planes."""

import pytest
import torch
from torch import nn

from flowkit.modules import SymmetricalFlowMatching
from flowkit.nn import ResidualMLP, unet2d
from flowkit.symmetrical import CodesAsNumbers, JointFlow, NoisePath, OneHot, TwoTimes


class Echo(nn.Module):
    """Returns what it is shown, and keeps its times."""

    def forward(self, x, t, cond=None):
        self.t = t
        return 2 * x


def test_codes_are_numbers_between_the_network_and_the_flow():
    """To a joint flow it is the network on points itself: images flat, codes as they are."""
    net = ResidualMLP((2 * 3 * 4 + 5,), width=16, depth=1, num_times=2)
    nn.init.normal_(net.outputs.weight)
    x, y, t = torch.randn(6, 2, 3, 4), torch.randn(6, 5), torch.rand(6, 2)
    v_x, v_y = JointFlow(CodesAsNumbers(net, (2, 3, 4)))(x, y, *t.unbind(1))
    v = net(torch.cat([x.flatten(1), y], 1), t)
    torch.testing.assert_close(v_x.flatten(1), v[:, :24])
    torch.testing.assert_close(v_y, v[:, 24:])


def test_a_second_time_is_a_plane():
    echo = Echo()
    net = TwoTimes(echo)
    x, t = torch.randn(4, 2, 3, 3), torch.rand(4, 2)
    assert torch.equal(net(x, t), 2 * x)
    assert torch.equal(echo.t, t[:, 0])
    unet = unet2d((3, 8, 8), width=8)
    nn.init.normal_(unet.net.conv_out.weight, std=0.1)
    net = TwoTimes(unet).eval()
    x = torch.randn(2, 2, 8, 8)
    a, b = (net(x, torch.tensor([[0.3, s]] * 2)) for s in (0.1, 0.9))
    assert (a - b).abs().max() > 1e-3


class Nothing(nn.Module):
    """No velocity at all."""

    def forward(self, x, t, cond=None):
        return torch.zeros_like(x)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_path_of_noise_is_the_regression_of_the_velocity_on_the_state(t):
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 200_000, 1, generator=generator)
    x = (1 - t) * x0 + t * x1
    slope = (x * (x1 - x0)).mean() / x.square().mean()
    v = NoisePath(Nothing(), channels=1)(x, torch.full((len(x),), t))
    torch.testing.assert_close(v, slope * x, atol=0.03, rtol=0)


def learnt(net):
    nn.init.normal_(net.correction[-1].weight)
    return net


def test_the_ends_are_exact_whatever_the_data_and_what_was_learnt():
    net, x = learnt(NoisePath(Nothing(), channels=2)), 7 * torch.randn(3, 5, 2, 4)
    assert (net(x, torch.full((3,), 0.5)) / x).abs().mean() > 1e-3  # without it, 0
    assert torch.equal(net(x, torch.zeros(3)), -x)
    assert torch.equal(net(x, torch.ones(3)), x)


def test_image_and_codes_follow_their_own_times():
    net, x, times = NoisePath(Echo(), channels=2), torch.randn(3, 5, 2, 4), torch.rand(3, 2)
    v = net(x, times)
    for part, column in ((slice(2), 0), (slice(2, 5), 1)):
        alone = net(x, times[:, column])
        torch.testing.assert_close(v[:, part], alone[:, part])
    learnt(net)
    gain = (net(x, times) - 2 * x) / x
    each = gain[:, [0, 4], :1, :1]
    torch.testing.assert_close(gain[:, :2], each[:, :1].expand(3, 2, 2, 4), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gain[:, 2:], each[:, 1:].expand(3, 3, 2, 4), atol=1e-3, rtol=1e-3)
    assert torch.equal(net.net.t, times)


def test_a_narrow_network_with_a_path_returns_all_of_the_noise():
    """A bottleneck of 2 numbers, 20 of noise: v = x − E[y₀ | x₁] in one step of Euler."""
    torch.manual_seed(0)
    narrow = ResidualMLP((20,), width=2, depth=1)
    errors = []
    for net in (narrow, NoisePath(ResidualMLP((20,), width=2, depth=1), channels=1)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(200):
            x, t = torch.randn(128, 20), torch.ones(128)
            optimizer.zero_grad()
            loss = (net(x, t) - (x - 1)).square().mean()
            loss.backward()
            optimizer.step()
        errors.append(loss.item())
    assert errors[0] > 0.7
    assert errors[1] < 0.01


@pytest.mark.parametrize("kind", ["perceptron", "unet"])
def test_they_train_in_a_symmetrical_module(kind):
    if kind == "perceptron":
        net = CodesAsNumbers(ResidualMLP((64 + 3,), width=16, num_times=2), (1, 8, 8))
    else:
        net = TwoTimes(unet2d((5, 8, 8), width=8))
    module = SymmetricalFlowMatching(net, OneHot(3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    batch = {"x1": torch.randn(32, 1, 8, 8), "cond": torch.arange(32) % 3}
    first = module.loss(batch, torch.Generator().manual_seed(0))["loss"]
    for _ in range(10):
        optimizer.zero_grad()
        loss = module.loss(batch, torch.Generator().manual_seed(0))["loss"]
        loss.backward()
        optimizer.step()
    assert loss < 0.9 * first


def test_states_of_other_shapes_are_refused():
    net = CodesAsNumbers(ResidualMLP((67,), width=8), (1, 8, 8))
    with pytest.raises(ValueError, match=r"x must hold images of shape \(1, 8, 8\) and planes"):
        net(torch.zeros(2, 4, 8, 7), torch.rand(2))
    with pytest.raises(ValueError, match=r"t must have shape \(2, 2\), got \(2,\)"):
        TwoTimes(Echo())(torch.zeros(2, 1, 4, 4), torch.rand(2))
