"""Table and plots of the grids that ``flowkit boss`` compares."""

from pathlib import Path
from typing import Any

from torch import Tensor

from flowkit.metrics.pictures import save_figure
from flowkit.runs.tables import markdown, titled

Row = dict[str, Any]


def table_of(rows: list[Row]) -> str:
    """Return a Markdown table: one line per grid and NFE, the recommended grid in bold."""
    distances = any("frechet_distance" in row for row in rows)
    first = rows[0]["grid"]
    header, lines = ["NFE", "grid", "end-point error", f"of {first}"], []
    errors = {row["nfe"]: row["error"] for row in rows if row["grid"] == first}
    for row in rows:
        name = f"**{row['grid']}**" if row["recommended"] else row["grid"]
        ratio = f"{row['error'] / errors[row['nfe']]:.3f}" if row["nfe"] in errors else ""
        line = [str(row["nfe"]), name, f"{row['error']:.4f}", ratio]
        if distances:
            line.append(f"{row['frechet_distance']:.2f}" if "frechet_distance" in row else "")
        lines.append(line)
    if distances:
        header.append(titled("Fréchet distance", "frechet_distance", rows))
    return markdown(header, lines, names=[1])


def plot(candidates: dict[str, Tensor], winner: str, table: list[Row], file: Path) -> None:
    """Plot the step sizes of the candidate grids, and the error of each grid over its NFE.

    Args:
        candidates: Grids of one number of steps, by name.
        winner: Name of the recommended grid.
        table: Rows of all grids and numbers of evaluations.
        file: File of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullLocator

    columns = {"error": "end-point error (RMS per element)"}
    if any("frechet_distance" in row for row in table):
        columns["frechet_distance"] = titled("Fréchet distance", "frechet_distance", table)
    figure = Figure(figsize=(4.6 * (1 + len(columns)), 3.6), layout="constrained")
    steps, *panels = figure.subplots(1, 1 + len(columns))
    colors = {
        "uniform": "C7",
        "baseline": "C7",
        "bellman": "C0",
        "endpoint": "C3",
        "adaptive": "C2",
    }
    longest = max(grid.diff().max().item() for grid in candidates.values())
    for name, grid in candidates.items():
        label = f"{name} (recommended)" if name == winner else name
        style = {"color": colors[name], "label": label, "lw": 1.8, "baseline": None}
        steps.stairs(grid.diff().tolist(), grid.tolist(), **style)
    title = f"step sizes of {len(candidates[winner]) - 1} steps"
    steps.set(xlabel="t", ylabel="step size", title=title, ylim=(0, 1.4 * longest))
    for axes, (key, label) in zip(panels, columns.items(), strict=True):
        nfe = "frechet_nfe" if key == "frechet_distance" else "nfe"
        for name, color in colors.items():
            rows = sorted((r[nfe], r[key]) for r in table if r["grid"] == name and key in r)
            if rows:
                style = "o" if name == "adaptive" else "o-"
                axes.loglog(*zip(*rows, strict=True), style, color=color, label=name, ms=4, lw=1.2)
        ticks: list[int] = []
        for count in sorted({row["nfe"] for row in table}):  # so that labels do not overlap
            if not ticks or count >= 1.2 * ticks[-1]:
                ticks.append(count)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.set(xlabel="evaluations (NFE)", title=label)
        axes.grid(alpha=0.3)
    for axes in (steps, *panels):
        axes.legend(fontsize=8)
    save_figure(figure, file, 110)
