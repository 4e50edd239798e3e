"""Pictures of log-mel spectrograms."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from flowkit.audio.mel import LogMel, slaney_hertz
from flowkit.checks import check_at_least
from flowkit.metrics.pictures import save_figure

DECIBELS = 8.685889638  # of a log-mel, 20 / ln 10
RANGE = 80  # dB below the loudest value that still have a color


def save_spectrograms(
    panels: Sequence[tuple[str, Tensor]], file: str | Path, mel: LogMel, columns: int = 1
) -> Path:
    """Save log-mels as one picture: time to the right, frequency upwards, decibels as color.

    Decibels count from the loudest value of the first panel of a row, and in a single column from
    that of the first panel. So panels are compared with the recording they come from.

    Args:
        panels: Title and log-mel ``(n_mels, T)`` of each panel, row by row.
        file: The PNG file. Its folder is created if it does not exist.
        mel: The map that the log-mels belong to.
        columns: Panels in a row.

    Returns:
        The file.

    Raises:
        ValueError: If there are no panels, or ``columns`` is below 1.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    check_at_least(len(panels), 1, "number of panels")
    check_at_least(columns, 1, "columns")
    colors = ScalarMappable(Normalize(-RANGE, 0), "magma")
    decibels = [(title, DECIBELS * log_mel.detach().float().cpu()) for title, log_mel in panels]
    together = columns if columns > 1 else len(decibels)
    tops = [float(decibels[k // together * together][1].max()) for k in range(len(decibels))]
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.0, 3.2 * columns), 0.6 + 1.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    hertz = slaney_hertz(mel.n_mels, mel.fmin, mel.fmax)[1:-1]
    wanted = [f for f in (250, 500, 1000, 2000, 4000) if hertz[0] < f < hertz[-1]]
    ticks = [int((hertz - f).abs().argmin()) for f in wanted]
    for k, place in enumerate(axes.flat):
        if k >= len(decibels):
            place.set_visible(False)
            continue
        title, values = decibels[k]
        seconds = values.shape[1] * mel.hop / mel.rate
        place.imshow(
            values.numpy() - tops[k],
            origin="lower",
            aspect="auto",
            cmap=colors.cmap,
            norm=colors.norm,
            extent=(0, seconds, -0.5, mel.n_mels - 0.5),
            interpolation="nearest",
        )
        place.set_title(title, fontsize=9)
        place.set_yticks(ticks, [f"{f / 1000:g}" for f in wanted])
        place.tick_params(labelsize=8)
        if k % columns == 0:
            place.set_ylabel("kHz", fontsize=8)
        if k + columns >= len(decibels):
            place.set_xlabel("seconds", fontsize=8)
    figure.colorbar(colors, ax=list(axes.flat), label="dB", aspect=30, pad=0.01)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, file)
    return file
