"""Evaluate a run at several scales of guidance, and plot what they trade.

flowkit sweep run=runs/latent
flowkit sweep run=runs/latent scales=[1,2,4] sampler=dopri5 num_samples=5000

All options of `flowkit evaluate` but `devices` and `num_nodes` are options here, since one process
measures. Each scale is an evaluation like any other, in a folder of its own; finished ones are kept
while weights and options are the same.
"""

import csv
import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from flowkit.recipes.evaluate import evaluate
from flowkit.runs.records import weights

# What real images reach: the column, and what it is of.
REAL = {
    "frechet_distance": ("floor", "training images"),
    "class_agreement": ("class_agreement_of_real", "test images"),
}


def sweep(cfg: DictConfig) -> list[dict[str, Any]]:
    """Evaluate as configured; writes ``sweep.csv`` and ``sweep.png``.

    Returns:
        A row per scale: ``guidance`` and the numbers of its evaluation.
    """
    run = Path(cfg.run)
    out = Path(cfg.out) if cfg.out else run / "sweep"
    found, rows = weights(run), []
    options = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    del options["scales"]
    options |= {"devices": 1, "num_nodes": 1}
    bar = tqdm(sorted(cfg.scales), desc="scales", disable=None)
    for scale in bar:
        bar.set_postfix_str(f"guidance {scale}")
        one = {"guidance": scale, "out": str(out / f"guidance-{scale}")}
        rows.append({"guidance": scale, **_evaluate({**options, **one}, found)})
        _write(rows, out)  # after every scale, so that a long sweep can be read while it grows
    for row in rows:
        print("  ".join(f"{name} {_short(row[name])}" for name in _shown(rows)))
    print(f"picture   {out / 'sweep.png'}\nnumbers   {out / 'sweep.csv'}")
    return rows


def _evaluate(options: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """The numbers of one scale, measured unless they have been."""
    folder = Path(options["out"])
    record = folder / "sweep.json"
    wanted = {"weights": found, "options": options}
    if not record.is_file() or json.loads(record.read_text()) != wanted:
        with redirect_stdout(io.StringIO()):
            evaluate(OmegaConf.create(options))
        record.write_text(json.dumps(wanted, indent=2) + "\n")
    measured = json.loads((folder / "metrics.json").read_text())
    metrics = measured["metrics"]
    return {
        **{k: v for k, v in metrics.items() if type(v) in (int, float)},
        "floor": metrics.get("floor", {}).get("frechet_distance"),
        "class_agreement_of_real": metrics.get("judge", {}).get("test_accuracy"),
        "network_rows_per_sample": measured["sampling"]["network_rows_per_sample"],
    }


def _shown(rows: list[dict[str, Any]]) -> list[str]:
    names = ("guidance", "frechet_distance", "class_agreement", "precision", "recall", "w2")
    return [name for name in names if name in rows[0]]


def _short(value: float) -> str:
    return f"{value:.4g}"


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    with (out / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    names = _shown(rows)[1:]
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot([row["guidance"] for row in rows], [row[name] for row in rows], "o-")
        column, label = REAL.get(name, (None, None))
        if column is not None:
            axes.axhline(rows[0][column], color="0.6", lw=1, label=label)
            axes.legend(fontsize=8)
        axes.set(title=name.replace("_", " "), xlabel="guidance")
        axes.grid(alpha=0.3)
    figure.savefig(out / "sweep.png", dpi=120)


@hydra.main(version_base="1.3", config_path="../conf", config_name="sweep")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit sweep``."""
    sweep(cfg)


if __name__ == "__main__":
    main()
