"""Pictures show the samples, pixel by pixel."""

import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from flowkit.metrics import as_saved, from_uint8, to_uint8
from flowkit.metrics.pictures import colored, save_picture
from tests.metrics.samples import F64


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_every_image_in_order(channels, tmp_path):
    images = torch.rand(5, channels, 4, 6) * 2 - 1
    file = save_picture(images, tmp_path / "new" / "more" / "grid.png", columns=3, zoom=2)
    pixels = np.asarray(Image.open(file)).reshape(2 * (8 + 2) + 2, 3 * (12 + 2) + 2, channels)
    for k, image in enumerate(to_uint8(images)):
        top, left = 2 + k // 3 * 10, 2 + k % 3 * 14
        shown = pixels[top : top + 8 : 2, left : left + 12 : 2]
        assert np.array_equal(shown, image.permute(1, 2, 0).numpy())
    assert (pixels[12:, 30:] == 255).all()  # the place of a sixth


@pytest.mark.parametrize(("width", "scale"), [(4, 8), (13, 4), (32, 2), (40, 1), (65, 1)])
def test_images_are_enlarged_to_at_most_64_pixels_a_side(width, scale, tmp_path):
    file = save_picture(torch.zeros(11, 1, 3, width), tmp_path / "grid.png")
    size = 10 * (width * scale + 2) + 2, 2 * (3 * scale + 2) + 2
    with Image.open(file) as picture:
        assert picture.size == size  # ten in a row, with gaps of 2 pixels


def test_points_are_drawn_where_they_are(tmp_path):
    spread = torch.rand(2000, 2)
    file = save_picture(spread * torch.tensor([2.0, 1.0]), tmp_path / "points.png")
    dark = np.asarray(Image.open(file).convert("L")) < 200
    rows, columns = np.where(dark)
    assert np.ptp(columns) > 1.6 * np.ptp(rows) * 0.9  # equal axes: twice as wide as high
    higher = save_picture(
        torch.cat([spread * torch.tensor([2.0, 1.0]), spread], 1), tmp_path / "4.png"
    )
    assert higher.read_bytes() == file.read_bytes()


def test_real_points_are_shown_beside_in_the_same_range(tmp_path):
    """A quarter of the width: in a plot of its own, the square would fill it."""
    made, real = torch.rand(3000, 2), 4 * torch.rand(3000, 2)
    file = save_picture(made, tmp_path / "points.png", beside=real)
    pixels = np.asarray(Image.open(file)).astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 60
    half = blue.shape[1] // 2
    left, right = (np.ptp(np.where(part)[1]) for part in (blue[:, :half], blue[:, half:]))
    assert left == pytest.approx(right / 4, rel=0.1)
    line = save_picture(torch.rand(50, 1), tmp_path / "line.png", beside=torch.rand(90, 1))
    blue = np.asarray(Image.open(line)).astype(int)
    blue = blue[..., 2] - blue[..., 0] > 60
    assert min(blue[:, :half].mean(), blue[:, half:].mean()) > 0.05


def test_other_samples_have_a_picture_too(tmp_path):
    line = np.asarray(Image.open(save_picture(torch.rand(50, 1), tmp_path / "line.png")))
    assert (line.min(axis=2) < 200).mean() > 0.1  # the bars
    for channels in (2, 5):
        images = torch.rand(2, channels, 4, 4) * 2 - 1
        shown = save_picture(images, tmp_path / "channels.png")
        mean = save_picture(images.mean(1, keepdim=True), tmp_path / "mean.png")
        assert shown.read_bytes() == mean.read_bytes()


def test_bytes_and_images_undo_each_other():
    levels = torch.arange(256, dtype=torch.uint8)
    images = from_uint8(levels)
    assert torch.equal(images, levels.float() / 127.5 - 1)
    assert images.dtype == torch.float32
    assert torch.equal(to_uint8(images), levels)
    assert torch.equal(levels, torch.arange(256, dtype=torch.uint8))  # as they were
    floats = levels.float()
    assert torch.equal(from_uint8(floats), images)
    assert torch.equal(floats, levels.float())


def test_saved_images_have_levels():
    x = torch.rand(500) * 2.2 - 1.1
    saved = as_saved(x)
    assert torch.equal(as_saved(saved), saved)
    assert torch.equal(as_saved(to_uint8(x)), saved)
    assert (saved - x.clamp(-1, 1)).abs().max().item() <= 0.5 / 127.5 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_all_levels(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.to(dtype) / 127.5 - 1), levels)
    # Anything within half a level rounds back; truncation would not.
    for offset in (-0.49, 0.49):
        assert torch.equal(to_uint8((levels.double() + offset) / 127.5 - 1), levels)


