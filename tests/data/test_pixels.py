"""Sizes, channels and JPEG files of images, by values."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowkit.data.folder import square
from flowkit.data.pixels import Resize, jpeg_quality, pixels_of, through_jpeg, with_channels

G = torch.Generator().manual_seed(0)
PIXELS = torch.randint(0, 256, (3, 3, 12, 10), dtype=torch.uint8, generator=G)


def picture(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def test_the_default_resize_is_that_of_training_images():
    for one in PIXELS:
        assert torch.equal(Resize(5)(one), square(picture(one), 5))
        assert torch.equal(Resize(5)(one[:1]), square(picture(one).getchannel(0), 5, channels=1))


def test_without_antialiasing_a_reduction_samples_and_does_not_average():
    """A row of 32 pixels to 4: pixel k lies at 8 k + 3.5, between two pixels."""
    row = torch.randint(0, 256, (32,), generator=G)
    image = row.byte().expand(1, 32, 32)
    expected = [(row[8 * k + 3] + row[8 * k + 4]).item() / 2 for k in range(4)]
    found = Resize(4, "bilinear", antialias=False)(image)[0, 0].tolist()
    assert found == [round(value) for value in expected]  # both round halves to even
    means = row.view(4, 8).double().mean(1)
    averaged = Resize(4, "box")(image)[0, 0].double()
    assert (averaged - means).abs().max() <= 0.5 + 1e-9


def test_filters_that_do_not_exist_are_refused():
    with pytest.raises(
        ValueError, match=r"filter must be one of bicubic, bilinear, box, lanczos, got 'nearest'"
    ):
        Resize(4, "nearest")
    with pytest.raises(ValueError, match=r"filter must be one of bicubic, bilinear, got 'lanczos'"):
        Resize(4, "lanczos", antialias=False)
    with pytest.raises(ValueError, match="resize must be at least 1, got 0"):
        Resize(0)


def test_channels_change_only_where_nothing_is_lost():
    gray = PIXELS[:, :1]
    assert torch.equal(with_channels(gray, 3, "x"), gray.repeat(1, 3, 1, 1))
    assert torch.equal(with_channels(with_channels(gray, 3, "x"), 1, "x"), gray)
    with pytest.raises(ValueError, match=r"samples must be gray like .*, got colors"):
        with_channels(PIXELS, 1, "samples")


@settings(max_examples=20)
@given(st.integers(1, 100))
def test_jpeg_files_are_those_of_pillow_and_tell_their_quality(quality):
    file = io.BytesIO()
    picture(PIXELS[0]).save(file, "JPEG", quality=quality)
    with Image.open(file, formats=["JPEG"]) as image:
        assert jpeg_quality(image) == quality
        assert torch.equal(through_jpeg(PIXELS[:1], quality)[0], pixels_of(image, 3))


def test_better_jpeg_files_are_nearer():
    smooth = torch.linspace(0, 255, 256).reshape(1, 1, 16, 16).byte().repeat(1, 3, 1, 1)
    errors = [(through_jpeg(smooth, q).float() - smooth).abs().mean() for q in (10, 50, 95)]
    assert errors[0] > errors[1] > errors[2] > 0
    with pytest.raises(ValueError, match=r"jpeg must lie in \[1, 100\], got 0"):
        through_jpeg(smooth, 0)
