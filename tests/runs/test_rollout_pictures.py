"""Pictures of rollouts: what is round has its size."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.policies import Rollout
from flowkit.runs.rollout_pictures import COLORS, SIZE, save_animation, save_paths

RADII = {"hand": 0.04, "object": 0.18, "goal": 0.05}


def found(radii):
    path = [{"hand": (-0.5, 0.4), "object": (0.0, 0.0), "goal": (0.5, 0.0)}] * 2
    return Rollout([True], [torch.zeros(2, 2)], [path], ["left"], [], [0.1], 1.0, radii)


def area(image, name):
    return int((np.asarray(image) == COLORS[name]).all(-1).sum())


def test_sizes_are_to_scale(tmp_path):
    save_paths(found(RADII), tmp_path / "a.png", 1)
    image = Image.open(tmp_path / "a.png")
    side = (0.5 + 0.05 + 0.5 + 0.04) * 1.15  # from the hand to the goal, and a margin
    for name, radius in RADII.items():
        pixels = radius * SIZE / side
        # A circle of radius r covers the pixels within r + 1/2 of its middle.
        assert area(image, name) == pytest.approx(np.pi * (pixels + 0.5) ** 2, rel=0.12)
    x = round(SIZE * (0.5 + (0.0 - 0.005) / side))
    assert image.getpixel((x, 10)) == (255, 255, 255)


def test_what_has_no_size_is_a_dot(tmp_path):
    save_paths(found({}), tmp_path / "a.png", 1)
    image = Image.open(tmp_path / "a.png")
    assert area(image, "hand") == area(image, "object") == area(image, "goal") < 80


def test_small_things_keep_their_color_in_an_animation(tmp_path):
    """A hand of 1/300 of a picture, on a floor of 256 shades of gray."""
    frame = np.repeat(np.arange(320) * 255 // 319, 3).reshape(1, 320, 3)
    frame = np.broadcast_to(frame, (240, 320, 3)).astype(np.uint8)
    frame[100:116, 100:116] = (40, 80, 220)
    shown = found(RADII)._replace(frames=[frame, frame])
    save_animation(shown, tmp_path / "a.gif", 1)
    with Image.open(tmp_path / "a.gif") as animation:
        pixel = np.asarray(animation.convert("RGB"))[108, 108].astype(int)
    assert np.abs(pixel - (40, 80, 220)).max() < 40
