"""Encoders and the alignment of features with their tokens."""

import pytest
import torch

from flowkit.blockwise import (
    DINOv2,
    MaskedEncoder,
    StoredTokens,
    alignment_loss,
    store_tokens,
    train_masked_encoder,
)
from flowkit.blockwise.alignment import Projector, resize_tokens, token_sides
from flowkit.nn.dit import patchify


def test_alignment_is_minus_the_mean_cosine():
    z = torch.randn(3, 5, 7)
    assert alignment_loss(z, z).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(z, -z).item() == pytest.approx(1, abs=1e-6)
    a, b = torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)
    a[..., :2], b[..., 2:] = torch.randn(2, 2, 2), torch.randn(2, 2, 2)
    assert alignment_loss(a, b).item() == 0
    p = torch.randn(3, 5, 7)
    by_hand = [
        -(p[i, n] @ z[i, n]) / (p[i, n].norm() * z[i, n].norm()) for i in range(3) for n in range(5)
    ]
    torch.testing.assert_close(alignment_loss(p, z), torch.stack(by_hand).mean())
    torch.testing.assert_close(alignment_loss(5 * p, 0.1 * z), alignment_loss(p, z))
    with pytest.raises(ValueError, match=r"projected must have the shape of tokens, \(3, 5, 7\)"):
        alignment_loss(p[:, :4], z)


def test_the_published_projector():
    assert sum(p.numel() for p in Projector(1152, 768).parameters()) == 8_131_328
    net, h = Projector(3, 2, width=5), torch.randn(4, 7, 3)
    first, second, third = (layer for layer in net if isinstance(layer, torch.nn.Linear))
    middle = second(first(h) * first(h).sigmoid())
    torch.testing.assert_close(net(h), third(middle * middle.sigmoid()))


def test_tokens_are_resized_as_a_grid():
    grid = torch.arange(16.0).reshape(1, 16, 1)
    assert resize_tokens(grid, (4, 4), (4, 4)) is grid
    assert resize_tokens(grid, (4, 4), (1, 1)).item() == pytest.approx(7.5)
    halves = resize_tokens(torch.arange(4.0).repeat(4).reshape(1, 16, 1), (4, 4), (1, 2))
    left = (0.75 * 0 + 0.75 * 1 + 0.25 * 2) / 1.75  # a triangle of two columns' half width
    torch.testing.assert_close(halves[0, :, 0], torch.tensor([left, 3 - left]))


@pytest.mark.parametrize(
    ("old", "new"), [((16, 16), (8, 32)), ((8, 32), (4, 16)), ((2, 8), (4, 4))]
)
def test_tokens_of_sides_that_differ_are_resized_along_both_axes(old, new):
    """A ramp along rows or columns stays one, away from the border: also at equal numbers."""
    for axis in (0, 1):
        ramp = ((torch.arange(old[axis]) + 0.5) / old[axis]).unsqueeze(1 - axis).expand(old)
        found = resize_tokens(ramp.reshape(1, -1, 1), old, new).reshape(new)
        expected = ((torch.arange(new[axis]) + 0.5) / new[axis]).unsqueeze(1 - axis).expand(new)
        inner = slice(new[axis] // 4, new[axis] - new[axis] // 4)
        pick = (inner, slice(None)) if axis == 0 else (slice(None), inner)
        torch.testing.assert_close(found[pick], expected[pick], rtol=0, atol=1e-6)


def test_sides_of_tokens_are_known_and_not_guessed(tmp_path):
    wide, square = torch.randn(3, 1, 4, 16), torch.randn(3, 1, 8, 8)
    net = MaskedEncoder((1, 4, 16), patch=2, width=16, depth=1, heads=2).eval()
    assert token_sides(net, wide, 16) == (2, 8)
    plain = lambda x: patchify(x, 2)  # noqa: E731
    assert token_sides(plain, square, 16) == (4, 4)
    with pytest.raises(ValueError, match=r"must have the attribute sides.* 16 tokens of .*4, 16\)"):
        token_sides(plain, wide, 16)
    with pytest.raises(ValueError, match=r"must have the attribute sides.* got 8 tokens"):
        token_sides(plain, square, 8)
    with pytest.raises(ValueError, match=r"encoder.sides must hold 8 tokens, got 2x8"):
        token_sides(net, wide, 8)
    file = tmp_path / "tokens.safetensors"
    store_tokens(file, [wide], net)
    assert token_sides(StoredTokens(file), wide, 16) == (2, 8)
    store_tokens(file, [square], plain)
    assert StoredTokens(file).sides == (4, 4)


def test_tokens_on_disk_are_found_by_content(tmp_path):
    images = torch.randn(7, 1, 4, 4)
    encoder = lambda x: patchify(x, 2) * 3  # noqa: E731
    file = tmp_path / "tokens.safetensors"
    assert store_tokens(file, [images[:4], images[3:]], encoder) == 7
    stored = StoredTokens(file)
    order = torch.tensor([5, 0, 6, 0])
    expected = torch.nn.functional.normalize(encoder(images[order]), dim=-1)
    torch.testing.assert_close(stored(images[order]), expected, rtol=0, atol=1e-3)
    near = images[:1].clone()
    near[..., 0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"images must have tokens in .* 1 unknown of 1"):
        stored(near)
    with pytest.raises(ValueError, match=r"images must have tokens in .* 2 unknown of 3"):
        stored(torch.cat([images[:1], images[1:3].flip(-1)]))
    with pytest.raises(
        ValueError, match=r"file must hold tokens, got None; write one with `flowkit tokens`"
    ):
        StoredTokens(None)
    MaskedEncoder((1, 4, 4), width=16, depth=1, heads=2).save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="file must be written by `flowkit tokens`, got"):
        StoredTokens(tmp_path / "net.safetensors")


