import pytest
import torch
import torch.nn.functional as F

from flowkit.exact import GaussianFlow
from flowkit.nn import DiT
from flowkit.nn.dit import DiTBlock, PatchEmbed, PatchOutput, patchify, unpatchify

SHAPE = (3, 8, 12)


def small(**options) -> DiT:
    return DiT(SHAPE, patch=2, width=32, depth=2, heads=4, **options)


def stirred(net: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a random part, so that no zero start hides a path."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def inputs(batch: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *SHAPE, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 5


def closed_form_parameters(depth, width, patch, channels, num_classes):
    block = 18 * width**2 + 15 * width  # qkv 3, projection 1, perceptron 8, modulation 6
    patches = channels * patch**2 * width + width
    time = 256 * width + width + width**2 + width
    labels = (num_classes + 1) * width
    outputs = 2 * width**2 + 2 * width + channels * patch**2 * (width + 1)
    return depth * block + patches + time + labels + outputs


@pytest.mark.parametrize(
    ("name", "size", "published"),
    [
        ("DiT-S/2", (12, 384, 2), 33e6),
        ("DiT-B/4", (12, 768, 4), 130e6),
        ("DiT-L/8", (24, 1024, 8), 458e6),
        ("DiT-XL/2", (28, 1152, 2), 675e6),
    ],
)
def test_published_sizes(name, size, published):
    with torch.device("meta"):
        net = DiT.from_name(name, (4, 32, 32), num_classes=1000)
    count = sum(p.numel() for p in net.parameters())
    assert count == closed_form_parameters(*size, 4, 1000)
    assert count == pytest.approx(published, rel=0.015)


def test_xl_has_the_published_count_but_for_variance_channels_and_stored_positions():
    # 675 129 632 with 16 more outputs per token (variance) and 256 stored positions
    assert closed_form_parameters(28, 1152, 2, 4, 1000) == 675_129_632 - 16 * 1153 - 256 * 1152


def test_heads_of_the_published_sizes():
    """Heads of 64 numbers, and of 72 in the largest size; the number of weights does not tell."""
    with torch.device("meta"):
        for name, heads in {"S": 6, "B": 12, "L": 16, "XL": 16}.items():
            net = DiT.from_name(f"DiT-{name}/8", (4, 32, 32))
            assert [block.heads for block in net.blocks] == [heads] * len(net.blocks)


def test_the_output_is_the_written_formula():
    output = stirred(PatchOutput(8, 4)).double()
    h, c = torch.randn(2, 5, 8).double(), torch.randn(2, 1, 8).double()
    shift, scale = output.modulation(c).chunk(2, -1)
    expected = output.linear(F.layer_norm(h, (8,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(output(h, c), expected)


def test_starts_at_zero_with_identity_blocks():
    net = small(num_classes=4)
    x, t, label = inputs()
    v, tokens = net(x, t, label, return_features=2)
    assert torch.equal(v, torch.zeros_like(x))
    assert torch.equal(tokens, net.patches(x))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_go_there_and_back(patch):
    x = inputs()[0]
    tokens = patchify(x, patch)
    assert tokens.shape == (4, 8 * 12 // patch**2, 3 * patch**2)
    assert torch.equal(unpatchify(tokens, patch, 8, 12), x)
    column = 12 // patch + 1  # the second token of the second row
    expected = x[:, :, patch : 2 * patch, patch : 2 * patch].flatten(1)
    assert torch.equal(tokens[:, column], expected)


def test_patch_embedding_is_a_strided_convolution_plus_positions():
    embed = PatchEmbed(SHAPE, 2, 32)
    x = inputs()[0]
    kernel = embed.linear.weight.reshape(32, 3, 2, 2)
    expected = F.conv2d(x, kernel, embed.linear.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(x) - embed.positions, expected)


def test_positions_are_sinusoids_of_row_and_column():
    positions = PatchEmbed(SHAPE, 2, 32).positions.reshape(4, 6, 2, 16)
    rows, columns = positions.unbind(2)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))
    frequencies = 1e4 ** (-torch.arange(8.0) / 8)
    torch.testing.assert_close(
        rows[3, 0], torch.cat([(3 * frequencies).cos(), (3 * frequencies).sin()])
    )
    distances = torch.cdist(positions.flatten(0, 1).flatten(1), positions.flatten(0, 1).flatten(1))
    assert distances.fill_diagonal_(torch.inf).min() > 0.5


def test_block_is_the_written_formula():
    block = stirred(DiTBlock(8, heads=2, cond_width=6)).double()
    h, c = torch.randn(2, 5, 8).double(), torch.randn(2, 1, 6).double()

    b1, s1, g1, b2, s2, g2 = block.modulation(c).chunk(6, -1)
    normed = F.layer_norm(h, (8,), eps=1e-6) * (1 + s1) + b1
    q, k, v = block.qkv(normed).chunk(3, -1)
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        weights = (q[..., i] @ k[..., i].transpose(1, 2) / 2).softmax(-1)
        heads.append(weights @ v[..., i])
    middle = h + g1 * block.project(torch.cat(heads, -1))
    hidden = block.expand(F.layer_norm(middle, (8,), eps=1e-6) * (1 + s2) + b2)
    expected = middle + g2 * block.contract(F.gelu(hidden, approximate="tanh"))
    torch.testing.assert_close(block(h, c), expected)


def test_block_permutes_with_its_tokens_and_takes_a_condition_per_token():
    block = stirred(DiTBlock(8, heads=2)).double()
    h, c = torch.randn(2, 5, 8).double(), torch.randn(2, 1, 8).double()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(block(h[:, order], c), block(h, c)[:, order])
    torch.testing.assert_close(block(h, c.expand(2, 5, 8)), block(h, c))
    output = stirred(PatchOutput(8, 4)).double()
    torch.testing.assert_close(output(h, c.expand(2, 5, 8)), output(h, c))


def test_samples_do_not_see_each_other_and_a_label_moves_its_own():
    net = stirred(small(num_classes=4)).double()
    x, t, label = inputs()
    x, t = x.double(), t.double()
    out = net(x, t, label)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(out, alone)
    changed = label.clone()
    changed[2] = 4
    moved = (net(x, t, changed) - out).flatten(1).norm(dim=1)
    assert moved[2] > 1e-3
    torch.testing.assert_close(moved[[0, 1, 3]], torch.zeros(3).double(), atol=1e-12, rtol=0)


def test_every_parameter_learns_and_time_enters():
    net = small(num_classes=4)
    x, t, label = inputs(10)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(3):  # outputs, then gates, then all that lies behind them
        optimizer.zero_grad()
        (net(x, t, label) - x).square().mean().backward()
        optimizer.step()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []
    assert not torch.allclose(net(x, t, label), net(x, 1 - t, label), atol=1e-4)


def test_learns_the_velocity_of_a_gaussian():
    torch.manual_seed(0)
    mean = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    flow = GaussianFlow(mean=mean, std=0.5)
    net = DiT((1, 4, 4), patch=2, width=32, depth=2, heads=2)
    steps = 150
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def on_the_path(batch):
        t = torch.rand(batch)
        s = t[:, None, None, None]
        x0, x1 = torch.randn(batch, 1, 4, 4), flow.solution(torch.randn(batch, 1, 4, 4))
        return (1 - s) * x0 + s * x1, t

    for _ in range(steps):
        x, t = on_the_path(128)
        optimizer.zero_grad()
        (net(x, t) - flow(x, t)).square().mean().backward()
        optimizer.step()
        anneal.step()
    x, t = on_the_path(1024)
    target = flow(x, t)
    error = (net(x, t) - target).square().mean() / target.var(0).mean()
    assert error < 0.02


def test_companion_channels_enter_but_do_not_leave():
    net = stirred(small(in_channels=7))
    x, t, _ = inputs()
    companions = torch.randn(4, 4, 8, 12)
    v = net(torch.cat([x, companions], 1), t)
    assert v.shape == x.shape
    assert not torch.allclose(v, net(torch.cat([x, -companions], 1), t), atol=1e-4)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 7, 8, 12\), got \(4, 3, 8, 12\)"):
        net(x, t)


def test_two_times_are_told_apart():
    net = stirred(small(num_times=2))
    x, times = inputs()[0], torch.rand(4, 2)
    assert not torch.allclose(net(x, times), net(x, times.flip(1)), atol=1e-4)


def test_features_are_the_tokens_after_a_block():
    net = stirred(small())
    x, t, _ = inputs()
    c = net.embedding(t)[:, None]
    first = net.blocks[0](net.patches(x), c)
    v, tokens = net(x, t, return_features=1)
    torch.testing.assert_close(tokens, first)
    torch.testing.assert_close(v, net(x, t))
    with pytest.raises(ValueError, match=r"return_features must lie in \[1, 2\], got 3"):
        net(x, t, return_features=3)


def test_input_errors():
    x, t, label = inputs()
    with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 4\], got values in \[5"):
        small(num_classes=4)(x, t, torch.full((4,), 5))
    with pytest.raises(ValueError, match=r"cond must hold labels in \[0, 4\], got None"):
        small(num_classes=4)(x, t)
    with pytest.raises(ValueError, match="cond must be None for a network without num_classes"):
        small()(x, t, label)
    with pytest.raises(TypeError, match="cond must be a tensor or None, got a mapping of label"):
        small(num_classes=4)(x, t, {"label": label})
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, 8, 12\)"):
        small()(x.transpose(2, 3), t)


def test_constructor_errors():
    with pytest.raises(ValueError, match="width must be a positive multiple of 4, got 0"):
        PatchEmbed(SHAPE, 2, 0)
    with pytest.raises(ValueError, match="patch must divide the image size 8x9, got 2"):
        PatchEmbed((3, 8, 9), 2, 32)
    with pytest.raises(ValueError, match="patch must divide the image size 28x28, got 8"):
        DiT.from_name("DiT-S/8", (1, 28, 28))
    with pytest.raises(ValueError, match="heads must divide the width 32, got 5"):
        DiT(SHAPE, width=32, heads=5)
    with pytest.raises(ValueError, match="width must be a positive multiple of 4, got 30"):
        DiT(SHAPE, width=30, heads=5)
    with pytest.raises(ValueError, match=r"shape must be \(C, H, W\), got \(2,\)"):
        DiT((2,))
    with pytest.raises(ValueError, match="name must read DiT-<size>/<patch>, got 'DiT-S'"):
        DiT.from_name("DiT-S", SHAPE)
    with pytest.raises(ValueError, match="size must be one of B, L, S, XL, got 'M'"):
        DiT.from_name("DiT-M/2", SHAPE)
