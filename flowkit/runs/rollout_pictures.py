"""Pictures of rollouts: paths seen from above, and an animation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from flowkit.policies import Rollout
from flowkit.provenance import write_atomically

SIZE, COLUMNS, ANIMATED, EVERY = 160, 5, 4, 2  # pixels, tiles a row, episodes, steps a frame
DOT = 4  # radius in pixels of what has no radius
COLORS = {"object": (150, 150, 150), "goal": (120, 205, 140), "hand": (40, 70, 200)}
ENDS = {True: (30, 160, 70), False: (200, 50, 40)}  # frames of success and failure


def save_paths(found: Rollout, file: Path, shown: int) -> None:
    """Save the paths of the first episodes as tiles; green frames for success, red ones else."""
    count = min(shown, len(found.paths))
    scale = _scale(found)
    tiles = [_tile(found, k, len(found.paths[k]), scale) for k in range(count)]
    rows = -(-count // COLUMNS)
    sheet = Image.new("RGB", (min(count, COLUMNS) * SIZE, rows * SIZE), "white")
    for k, tile in enumerate(tiles):
        sheet.paste(tile, (k % COLUMNS * SIZE, k // COLUMNS * SIZE))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda partial: sheet.save(partial, "PNG"))


def save_animation(found: Rollout, file: Path, shown: int) -> None:
    """Save the simulator's pictures of the first episodes, or their growing paths, as a GIF file.

    Args:
        found: The episodes.
        file: The file.
        shown: Episodes to show; at most the first four.
    """
    if found.frames:
        frames = [Image.fromarray(frame) for frame in found.frames[::EVERY]]
    else:
        scale = _scale(found)
        frames = [
            _tile(found, k, step, scale)
            for k in range(min(shown, ANIMATED, len(found.paths)))
            for step in range(1, len(found.paths[k]) + EVERY, EVERY)
        ]
    # The usual palette is that of the largest areas: a gray floor takes all of it.
    palette = Image.Quantize.MAXCOVERAGE
    first, *rest = [frame.quantize(64, palette) for frame in frames]
    options = {"save_all": True, "append_images": rest, "duration": 80, "loop": 0}
    write_atomically(file, lambda partial: first.save(partial, "GIF", **options))


def _scale(found: Rollout) -> tuple[np.ndarray, float]:
    """Return the middle and the side of the square that holds all that is drawn."""
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for name in COLORS:
        points = np.array([places[name] for path in found.paths for places in path])
        radius = found.radii.get(name, 0.0)
        low = np.minimum(low, points.min(0) - radius)
        high = np.maximum(high, points.max(0) + radius)
    return (low + high) / 2, float((high - low).max()) * 1.15 + 1e-6


def _tile(found: Rollout, number: int, steps: int, scale: tuple[np.ndarray, float]) -> Image.Image:
    """Draw the first steps of an episode, what is round in its size."""
    tile = Image.new("RGB", (SIZE, SIZE), "white")
    draw, path = ImageDraw.Draw(tile), found.paths[number][:steps]
    for name, color in COLORS.items():
        line = [_pixel(points[name], scale) for points in path]
        if len(line) > 1:
            draw.line(line, color, 2)
        (x, y), r = line[-1], found.radii.get(name, 0.0) * SIZE / scale[1] or DOT
        draw.ellipse((x - r, y - r, x + r, y + r), color)
    done = steps >= len(found.paths[number])
    color = ENDS[found.outcomes[number]] if done else (190, 190, 190)
    draw.rectangle((1, 1, SIZE - 2, SIZE - 2), outline=color, width=2)
    return tile


def _pixel(point: Sequence[float], scale: tuple[np.ndarray, float]) -> tuple[float, float]:
    """Return the place of a point in a tile, with the second axis upwards."""
    (x, y), side = (np.asarray(point) - scale[0]), scale[1]
    return SIZE * (0.5 + x / side), SIZE * (0.5 - y / side)
