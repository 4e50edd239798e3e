import re

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.exact import GaussianFlow
from flowkit.metrics.pictures import GAP, LINE, save_picture, to_uint8
from flowkit.modules import ConditionalFlowMatching
from flowkit.nn import MLP
from flowkit.pictures import animate, interpolate, show, slerp
from flowkit.sampling import ODESampler, seeded_noise

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tile(picture, left, top, side):
    return np.asarray(picture.convert("RGB"))[top : top + side, left : left + side]


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_hold_the_pixels_with_white_gaps_between(channels):
    images = IMAGES[:, :channels]
    picture = show(images, columns=3, zoom=2)
    assert picture.size == (3 * (16 + GAP) + GAP, 2 * (16 + GAP) + GAP)
    seen = np.full((picture.height, picture.width), False)
    for k, image in enumerate(images):
        left, top = GAP + k % 3 * (16 + GAP), GAP + k // 3 * (16 + GAP)
        expected = to_uint8(image).expand(3, -1, -1).permute(1, 2, 0).numpy()
        assert np.array_equal(tile(picture, left, top, 16)[::2, 1::2], expected)
        seen[top : top + 16, left : left + 16] = True
    assert (np.asarray(picture)[~seen] == 255).all()


def test_words_leave_the_tiles_as_they_are():
    plain = show(IMAGES, columns=3, zoom=2)
    words = show(IMAGES, columns=3, zoom=2, titles="abc", rows=["one", "two"])
    left, top = words.width - plain.width, LINE
    assert np.array_equal(np.asarray(words)[top:, left:], np.asarray(plain))
    assert (np.asarray(words)[:top, left + GAP : left + GAP + 16] < 128).any()  # a letter
    assert (np.asarray(words)[top:, :left] < 128).any()
    each = show(IMAGES, columns=3, zoom=2, titles=range(5))
    assert each.height == plain.height + 2 * LINE
    step = 16 + GAP + LINE
    for k, image in enumerate(IMAGES):
        at = tile(each, GAP + k % 3 * (16 + GAP), GAP + LINE + k // 3 * step, 16)
        assert np.array_equal(at[::2, ::2], to_uint8(image).permute(1, 2, 0).numpy())


def test_a_long_title_stays_above_its_own_tile():
    words = np.asarray(show(IMAGES, columns=5, zoom=2, titles=["W" * 50, "", "", "", ""]))
    above = words[:LINE]
    assert (above[:, : GAP + 16] < 128).any()
    assert (above[:, GAP + 16 + GAP :] == 255).all()


@pytest.mark.parametrize("names", [list("abcabcab"), list("abcdefgh"), None])
@pytest.mark.parametrize("channels", [1, 3])
def test_notebooks_and_recipes_show_the_same_tiles(names, channels, tmp_path):
    images = IMAGES.repeat(2, 1, 1, 1)[:8, :channels]
    file = save_picture(images, tmp_path / "a.png", columns=3, zoom=8, captions=names)
    titles = names[:3] if names and names[3] == "a" else names
    with Image.open(file, formats=["PNG"]) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(show(images, 3, titles)))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (IMAGES[0], {}, r"images must be \(N, 1 or 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8), {}, "images must be"),
        (IMAGES[:0], {}, "images must be"),
        (IMAGES, {"columns": 0}, "columns must be at least 1, got 0"),
        (IMAGES, {"zoom": 0}, "zoom must be at least 1, got 0"),
        (IMAGES, {"columns": 3, "titles": "ab"}, "titles must hold 3 texts, one per column, or 5"),
        (IMAGES, {"columns": 3, "rows": "abc"}, "rows must hold 2 texts, one per row, got 3"),
        (IMAGES * torch.nan, {}, "images must"),
    ],
)
def test_wrong_values_are_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        show(images, **options)