def test_to_uint8_is_unbiased_and_clamps():
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=F64) * 2 - 1
    error = to_uint8(x).double() - (x + 1) * 127.5
    assert abs(error.mean().item()) < 4 * (1 / 12) ** 0.5 / 200_000**0.5
    assert error.abs().max() <= 0.5
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    # Half precision is widened, since it does not hold the products.
    for dtype in (torch.bfloat16, torch.float16):
        half = x[:2000].to(dtype)
        assert torch.equal(to_uint8(half), to_uint8(half.double()))


def test_masks_have_the_colors_of_their_classes():
    """Black for the background and for labels of no class; the colors repeat after 20."""
    labels = torch.tensor([0, 1, 2, 19, 20, 21, 22, 23, -1, 255])
    images = colored(labels.view(2, 1, 5), 23)
    assert images.shape == (2, 3, 1, 5)
    tab = torch.tensor(colormaps["tab20"].colors)
    black = torch.zeros(3)
    rows = [black, tab[1], tab[2], tab[19], tab[0], tab[1], tab[2], black, black, black]
    found = (images.movedim(1, -1).reshape(10, 3) + 1) / 2
    torch.testing.assert_close(found, torch.stack(rows))


def test_to_uint8_errors():
    with pytest.raises(ValueError, match="images must be finite, got 1 NaN"):
        to_uint8(torch.tensor([0.0, math.nan]))
    with pytest.raises(TypeError, match=r"images must be a floating-point .* got torch.uint8"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))


def test_rules_of_other_programs_differ_from_ours_as_their_formulas_say():
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    formulas = {
        "round": torch.round(127.5 * (x + 1)),
        "floor": torch.floor(127.5 * x + 128).clamp(0, 255),
        "truncate": torch.trunc((x + 1) / 2 * 255),
    }
    found = {rule: to_uint8(x, rule).double() for rule in formulas}
    for rule, expected in formulas.items():
        assert (found[rule] == expected).double().mean() > 0.9999  # but for round-off at ties
    assert (found["round"] - found["truncate"]).mean() == pytest.approx(0.5, abs=0.01)
    assert (found["round"] != found["floor"]).double().mean() < 0.002
    with pytest.raises(ValueError, match="quantization must be one of"):
        to_uint8(x, "ceil")


def dark(picture, top, bottom, left, right):
    """The number of dark pixels of a part of a picture."""
    return int((picture[top:bottom, left:right] < 128).sum())


@pytest.mark.parametrize("names", [["ab", "c", "ab", "c"], ["ab", "c", "c", "ab"]])
def test_captions_stand_above_images_and_hide_none(names, tmp_path):
    """Once a column if all of its images have the same name, else above each image."""
    images = torch.full((4, 1, 8, 8), 1.0)
    images[:, :, ::2] = -1
    file = save_picture(images, tmp_path / "a.png", columns=2, captions=names)
    plain = save_picture(images, tmp_path / "b.png", columns=2)
    with Image.open(file) as one, Image.open(plain) as two:
        found, without = np.array(one), np.array(two)
    once = names[:2] == names[2:]
    assert found.shape[0] - without.shape[0] == (12 if once else 24)
    rows = np.concatenate([found[12:]] if once else [found[12:78], found[90:156], found[156:]])
    assert np.array_equal(rows, without)
    places = [(0, 0), (0, 66)] if once else [(0, 0), (0, 66), (78, 0), (78, 66)]
    widths = {
        name: {dark(found, top, top + 12, left, left + 66)}
        for name, (top, left) in zip(names, places, strict=False)
    }
    assert all(min(count) > 5 for count in widths.values())
    assert widths["ab"] != widths["c"]


def test_a_long_caption_stays_within_its_image(tmp_path):
    images = torch.ones(3, 1, 32, 32)
    names = ["", "smileys and emotion, all faces", ""]
    file = save_picture(images, tmp_path / "a.png", columns=3, captions=names)
    with Image.open(file) as one:
        line = np.array(one)[:12]
    assert dark(line, 0, 12, 68, 132) > 20
    assert dark(line, 0, 12, 0, 68) == dark(line, 0, 12, 132, 200) == 0


def test_sequences_are_drawn_with_low_channels_below(tmp_path):
    sequences = torch.randn(2, 64, 20, generator=torch.Generator().manual_seed(0))
    with Image.open(save_picture(sequences, tmp_path / "sequences.png", zoom=3)) as picture:
        assert picture.size == (2 * (3 * 20 + 2) + 2, 3 * 64 + 4)  # a row of two, gaps of two
        levels = np.asarray(picture)[2:-2, 2:62:3][::3]
    image = sequences[0] - sequences.min()
    image = (255 * image / (sequences.max() - sequences.min())).flip(0)
    assert np.abs(levels - image.numpy()).max() < 1
