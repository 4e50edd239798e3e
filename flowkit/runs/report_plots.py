"""Tables and plots of ``flowkit report``: quality over cost, and metrics over guidance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowkit.metrics.pictures import save_figure
from flowkit.runs.tables import markdown, titled
from flowkit.runs.training_cost import Cost, machines_of, own_cost, total_cost

Row = dict[str, Any]
CURVE = ("name", "solver", "grid", "guidance")
"""The columns in which the rows of a curve agree."""
WORDS = {"nfe": "{} NFE", "guidance": "guidance {}"}


def curves(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows with equal values in the columns ``names``."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def lines_of(rows: list[Row], *names: str) -> dict[str, list[Row]]:
    """Group the rows of one or several runs by the columns ``names``, under a label.

    The label is the name of the run, if there are several, and the columns in which the rows of
    the run differ.

    >>> rows = [{"name": n, "grid": g} for n, g in (("a", "uniform"), ("a", "own"), ("b", "own"))]
    >>> list(lines_of(rows, "grid"))
    ['a, uniform', 'a, own', 'b']
    """
    runs, lines = curves(rows, "name"), {}
    for (run,), mine in runs.items():
        differing = [name for name in names if len(curves(mine, name)) > 1]
        for values, line in curves(mine, *names).items():
            given = dict(zip(names, values, strict=True))
            told = [WORDS.get(name, "{}").format(given[name]) for name in differing]
            if len(runs) > 1 or not told:
                told.insert(0, run)
            lines[", ".join(told)] = line
    return lines


# --- tables -----------------------------------------------------------------------------------


def tables(
    rows: list[Row], measure: str, real: Mapping[str, float], runs: Sequence[Mapping[str, Any]]
) -> str:
    """Return the text of ``report.md``: quality by evaluations, cost of training, and all cells.

    Args:
        rows: Measured rows.
        measure: Name of the distance.
        real: Values of real samples, by metric.
        runs: Records of the runs.
    """
    agreement = " (class agreement)" if "class_agreement" in rows[0] else ""
    measure = titled(measure, "distance", rows)
    of_real = f"{real['distance']:.3f}"
    if agreement:
        of_real += f"; class agreement of the test split: {real['class_agreement']:.3f}"
    return (
        f"{measure}{agreement} by evaluations of the network (NFE):\n\n{_quality(rows, runs)}\n"
        f"Floor, equally many training samples: {of_real}\n"
        f"Training: seconds, in brackets those of processors; {_machines(runs)}\n\n"
        f"All cells:\n\n{_cells(rows, measure)}"
    )


def _quality(rows: list[Row], runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a line per curve, and a column per number of evaluations."""
    counts = sorted({row["nfe"] for row in rows})
    learnt = {run["name"]: run["learnt_guidance"] for run in runs}
    costs = {run["name"]: run["cost"] for run in runs}
    guided = any(row["guidance"] is not None for row in rows) or any(learnt.values())
    lines = []
    for (name, solver, grid, guidance), line in curves(rows, *CURVE).items():
        scale = "" if guidance is None else f"{guidance:g}"
        scale = scale if learnt[name] is None else f"{learnt[name]:g}, learnt"
        found = {row["nfe"]: _number(row) for row in line}
        cells = [found.get(count, "") for count in counts]
        used = ", ".join(f"{row['network_rows_per_sample']:g}" for row in line)
        words = [name, solver, grid, *([scale] if guided else [])]
        lines.append([*words, *cells, used, *_costs(costs[name])])
    header = ["curve", "solver", "grid", *(["guidance"] if guided else [])]
    counted = [f"NFE {count}" for count in counts]
    cost = ["network rows per sample", "training", "training, with its teacher"]
    titles = [*header, *counted, *cost]
    return markdown(titles, lines, range(len(header)))


def _number(row: Row) -> str:
    """Return the distance of a row, and its class agreement if it has one."""
    agreement = f" ({row['class_agreement']:.2f})" if "class_agreement" in row else ""
    return f"{row['distance']:.4g}{agreement}"


def _costs(record: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the cost of a training, and that with the runs and pairs it learnt from, in words."""
    if record is None:
        return _seconds(None), _seconds(None)
    return _seconds(own_cost(record)), _seconds(total_cost(record))


def _seconds(cost: Cost | None) -> str:
    """Return a cost in words."""
    return "unknown" if cost is None else f"{cost['seconds']:.4g} ({cost['processor_seconds']:.4g})"


def _machines(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the machines of the trainings in words, by run if they differ."""
    words = {run["name"]: machines_of(run["cost"]) for run in runs if run["cost"]}
    if len(set(words.values())) < 2:
        return next(iter(words.values()), "not recorded")
    return "; ".join(f"{name} on {machine}" for name, machine in words.items())


def _cells(rows: list[Row], measure: str) -> str:
    """Return a line per cell, with the columns that have numbers and differ."""
    several = [name for name in ("name", "guidance") if len(curves(rows, name)) > 1]
    words = [name for name in CURVE if name in ("solver", "grid", *several)]
    more = [name for name in ("class_agreement", "precision", "recall") if name in rows[0]]
    lines = []
    for row in rows:
        numbers = [f"{row[name]:.3f}" for name in ("distance", *more)]
        cost = [f"{row['network_rows_per_sample']:g}", f"{row['milliseconds']:.2f}"]
        told = [str(row[name]) for name in words]
        lines.append([*told, str(row["steps"]), str(row["nfe"]), *numbers, *cost])
    titles = [titled(name.replace("_", " "), name, rows) for name in more]
    header = [*words, "steps", "NFE", measure, *titles, "rows per sample", "ms per sample"]
    return markdown(header, lines, range(len(words)))


# --- plots ------------------------------------------------------------------------------------


def plot(rows: list[Row], measure: str, floor: float, file: Path) -> None:
    """Plot distance over evaluations and over network rows per sample.

    Each curve has a color, each grid a line style.

    Args:
        rows: Measured rows.
        measure: Name of the distance.
        floor: Distance of training samples to test samples.
        file: File of the picture.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lines = lines_of(rows, "solver", "grid", "guidance")
    palette = colormaps["tab10" if len(lines) <= 10 else "tab20"]
    names = list(dict.fromkeys(row["grid"] for row in rows))
    labels = {
        "nfe": "evaluations of the network (NFE)",
        "network_rows_per_sample": "network rows per sample",
    }
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for k, (name, mine) in enumerate(lines.items()):
            style = ["-", "--", ":", "-."][names.index(mine[0]["grid"]) % 4]
            line = {"color": palette(k % palette.N), "linestyle": style, "marker": "o", "ms": 4}
            mine = sorted(mine, key=lambda row: row[key])
            axes.plot(*([row[k] for row in mine] for k in (key, "distance")), label=name, **line)
        axes.axhline(floor, color="0.4", lw=1, ls="--", label="floor: training samples")
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        counts = _apart(sorted({row[key] for row in rows}))
        axes.set_xticks(counts, [f"{count:g}" for count in counts])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(titled(measure, "distance", rows))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    save_figure(figure, file)


def _apart(counts: list[float]) -> list[float]:
    """Return the counts whose labels do not overlap on a logarithmic axis.

    >>> _apart([1, 2, 4, 24, 25, 50])
    [1, 2, 4, 24, 50]
    """
    kept = counts[:1]
    for count in counts[1:]:
        if count >= 1.2 * kept[-1]:
            kept.append(count)
    return kept


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
        axes.set(title=titled(title, name, rows), xlabel="guidance")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    save_figure(figure, file)