def stripes(count, seed):
    """Images of two gray levels, left and right: what is hidden can be told from what is not."""
    levels = torch.rand(count, 1, 1, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return levels.repeat_interleave(4, -1).expand(count, 1, 8, 8).contiguous()


def test_the_masked_encoder_learns_to_fill_in(tmp_path):
    images, held_out = stripes(500, 0), stripes(100, 1)
    state, sizes = torch.random.get_rng_state(), {"width": 32, "depth": 1, "heads": 2}
    losses = []
    net = train_masked_encoder(
        images,
        steps=150,
        batch_size=64,
        learning_rate=5e-3,
        report=lambda step, loss: losses.append(loss),
        **sizes,
    )
    assert len(losses) == 150
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(p.requires_grad for p in net.parameters())
    mask = torch.rand(100, 16, generator=torch.Generator().manual_seed(0)) < 0.6
    assert net.loss(held_out, mask) < 0.3 * held_out.var()
    # hidden patches are unseen
    changed = torch.where(unpatch(mask), torch.randn_like(held_out), held_out)
    torch.testing.assert_close(net(changed, mask), net(held_out, mask))
    net.save(tmp_path / "encoder.safetensors")
    again = MaskedEncoder.load(tmp_path / "encoder.safetensors")
    assert torch.equal(again(held_out), net(held_out))
    with pytest.raises(
        ValueError, match="file must hold an encoder, got None; train one with `flowkit tokens`"
    ):
        MaskedEncoder.load(None)
    one, same = (train_masked_encoder(images, steps=2, **sizes) for _ in range(2))
    assert torch.equal(one(held_out), same(held_out))


def unpatch(mask):
    return mask.reshape(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dinov2_tokens_of_a_tiny_network():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    model = transformers.Dinov2Model(config)
    encoder = DINOv2(model, size=42)
    gray = torch.rand(2, 1, 8, 8) * 2 - 1
    tokens = encoder(gray)
    assert tokens.shape == (2, 9, 16)
    assert not tokens.requires_grad
    torch.testing.assert_close(encoder(gray.expand(-1, 3, -1, -1)), tokens)
    # black and white are where the network was trained to have them
    pixels = torch.nn.functional.interpolate(
        gray.expand(-1, 3, -1, -1) / 2 + 0.5, size=(42, 42), mode="bicubic", antialias=True
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (pixels - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        states = model(inputs).last_hidden_state
    torch.testing.assert_close(tokens, states[:, 1:])
