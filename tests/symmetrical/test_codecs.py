"""Label codes: distances, noise, and the way back."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from flowkit.modules.checkpoints import build
from flowkit.symmetrical import Codec, OneHot, OneHotMask, Ordinal, RGBPalette, Simplex
from tests.conftest import CONF

CODECS = [OneHot, Simplex, Ordinal, RGBPalette, OneHotMask]
PIXELWISE = (RGBPalette, OneHotMask)


def _all_labels(codec):
    labels = torch.arange(codec.num_classes)
    return labels.reshape(1, 1, -1) if isinstance(codec, PIXELWISE) else labels


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("num_classes", [2, 3, 150, 1000])
def test_dequantized_codes_are_decoded_to_their_labels(kind, num_classes):
    codec = kind(num_classes, q=0.5)
    assert isinstance(codec, Codec)
    labels = _all_labels(codec)
    code = codec.dequantize(codec.encode(labels), torch.Generator().manual_seed(0))
    assert torch.equal(codec.decode(code), labels)
    assert torch.equal(codec.posterior(code).argmax(1), labels)


@pytest.mark.parametrize("kind", CODECS)
def test_the_worst_noise_of_any_q_below_one_is_decoded(kind):
    """Towards the nearest other code, at the very corner of the noise's cube."""
    codec = kind(8, q=0.95)
    table = codec.table
    distances = torch.cdist(table, table).fill_diagonal_(math.inf)
    other = table[distances.argmin(1)]
    worst = table + codec.half_width * (other - table).sign()
    code = worst.T[None, :, None] if isinstance(codec, PIXELWISE) else worst
    assert torch.equal(codec.decode(code).flatten(), torch.arange(8))
    assert distances.min().item() == pytest.approx(codec.min_distance, rel=1e-6)


@given(q=st.floats(0, 0.99), num_classes=st.integers(2, 40), which=st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_noise_is_uniform_of_the_stated_half_width(q, num_classes, which):
    kind = CODECS[which]
    if kind is RGBPalette:
        q = min(q, 0.9)
    codec = kind(num_classes, q=q)
    zeros = torch.zeros(2000, codec.channels)
    noise = codec.dequantize(zeros, torch.Generator().manual_seed(0))
    half = q * codec.min_distance / (2 * math.sqrt(codec.channels))
    assert noise.abs().max() <= half * (1 + 1e-6)
    assert noise.std().item() == pytest.approx(half / math.sqrt(3), rel=0.05, abs=1e-9)
    assert noise.abs().max().item() == pytest.approx(half, rel=0.02, abs=1e-9)


def test_no_noise_without_q():
    codec = OneHot(4, q=0.0)
    code = codec.encode(torch.arange(4))
    assert torch.equal(codec.dequantize(code), code)


@pytest.mark.parametrize("kind", [OneHot, Simplex])
@given(weights=st.lists(st.floats(0, 1), min_size=2, max_size=30).filter(lambda w: sum(w) > 0.1))
@settings(max_examples=50, deadline=None)
def test_an_expected_code_gives_back_its_probabilities(kind, weights):
    """posterior(Σ p_k code_k) = p, exactly: the codes are affinely independent."""
    p = torch.tensor(weights) / sum(weights)
    codec = kind(len(weights))
    expected = (p[:, None] * codec.table).sum(0, keepdim=True)
    torch.testing.assert_close(codec.posterior(expected)[0], p, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", CODECS)
def test_posteriors_are_probabilities_of_any_code(kind):
    codec = kind(7)
    p = codec.posterior(3 * torch.randn(50, codec.channels, 2, 3))
    assert p.shape == (50, 7, 2, 3)
    assert p.min() >= 0
    torch.testing.assert_close(p.sum(1), torch.ones(50, 2, 3))


def test_the_projection_to_probabilities_is_the_nearest_point():
    """Brute force over a fine grid of the simplex of three classes."""
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 101)] * 2)
    grid = grid[grid.sum(1) <= 1 + 1e-6]
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    codes = torch.randn(20, 3)
    p = OneHot(3, amplitude=1.0).posterior(codes)
    best = torch.cdist(codes, grid).amin(1)
    mine = (codes - p).norm(dim=1)
    assert bool((mine <= best + 1e-6).all())
    assert bool((mine >= best - 0.02).all())


def test_codes_of_simplex_and_one_hot_are_equally_far_apart_and_those_of_ordinal_on_a_line():
    for codec in (OneHot(6, amplitude=3.0), Simplex(6, amplitude=3.0)):
        distances = torch.pdist(codec.table)
        torch.testing.assert_close(distances, torch.full_like(distances, 3 * math.sqrt(2)))
    torch.testing.assert_close(Simplex(6).table.mean(0), torch.zeros(5), atol=1e-6, rtol=0)
    assert OneHot(3).encode(torch.tensor([2])).tolist() == [[0, 0, 2]]
    assert Ordinal(5).encode(torch.arange(5)).flatten().tolist() == [-1, -0.5, 0, 0.5, 1]
    assert Ordinal(3, amplitude=4.0).table.flatten().tolist() == [-4, 0, 4]


@pytest.mark.parametrize("kind", [OneHot, Simplex, Ordinal])
def test_class_codecs_take_masks_too(kind):
    codec, masks = kind(5), torch.randint(5, (3, 4, 6))
    code = codec.encode(masks)
    assert code.shape == (3, codec.channels, 4, 6)
    assert torch.equal(code[1, :, 2, 3], codec.encode(masks[1, 2, 3][None])[0])
    assert torch.equal(codec.decode(code), masks)


