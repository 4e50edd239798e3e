"""The table of logged numbers and the plot of losses."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.modules import MetricsTable
from flowkit.modules.logs import plot_losses, read_rows


def _log(folder, steps, first_step=0, **more):
    table = MetricsTable(folder)
    table.first_step = first_step
    for step in steps:
        table.log_metrics({"train/loss": torch.tensor(step / 4), **more}, step)
        table.save()
    return table.file


def _steps(file):
    return [int(row["step"]) for row in read_rows(file)]


def test_a_resumed_table_drops_what_is_made_again_and_goes_on(tmp_path):
    """Rows after the checkpoint, half of a line, and new columns."""
    file = _log(tmp_path, [2, 5, 8])
    with file.open("a") as opened:
        opened.write("11,2.")
    assert _log(tmp_path, [5, 8, 11], first_step=5, extra=1.5) == file
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["step"] for row in rows] == ["2", "5", "8", "11"]
    assert [row["train/loss"] for row in rows] == ["0.5", "1.25", "2.0", "2.75"]
    assert [row["extra"] for row in rows] == ["", "1.5", "1.5", "1.5"]


def test_a_new_table_keeps_nothing_and_a_repeated_row_is_not_doubled(tmp_path):
    file = _log(tmp_path, [2, 5, 8])
    assert _steps(_log(tmp_path, [8], first_step=9)) == [2, 5, 8]
    assert _steps(_log(tmp_path, [8], first_step=9, other=1.0)) == [2, 5, 8, 8]
    assert _steps(_log(tmp_path, [1])) == [1]
    assert _steps(file) == [1]


def _inked(file, color, rows):
    """The share of the pixels of a color in each third of a plot, from top to bottom."""
    with Image.open(file, formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    hit = np.abs(pixels - color).sum(-1) < 60
    return [part.mean() for part in np.array_split(hit, rows)]


def test_the_plot_has_a_panel_for_each_kind_of_number(tmp_path):
    """By color: training is blue in all panels, validation orange in the first two."""
    file = tmp_path / "losses.png"
    rows = [
        {"step": str(k), "train/loss": str(1 / (k + 1)), "train/explained": str(k / 10)}
        | {"train/learning_rate": "0.1"}
        for k in range(9)
    ]
    held_out = [{"step": "4", "val/loss": "0.3"}, {"step": "8", "val/loss": "0.2"}]
    held_out = [{**row, "val/explained": "0.5"} for row in held_out]
    plot_losses(rows + held_out, file)
    blue, orange = (_inked(file, color, 3) for color in ((31, 119, 180), (255, 127, 14)))
    assert min(blue) > 2e-4
    assert min(orange[:2]) > 2e-4
    assert orange[2] == 0
    plot_losses([{"step": "3", "train/loss": "2.0"}], file)  # of a single step
    assert _inked(file, (31, 119, 180), 1)[0] > 1e-5
    with Image.open(file, formats=["PNG"]) as image:
        assert image.height == pytest.approx(3 * 120, abs=2)
