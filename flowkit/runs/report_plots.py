"""Plots of ``flowkit report``: distance over cost, and metrics over guidance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowkit.metrics.pictures import save_figure

Row = dict[str, Any]


def lines_of(rows: list[Row], *names: str) -> dict[str, list[Row]]:
    """Group rows with equal values in the columns ``names``, by a label of these values.

    The label leaves out columns in which all rows agree.
    """
    differing = [name for name in names if len({str(row[name]) for row in rows}) > 1]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        words = {"nfe": f"{row['nfe']} NFE", "guidance": f"guidance {row['guidance']}"}
        label = ", ".join(words.get(name, str(row[name])) for name in differing or names[:1])
        lines.setdefault(label, []).append(row)
    return lines


def plot(rows: list[Row], measure: str, floor: float, file: Path) -> None:
    """Plot distance over evaluations and over time.

    Each solver and guidance scale has a color, each grid a line style.

    Args:
        rows: Measured rows.
        measure: Name of the distance.
        floor: Distance of training samples to test samples.
        file: File of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colored = list(dict.fromkeys((row["solver"], row["guidance"]) for row in rows))
    names = list(dict.fromkeys(row["grid"] for row in rows))
    styles = ["-", "--", ":", "-."]
    labels = ("evaluations of the network", "milliseconds per sample")
    for axes, key, label in zip(panels, ("nfe", "milliseconds"), labels, strict=True):
        for name, mine in lines_of(rows, "solver", "grid", "guidance").items():
            color = colored.index((mine[0]["solver"], mine[0]["guidance"]))
            style = styles[names.index(mine[0]["grid"]) % 4]
            line = {"color": f"C{color}", "linestyle": style, "marker": "o", "ms": 4}
            axes.plot(*([row[k] for row in mine] for k in (key, "distance")), label=name, **line)
        axes.axhline(floor, color="0.5", lw=1, label="training samples")
        axes.set(xscale="log", yscale="log", xlabel=label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    counts = sorted({row["nfe"] for row in rows})
    panels[0].set_xticks(counts, map(str, counts))
    panels[0].minorticks_off()
    panels[0].set_ylabel(measure)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, file)


def plot_guidance(rows: list[Row], measure: str, real: Mapping[str, float], file: Path) -> None:
    """Plot each metric over the guidance scale, beside the metric of real samples.

    Args:
        rows: Measured rows.
        measure: Name of the distance.
        real: Values of real samples, by metric.
        file: File of the picture.
    """
    from matplotlib.figure import Figure

    names = [n for n in ("distance", "class_agreement", "precision", "recall") if n in rows[0]]
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        lines = lines_of(rows, "solver", "grid", "nfe")
        for label, mine in lines.items():
            mine = sorted(mine, key=lambda row: row["guidance"])
            values = ([row[key] for row in mine] for key in ("guidance", name))
            axes.plot(*values, "o-", ms=4, label=label if len(lines) > 1 else None)
        whose = "test samples" if name == "class_agreement" else "training samples"
        axes.axhline(real[name], color="0.6", lw=1, label=whose)
        title = measure if name == "distance" else name.replace("_", " ")
        axes.set(title=title, xlabel="guidance")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save_figure(figure, file)