def test_an_arc_keeps_the_length_and_turns_evenly():
    a, b = seeded_noise((3, 4, 4), [0, 1])
    b = b * a.norm() / b.norm()
    arc = slerp(a, b, torch.linspace(0, 1, 9))
    torch.testing.assert_close(arc.flatten(1).norm(dim=1), a.norm().expand(9))
    torch.testing.assert_close(arc[[0, -1]], torch.stack([a, b]))
    turns = torch.nn.functional.cosine_similarity(arc[1:].flatten(1), arc[:-1].flatten(1))
    torch.testing.assert_close(turns, turns[:1].expand(8))
    torch.testing.assert_close(slerp(b, a, torch.linspace(0, 1, 9)).flip(0), arc)
    assert torch.equal(slerp(a, a, torch.tensor([0.3]))[0], a)


@pytest.fixture
def module():
    found = ConditionalFlowMatching(GaussianFlow(0.25, 0.1))
    found.sample_shape = (1, 8, 8)
    return found


def test_the_ends_of_a_way_are_the_two_samples(module):
    way = interpolate(module, [3, 8], steps=5)
    ends = module.sample(2, seeds=[3, 8])
    assert torch.equal(way[[0, -1]], ends)
    # An exact Gaussian flow keeps the arc: the middle has the same distance from the mean.
    radii = (way - 0.25).flatten(1).norm(dim=1)
    assert radii[2] > 0.9 * radii[[0, -1]].min()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 2], "steps": 1}, "steps must be"),
        ({"seeds": [1]}, "seeds must hold .*2, got 1"),
    ],
)
def test_wrong_ways_are_refused(module, options, message):
    with pytest.raises(ValueError, match=message):
        interpolate(module, **options)


def test_a_film_starts_with_noise_and_ends_with_the_samples(module, tmp_path):
    sampler = ODESampler(6)
    file = animate(module, tmp_path / "way.gif", 4, sampler=sampler, columns=2, seconds=1.4)
    with Image.open(file, formats=["GIF"]) as film:
        assert film.n_frames == 7
        frames, times = [], []
        for k in range(7):
            film.seek(k)
            frames.append(np.asarray(film.convert("RGB")))
            times.append(film.info["duration"])
        assert film.info["loop"] == 0
    assert times == [200] * 6 + [1200]
    noise, samples = seeded_noise((1, 8, 8), range(4)), module.sample(4, sampler, seeds=range(4))
    for frame, images in ((frames[0], noise.clamp(-1, 1)), (frames[-1], samples)):
        assert (
            np.abs(frame.astype(int) - np.asarray(show(images, 2).convert("RGB")).astype(int)).max()
            <= 1
        )


def test_a_film_needs_a_time_and_samples(module, tmp_path):
    for options, message in (
        ({"seconds": 0}, "seconds must be"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            animate(module, tmp_path / "a.gif", **options)
    assert not list(tmp_path.iterdir())


def test_conditions_may_be_the_names_of_classes(tmp_path):
    torch.manual_seed(0)
    module = ConditionalFlowMatching(MLP((1, 4, 4), num_classes=3, width=16))
    module.sample_shape, module.class_names = (1, 4, 4), ["cat", "dog", "owl"]
    given = module.sample(3, cond=["owl", "cat", "owl"], seeds=range(3))
    assert torch.equal(given, module.sample(3, cond=torch.tensor([2, 0, 2]), seeds=range(3)))
    assert torch.equal(given, module.sample(3, cond=[2, np.int64(0), 2], seeds=range(3)))
    way = interpolate(module, [0, 1], 4, cond=["dog"])
    assert torch.equal(way, interpolate(module, [0, 1], 4, cond=torch.ones(4).long()))
    animate(module, tmp_path / "a.gif", 2, cond=["dog", "owl"], sampler=ODESampler(2))
    message = "cond must name classes of the module, got cta; did you mean cat?"
    with pytest.raises(ValueError, match=re.escape(message)):
        module.sample(1, cond=["cta"])
    for cond, got in (
        ("dog", "got 'dog'; write ['dog']"),
        (1, "got 1; write [1]"),
        (["dog", 1], "got a list of int and str"),
        ([0.5], "got a list of float"),
        ([True], "got a list of bool"),
        ([], "got a list of nothing"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"or a list of labels, {got}") + "$"):
            module.sample(1, cond=cond)
