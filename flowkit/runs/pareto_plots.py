"""Table and plots of quality against cost for ``flowkit pareto``."""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from flowkit.metrics.pictures import save_figure
from flowkit.provenance import write_text
from flowkit.runs.tables import markdown, titled

Row = dict[str, Any]


def grouped(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows that differ only in their seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["name"], row["mode"], row["variant"], row["nfe"])
        groups.setdefault(key, []).append(row)
    return groups


def write_table(rows: list[Row], gains: list[Row], file: Path) -> None:
    """Write a Markdown table of means and standard deviations over seeds, and a table of gains."""
    columns = ("held_out_loss", "gflops", "seconds", "frechet_distance", "class_agreement")
    titles = (titled(name.replace("_", " "), name, rows) for name in columns)
    header = ["name", "features", "NFE", "seeds", *titles]
    lines = []
    for (name, mode, variant, nfe), group in grouped(rows).items():
        label = mode if variant is None else f"{mode}, {variant}"
        cells = [_mean([row[c] for row in group]) for c in columns]
        lines.append([name, label, f"{nfe:g}", str(len(group)), *cells])
    text = markdown(header, lines, names=(0, 1))
    if gains:
        header = ["run", "steps per segment", "predicted FLOPs", "counted FLOPs", "wall time"]
        lines = [
            [g["run"], str(g["steps_per_segment"])]
            + [f"{g[key]:.2f}" for key in ("predicted", "flops", "time")]
            for g in gains
        ]
        text += f"\nCost of full features divided by cost of FRA:\n\n{markdown(header, lines)}"
    write_text(file, text)


def _mean(values: list[float | None]) -> str:
    """Format mean and standard deviation; the result is empty if a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    mean = short(fmean(known))
    return mean if len(known) == 1 else f"{mean} ± {short(stdev(known))}"


def short(value: Any) -> str:
    """Format a float with four digits; format other values as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(rows: list[Row], file: Path) -> None:
    """Plot Fréchet distance and class agreement over FLOPs and over time, one line per mode."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    lines: dict[tuple[Any, ...], list[list[float]]] = {}
    qualities = [q for q in ("frechet_distance", "class_agreement") if rows[0][q] is not None]
    for (name, mode, variant, _), group in grouped(rows).items():
        means = [fmean(row[c] for row in group) for c in ("gflops", "seconds", *qualities)]
        lines.setdefault((name, mode, variant), []).append(means)
    figure = Figure(figsize=(10, 0.5 + 3.5 * len(qualities)), layout="constrained")
    panels = figure.subplots(len(qualities), 2, sharex="col", sharey="row", squeeze=False)
    for k, ((name, mode, variant), line) in enumerate(lines.items()):
        label = f"{name}, {mode}" + ("" if variant is None else f", {variant}")
        gflops, seconds, *values = zip(*sorted(line), strict=True)
        style = {"label": label, "color": f"C{k}", "ls": "-" if variant is None else ":"}
        for row, value in zip(panels, values, strict=True):
            row[0].plot(gflops, value, marker="o", ms=4, **style)
            row[1].plot([1e3 * s for s in seconds], value, marker="o", ms=4, **style)
    for row, quality in zip(panels, qualities, strict=True):
        title = quality.replace("_", " ").replace("frechet", "Fréchet")
        row[0].set_ylabel(titled(title, quality, rows))
        for axes in row:
            axes.grid(alpha=0.3)
            axes.set_xscale("log")
    panels[0][0].set_yscale("log")
    panels[0][0].yaxis.set_major_locator(MaxNLocator(6))
    for axes in panels[-1]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (panels[0][0].yaxis, *(axes.xaxis for axes in panels[-1])):
        axis.set_major_formatter("{x:g}")  # few ticks, as plain numbers
        axis.set_minor_formatter("")
    panels[-1][0].set_xlabel("GFLOPs per sample")
    panels[-1][1].set_xlabel("wall time per sample (ms)")
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, fontsize=8)
    save_figure(figure, file)
