"""Logs of a training: the table of its numbers, the plot of its losses, pictures for loggers."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import (
    CSVLogger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.loggers.logger import rank_zero_experiment

from flowkit.metrics.pictures import save_figure
from flowkit.provenance import write_atomically

LOSSES = "losses.png"
Rows = list[dict[str, str]]


class MetricsTable(CSVLogger):
    """Logged numbers as ``<save_dir>/<name>/version_<version>/metrics.csv``, one file over resumes.

    Lightning's own logger begins a file at every call. This one goes on in the file that is there:
    it keeps the rows of the steps before ``first_step``, and removes later ones. These were logged
    between the last checkpoint and a kill, and the resumed training logs them again.

    Args:
        save_dir: Folder of the run.
        name: Sub-folder of the table.
        version: Number of its folder.
        prefix: Text before the names of the numbers.
        flush_logs_every_n_steps: Steps between writes, if no trainer asks for one.

    Attributes:
        first_step: The first step that is logged; a new training leaves it at 0.
    """

    first_step: int = 0

    def __init__(
        self,
        save_dir: str | Path,
        name: str = "logs",
        version: int = 0,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)

    @property
    def file(self) -> Path:
        """File of the table."""
        return Path(self.log_dir) / "metrics.csv"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The open table, on the first process only."""
        if self._experiment is None:
            self._experiment = cast(Any, _Table(self.file, self.first_step))
        return self._experiment


class _Table:
    """Rows of numbers in a file, in the form that Lightning's logger calls."""

    def __init__(self, file: Path, first_step: int) -> None:
        self.file, self.metrics = file, []
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_rows(file) if int(row["step"]) < first_step]
        self.keys = sorted(set().union(*kept))
        self.known = {(row["step"], *(k for k in self.keys if row[k])) for row in kept}
        if kept:
            self._write(kept)
        else:
            file.unlink(missing_ok=True)

    metrics: list[dict[str, Any]]

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a row, unless it is there: of a validation that is made again for its picture."""
        numbers = {k: v.item() if hasattr(v, "item") else v for k, v in metrics.items()}
        row = {**numbers, "step": step}
        if (str(step), *sorted(row)) not in self.known:
            self.metrics.append(row)

    def save(self) -> None:
        """Append the new rows to the file; with new columns the whole file is written again."""
        if not self.metrics:
            return
        keys = sorted({*self.keys}.union(*self.metrics))
        if keys == self.keys:
            with self.file.open("a", newline="") as opened:
                csv.DictWriter(opened, keys).writerows(self.metrics)
        else:
            self.keys = keys
            self._write([*read_rows(self.file), *self.metrics])
        self.metrics = []

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Write the whole file."""

        def write(partial: Path) -> None:
            with partial.open("w", newline="") as opened:
                writer = csv.DictWriter(opened, self.keys)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.file, write)


def read_rows(file: Path) -> Rows:
    """Return the rows of a table that have a step; empty without a file.

    A kill may leave half of a last line, which does not count.
    """
    if not file.is_file():
        return []
    text = file.read_text(errors="replace")
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in csv.DictReader(whole) if (row.get("step") or "").isdecimal()]


class LossPlot(Callback):
    """Plot ``<folder>/losses.png`` of the losses so far, made at every validation and at the end.

    It shows the losses of training and validation, the explained share where there is one, and the
    learning rate, over the steps of the whole training. The numbers are those of `MetricsTable`;
    without such a table there is no plot.

    Args:
        folder: Folder of the plot.
    """

    def __init__(self, folder: str | Path) -> None:
        self.file, self.plotted_step = Path(folder) / LOSSES, -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot after a validation."""
        if not trainer.sanity_checking:
            self._plot(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plot at the end, unless a validation has just done so."""
        if self.plotted_step != trainer.global_step:
            self._plot(trainer)

    def _plot(self, trainer: Trainer) -> None:
        """Plot the rows of the table, on the first process."""
        tables = [logger for logger in trainer.loggers if isinstance(logger, MetricsTable)]
        rows = read_rows(tables[0].file) if trainer.is_global_zero and tables else []
        self.plotted_step = trainer.global_step
        if rows:
            plot_losses(rows, self.file)


PANELS = {
    "loss": ("train/loss", "val/loss"),
    "explained share": ("train/explained", "val/explained"),
    "learning rate": ("train/learning_rate",),
}
"""Panels of the plot, and the columns that they show."""


def plot_losses(rows: Rows, file: Path) -> None:
    """Plot losses, explained share and learning rate over steps.

    Args:
        rows: Rows of a table, see `read_rows`.
        file: File of the picture.
    """
    from matplotlib.figure import Figure

    series = {
        name: [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]
        for names in PANELS.values()
        for name in names
    }
    panels = {title: [n for n in names if series[n]] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    figure = Figure(figsize=(7, 1 + 2 * len(panels)))  # a constrained layout takes twice the time
    every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, names) in zip(every, panels.items(), strict=True):
        for name in names:
            held_out = name.startswith("val/")
            style: dict[str, Any] = {"marker": "o", "ms": 4, "lw": 1.5} if held_out else {"lw": 1}
            label, color = ("validation", "C1") if held_out else ("training", "C0")
            if len(series[name]) == 1:
                style["marker"] = "o"
            axes.plot(*zip(*series[name], strict=True), label=label, color=color, **style)
        values = [value for name in names for _, value in series[name]]
        if title == "loss" and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        if title == "learning rate":
            axes.set_ylim(0, 1.1 * max(values) or 1)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    if len(next(iter(panels.values()))) > 1:
        every[0].legend(fontsize=9)
    every[-1].set_xlabel("steps")
    figure.align_ylabels()
    figure.subplots_adjust(left=0.13, right=0.98, top=0.98, bottom=0.5 / figure.get_figheight())
    save_figure(figure, file)


def show_picture(trainer: Trainer, name: str, file: Path) -> None:
    """Hand a picture of a validation to all loggers that take pictures.

    TensorBoard and Weights & Biases show it as an image under ``name``, MLflow keeps the file.

    Args:
        trainer: The trainer; its last step is that of the picture.
        name: Name of the picture.
        file: The picture, a PNG.
    """
    from numpy import asarray
    from PIL import Image

    step = trainer.global_step - 1  # Lightning counts the steps of logged numbers from 0
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            with Image.open(file, formats=["PNG"]) as image:
                pixels = asarray(image.convert("RGB"))
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(file)], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(str(logger.run_id), str(file), name)
