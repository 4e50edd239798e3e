"""Tabulate the evaluations of several runs, and mark what cannot be compared.

flowkit table runs/a runs/b
flowkit table runs/a runs/b/metrics-1.json metrics=[frechet_distance,precision] out=runs/table

It reads the ``metrics.json`` of each run. With ``out=`` it writes ``table.md`` and ``table.json``.
"""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from flowkit.checks import check_at_least
from flowkit.places import check_writable
from flowkit.provenance import write_text
from flowkit.rules import did_you_mean
from flowkit.runs.metrics_table import Row, read_records, rows_of
from flowkit.runs.metrics_table import table as in_markdown
from flowkit.runs.records import recording


def table(cfg: DictConfig) -> list[Row]:
    """Tabulate as configured; print the table.

    Returns:
        A row for each run, see `flowkit.runs.metrics_table.rows_of`.
    """
    check_at_least(len(cfg.runs), 1, "the number of runs")
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None:
        check_writable(out, "out")
    rows = rows_of(read_records(list(cfg.runs)))
    if cfg.metrics is not None:
        _select(rows, list(cfg.metrics))
    text = in_markdown(rows)
    print(text, end="")
    if out is not None:
        files = [out / "table.json", out / "table.md"]
        with recording({"rows": rows}, files):
            write_text(files[1], text)
        print(f"table     {files[1]}\nrecord    {files[0]}")
    return rows


def _select(rows: list[Row], chosen: list[str]) -> None:
    """Keep the chosen numbers, in their order.

    Raises:
        ValueError: If no run has a number of this name.
    """
    known = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    for name in chosen:
        if name not in known:
            fix = did_you_mean(name, known, f"; there are {', '.join(known)}")
            raise ValueError(f"metrics must be numbers of a run, got {name}{fix}")
    for row in rows:
        own = row["metrics"]
        row["metrics"] = {name: own[name] for name in chosen if name in own}


@hydra.main(version_base="1.3", config_path="../conf", config_name="table")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit table``."""
    table(cfg)


if __name__ == "__main__":
    main()