@pytest.mark.parametrize("kind", PIXELWISE)
def test_ignored_pixels_are_zeros_and_do_not_count(kind):
    codec = kind(4, ignore_index=255)
    masks = torch.tensor([[[0, 3, 255]]])
    assert codec.counted(masks).tolist() == [[[True, True, False]]]
    code = codec.encode(masks)
    assert torch.equal(code[..., 2], torch.zeros_like(code[..., 2]))
    assert torch.equal(codec.decode(code)[..., :2], masks[..., :2])
    assert kind(4).counted(masks) is None


def test_palettes_are_colors_in_the_range_of_images():
    colors = [[0, 0, 0], [128, 64, 128], [220, 20, 60]]
    code = RGBPalette(colors).encode(torch.tensor([[[0, 1, 2]]]))
    levels = ((code[0, :, 0].T + 1) * 127.5).round().int().tolist()
    assert levels == colors
    for size in (2, 8, 9, 27, 150):
        table = RGBPalette(size).table
        assert table.shape == (size, 3)
        assert len(table.unique(dim=0)) == size
        assert table.abs().max() <= 1


def test_colors_too_close_for_the_noise_are_refused():
    """Noise and rounding to 8 bits together must not reach another color's half."""
    near = [[0, 0, 0], [0, 0, 3], [255, 0, 0]]
    RGBPalette(near, q=0.4)  # √3/0.6 = 2.9
    with pytest.raises(
        ValueError,
        match=r"colors must be more than 3.5 levels apart for q = 0.5, got 3.0 between classes 0 "
        "and 1; lower q or choose other colors",
    ):
        RGBPalette(near, q=0.5)
    with pytest.raises(ValueError, match=r"got 0.0 between classes 0 and 1"):
        RGBPalette([[1, 2, 3], [1, 2, 3]], q=0.0)


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_the_closest_allowed_colors_survive_noise_and_rounding(q):
    gap = math.floor(math.sqrt(3) / (1 - q)) + 1
    codec = RGBPalette([[100, 100, 100], [100, 100, 100 + gap]], q=q)
    masks = torch.randint(2, (1, 60, 60))
    noisy = codec.dequantize(codec.encode(masks), torch.Generator().manual_seed(0))
    stored = ((noisy + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(codec.decode(stored), masks)


@pytest.mark.parametrize("kind", CODECS)
def test_bad_arguments_are_refused(kind):
    with pytest.raises(ValueError, match=r"q must lie in \[0, 1\), got 1.0; from 1 on"):
        kind(3, q=1.0)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        kind(1)
    codec = kind(3)
    labels = torch.tensor([[[0, 3]]]) if kind in PIXELWISE else torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"labels must hold labels in \[0, 2\], got values in"):
        codec.encode(labels)
    with pytest.raises(TypeError, match="labels must hold integer labels, got torch"):
        codec.encode(labels.float())
    with pytest.raises(ValueError, match=r"code must have shape \(B, \d, \*\), got \(2, 9\)"):
        codec.decode(torch.zeros(2, 9))


def test_labels_that_are_none_of_the_codecs_say_what_may_be_meant():
    with pytest.raises(
        ValueError, match=r"\[0, 4\], got values in \[0, 255\]; give .* ignore_index"
    ):
        OneHotMask(5).encode(torch.tensor([[[0, 255]]]))


def test_small_integers_do_not_wrap():
    codec = OneHotMask(50, ignore_index=300)
    labels = torch.tensor([[[44, 1]]], dtype=torch.uint8)
    assert codec.counted(labels).all()
    assert torch.equal(codec.encode(labels), codec.encode(labels.long()))
    last = OneHotMask(256, ignore_index=-1).encode(torch.tensor([[[255]]], dtype=torch.uint8))
    assert last.sum() == 2


@pytest.mark.parametrize("codec", [OneHot(3), Simplex(3), Ordinal(3)])
def test_codes_that_are_not_finite_are_refused(codec):
    code = torch.full((1, codec.channels), float("nan"))
    for read in (codec.decode, codec.posterior):
        with pytest.raises(ValueError, match="code must be finite"):
            read(code)


def test_a_codec_of_no_number_of_classes_says_what_masks_need():
    with pytest.raises(TypeError, match="num_classes must be a number, got None; data without"):
        OneHot(None)


def test_bad_palettes_and_masks_are_refused():
    with pytest.raises(ValueError, match=r"colors must be RGB triples in 0...255, got"):
        RGBPalette([[0, 0, 300], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"ignore_index must lie outside \[0, 2\], got 2"):
        OneHotMask(3, ignore_index=2)
    with pytest.raises(ValueError, match=r"labels must be masks \(B, H, W\), got shape \(4,\)"):
        OneHotMask(3).encode(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="amplitude must be positive and finite, got 0"):
        OneHot(3, amplitude=0)


@pytest.mark.parametrize("name", ["one_hot", "simplex", "ordinal", "one_hot_mask", "rgb_palette"])
def test_every_codec_of_the_configuration_builds(name, configure):
    assert (Path(CONF) / "codec" / f"{name}.yaml").is_file()
    cfg = configure("train", "module=symmetrical", f"codec@module.codec={name}")
    cfg.num_classes = 11
    codec = instantiate(cfg.module.codec)
    assert codec.num_classes == 11
    resolved = OmegaConf.to_container(cfg.module.codec, resolve=True)
    assert torch.equal(build(resolved).table, codec.table)
