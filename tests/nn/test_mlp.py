import pytest
import torch

from flowkit.exact import GaussianFlow
from flowkit.nn import MLP, ResidualMLP
from flowkit.nn.embed import TimeLabelEmbedding, modulation, sinusoid

IMAGE = (1, 8, 8)


def stirred(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter a random part, so that no zero start hides a path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(batch: int = 6, shape=IMAGE, num_classes: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % (num_classes + 1)


def test_mlp_is_the_network_of_the_toy_table():
    widths = [(layer.in_features, layer.out_features) for layer in MLP((2,)).layers[::2]]
    assert widths == [(3, 64), (64, 64), (64, 64), (64, 2)]
    assert sum(isinstance(layer, torch.nn.SELU) for layer in MLP((2,)).layers) == 3


def test_mlp_sees_state_time_and_one_hot_label_in_this_order():
    net = MLP((2,), width=7, depth=1, num_classes=3)
    x, t, label = inputs(5, (2,), 3)
    code = (label[:, None] == torch.arange(4)).float()
    expected = net.layers(torch.cat([x, t[:, None], code], 1))
    torch.testing.assert_close(net(x, t, label), expected)


def test_mlp_sees_float_conditions():
    net = MLP((2,), cond_dim=3)
    x, t, _ = inputs(5, (2,))
    cond = torch.randn(5, 3)
    torch.testing.assert_close(net(x, t, cond), net.layers(torch.cat([x, t[:, None], cond], 1)))


def test_residual_mlp_starts_at_zero_with_identity_blocks():
    net = ResidualMLP(IMAGE, width=32, num_classes=4)
    x, t, label = inputs()
    assert torch.equal(net(x, t, label), torch.zeros_like(x))
    h, c = torch.randn(6, 32), torch.randn(6, 32)
    assert all(torch.equal(block(h, c), h) for block in net.blocks)


@pytest.mark.parametrize("kind", [MLP, ResidualMLP])
def test_samples_do_not_see_each_other_and_a_label_moves_its_own(kind):
    net = stirred(kind(IMAGE, width=32, num_classes=4)).double().eval()
    x, t, label = inputs()
    x, t = x.double(), t.double()
    out = net(x, t, label)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(out, alone)
    changed = label.clone()
    changed[2] = (label[2] + 1) % 5
    moved = (net(x, t, changed) - out).flatten(1).norm(dim=1)
    assert moved[2] > 1e-3
    torch.testing.assert_close(moved[[0, 1, 3, 4, 5]], torch.zeros(5).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", [MLP, ResidualMLP])
def test_every_parameter_learns_after_the_zero_start_is_left(kind):
    net = kind(IMAGE, width=16, depth=2, num_classes=4)
    x, t, label = inputs(20)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    # gates, outputs and what feeds them leave zero one after another
    for _ in range(3):
        optimizer.zero_grad()
        (net(x, t, label) - x).square().mean().backward()
        optimizer.step()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    assert not torch.allclose(net(x, t, label), net(x, 1 - t, label), atol=1e-4)


@pytest.mark.parametrize("kind", [MLP, ResidualMLP])
def test_several_times_are_told_apart(kind):
    net = stirred(kind((3,), width=16, num_times=2))
    x = torch.randn(4, 3)
    times = torch.rand(4, 2)
    assert not torch.allclose(net(x, times), net(x, times.flip(1)), atol=1e-4)
    with pytest.raises(ValueError, match=r"t must have shape \(4, 2\), got \(4,\)"):
        net(x, times[:, 0])


@pytest.mark.parametrize(("kind", "steps", "lr"), [(MLP, 800, 1e-2), (ResidualMLP, 200, 5e-3)])
def test_learns_the_velocity_of_a_gaussian(kind, steps, lr):
    torch.manual_seed(0)
    flow = GaussianFlow(mean=torch.tensor([1.0, -2.0]), std=torch.tensor([0.5, 1.5]))
    net = kind((2,), width=48, depth=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def on_the_path(batch):
        t = torch.rand(batch)
        x0 = torch.randn(batch, 2)
        return (1 - t[:, None]) * x0 + t[:, None] * flow.solution(torch.randn(batch, 2)), t

    for _ in range(steps):
        x, t = on_the_path(256)
        optimizer.zero_grad()
        (net(x, t) - flow(x, t)).square().mean().backward()
        optimizer.step()
        anneal.step()
    x, t = on_the_path(4096)
    target = flow(x, t)
    error = (net(x, t) - target).square().mean() / target.var(0).mean()
    assert error < 0.01


def test_dropout_acts_in_training_only():
    net = stirred(ResidualMLP(IMAGE, width=32, dropout=0.5))
    x, t, _ = inputs()
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


def test_sinusoid_is_float32_under_half_precision():
    t = torch.tensor([0.3])
    expected = torch.cat([(300 * w).cos() for w in (torch.tensor([1.0]), torch.tensor([0.01]))])
    torch.testing.assert_close(sinusoid(t, 4)[0, :2], expected)
    assert sinusoid(t.bfloat16(), 4).dtype == torch.float32


@pytest.mark.parametrize(("dim", "scale"), [(2, 1000.0), (6, 1000.0), (8, 1.0)])
def test_sinusoid_by_its_formula(dim, scale):
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    angles = scale * t[:, None] * 10_000.0 ** (-2 * torch.arange(dim // 2).double() / dim)
    found = sinusoid(t, dim) if scale == 1000 else sinusoid(t, dim, scale)
    torch.testing.assert_close(found, torch.cat([angles.cos(), angles.sin()], 1))


def test_embedding_of_times_and_label_by_its_formula():
    torch.manual_seed(0)
    net = TimeLabelEmbedding(400, num_classes=9, num_times=2, frequencies=6)
    assert net.labels.weight.std().item() == pytest.approx(0.02, rel=0.05)
    t, labels = torch.rand(4, 2), torch.tensor([3, 9, 0, 1], dtype=torch.int32)
    waves = torch.cat([sinusoid(t[:, 0], 6), sinusoid(t[:, 1], 6)], 1)
    hidden = net.inputs(waves)
    expected = net.outputs(hidden * hidden.sigmoid()) + net.labels.weight[labels.long()]
    torch.testing.assert_close(net(t, labels), expected)
    layer, c = modulation(5, 3, 2), torch.randn(4, 5)
    assert not layer(c).any()
    layer[-1].weight.data.normal_()
    torch.testing.assert_close(layer(c), layer[-1](c * c.sigmoid()))


def test_sinusoids_of_an_odd_size_are_refused():
    for dim in (3, 0, -2):
        with pytest.raises(ValueError, match=f"dim must be an even number of .* got {dim}"):
            sinusoid(torch.rand(2), dim)
    with pytest.raises(ValueError, match=r"frequencies must be an even number of .*, got 255"):
        TimeLabelEmbedding(8, frequencies=255)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        TimeLabelEmbedding(0)


@pytest.mark.parametrize("kind", [MLP, ResidualMLP])
def test_input_errors(kind):
    x, t, label = inputs()
    net, plain = kind(IMAGE, width=8, num_classes=4), kind(IMAGE, width=8)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\), got \(6, 64\)"):
        net(x.flatten(1), t, label)
    with pytest.raises(ValueError, match=r"t must have shape \(6,\), got \(\)"):
        net(x, t[0], label)
    with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 4\], got None; the null"):
        net(x, t)
    with pytest.raises(ValueError, match=r"cond must have shape \(6,\), got \(6, 1\)"):
        net(x, t, label[:, None])
    for bad in (5, -1):
        with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 4\], got values"):
            net(x, t, torch.full((6,), bad))
    with pytest.raises(TypeError, match=r"cond must hold integer labels, got torch.float32"):
        net(x, t, label.float())
    with pytest.raises(TypeError, match="cond must be a tensor or None, got a mapping of label"):
        net(x, t, {"label": label})
    with pytest.raises(ValueError, match="cond must be None for a network without num_classes"):
        plain(x, t, label)


def test_constructor_errors():
    with pytest.raises(ValueError, match="cond_dim must be None if num_classes is given, got 2"):
        MLP((2,), num_classes=3, cond_dim=2)
    with pytest.raises(ValueError, match=r"activation must be one of gelu, .*, got 'swish'"):
        MLP((2,), activation="swish")
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        ResidualMLP((2,), depth=0)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        MLP((2,), num_classes=0)
    x, t, _ = inputs(3, (2,))
    with pytest.raises(TypeError, match="cond must be a tensor of floats, got NoneType"):
        MLP((2,), cond_dim=2)(x, t)
    with pytest.raises(ValueError, match=r"cond must have shape \(3, 2\), got \(3,\)"):
        MLP((2,), cond_dim=2)(x, t, t)
