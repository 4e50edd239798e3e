import re
from itertools import islice
from pathlib import Path

import pytest
import torch

from flowkit.data import Emoji
from flowkit.data.emoji import DEBIAN_EMOJI, bitmaps
from flowkit.data.emoji_groups import group_of, groups, plain

UNICODE = Path("/usr/share/unicode/emoji/emoji-test.txt")
needs_font = pytest.mark.skipif(
    not DEBIAN_EMOJI.is_file(), reason="fonts-noto-color-emoji is missing"
)


@pytest.mark.parametrize(
    ("emoji", "group"),
    [
        ("😀", "face-smiling"),
        ("❤️", "heart"),
        ("❤️‍🔥", "heart"),
        ("👍🏿", "hand-fingers-closed"),
        ("🇨🇱", "country-flag"),
        ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", "subdivision-flag"),
        ("🏴‍☠️", "flag"),
        ("5️⃣", "keycap"),
        ("🔟", "keycap"),
        ("👩🏽‍🔬", "person-role"),
        ("🧑‍🎄", "person-fantasy"),
        ("👨‍🦽", "person-activity"),
        ("👩‍🦰", "person"),
        ("🏄🏻‍♀️", "person-sport"),
        ("🤦‍♂️", "person-gesture"),
        ("👩‍❤️‍👨", "family"),
        ("🧑🏻‍❤️‍💋‍🧑🏿", "family"),
        ("👨‍👩‍👧", "family"),
        ("🐈‍⬛", "animal-mammal"),
        ("😮‍💨", "face-neutral-skeptical"),
        ("👁️‍🗨️", "emotion"),
        ("5", None),
        ("🇨", None),
        ("🏽", None),
        ("a", None),
    ],
)
def test_groups_are_those_of_unicode(emoji, group):
    assert group_of(tuple(map(ord, emoji))) == group


@pytest.mark.skipif(not UNICODE.is_file(), reason="unicode-data is missing")
def test_every_emoji_of_unicode_has_its_group():
    group = subgroup = ""
    lines = 0
    for line in UNICODE.read_text().splitlines():
        if line.startswith("# group:"):
            group = line.partition(": ")[2]
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(": ")[2]
        elif (found := re.match(r"([0-9A-F ]+);", line)) and group != "Component":
            points = tuple(int(point, 16) for point in found[1].split())
            assert (group_of(points), groups()[subgroup]) == (subgroup, group), line
            lines += 1
    assert lines > 4000


@pytest.fixture(scope="module")
def data():
    found = Emoji(image_size=32)
    found.setup()
    return found


@needs_font
def test_the_font_holds_emoji_in_color_on_white(data):
    assert sum(data.sizes().values()) > 3500
    assert data.shape == (3, 32, 32)
    assert data.num_classes == len(data.class_names) > 90
    images = torch.cat([data.split(name)[:]["x1"] for name in ("train", "val", "test")])
    assert len(images.flatten(1).unique(dim=0)) > 0.99 * len(images)  # some differ in few pixels
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].flatten(1)
    assert (corners > 0.9).all(1).float().mean() > 0.9
    train = data.train[:]
    hearts = train["x1"][train["cond"] == data.class_names.index("heart")]
    faces = train["x1"][train["cond"] == data.class_names.index("face-smiling")]
    red, green, blue = faces[:, :, 20, 6].T  # in the cheek: yellow
    assert bool(((red > 0.6) & (green > 0.2) & (blue < 0.2)).float().mean() > 0.8)
    red, green, blue = hearts[:, :, 16, 16].median(0).values
    assert red > green


@needs_font
def test_pictures_of_64_pixels_reduced_are_those_of_32():
    some = [content for _, content in islice(bitmaps(DEBIAN_EMOJI), 0, 400, 10)]
    large, small = (
        torch.stack([Emoji(image_size=size)._image(content) for content in some]).float()
        for size in (64, 32)
    )
    assert large.shape == (40, 3, 64, 64)
    reduced = torch.nn.functional.avg_pool2d(large, 2)
    error = (reduced - small).square().mean((1, 2, 3)).sqrt()
    others = (reduced - small.roll(1, 0)).square().mean((1, 2, 3)).sqrt()
    assert error.max() < 0.1 * others.mean()  # of 85 levels


@needs_font
def test_the_tones_of_an_emoji_stay_in_one_split(data):
    """Without this, nearly all test images would have a near copy in training."""
    split_of = {}
    for name in ("train", "val", "test"):
        for image in data.split(name)[:]["x1"]:
            split_of[image.numpy().tobytes()] = name
    places, tones = {}, 0
    for sequence, content in bitmaps(DEBIAN_EMOJI):
        if group_of(sequence) is not None:
            pixels = data._image(content)[None]
            image = type(data.train)({"x1": pixels})[:]["x1"][0]
            places.setdefault(plain(sequence), set()).add(split_of[image.numpy().tobytes()])
            tones += plain(sequence) != sequence
    assert tones > 1500
    assert max(map(len, places.values())) == 1
    assert {"train", "val", "test"} == set.union(*places.values())


@needs_font
def test_every_class_is_in_training_and_groups_are_nine(data):
    assert data.train[:]["cond"].bincount(minlength=data.num_classes).min() > 0
    coarse = Emoji(classes="groups")
    coarse.setup()
    assert coarse.class_names == [
        "Smileys & Emotion",
        "People & Body",
        "Animals & Nature",
        "Food & Drink",
        "Travel & Places",
        "Activities",
        "Objects",
        "Symbols",
        "Flags",
    ]


def test_a_missing_font_is_named_with_its_package(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"font must be a font file, got .*apt-get install"):
        Emoji(tmp_path / "none.ttf").setup()


@needs_font
@pytest.mark.parametrize("size", [0, 11, 3000, 500_000, 10_000_000])
def test_a_damaged_font_is_named(size, tmp_path):
    font = tmp_path / "half.ttf"
    font.write_bytes(DEBIAN_EMOJI.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"^font must .*half\.ttf"):
        Emoji(font).setup()


def test_a_font_without_colors_is_refused(tmp_path):
    import matplotlib

    plain_font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(ValueError, match="font must have color bitmaps"):
        Emoji(plain_font).setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "image_size must lie in"),
        ({"image_size": 256}, "image_size must lie in"),
        ({"classes": "names"}, "classes must be one of"),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Emoji(**options)
