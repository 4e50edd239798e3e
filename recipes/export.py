"""Write a run as a file that draws samples without flowkit.

flowkit export run=runs/quickstart format=torch               model.pt2, for torch.export.load
flowkit export run=runs/quickstart format=onnx sampler=euler steps=8 guidance=2
flowkit export run=runs/fashion format=diffusers sampler=euler steps=25
flowkit export run=runs/quickstart sampler=from_file sampler.grid.file=grid.json

The file holds the network, every step, guidance and the decoder. It is read again before it is
kept: 64 samples, in batches of 1, 7 and 64, must be those of the run. ONNX needs
pip install -c constraints.txt '.[export]' in the folder of flowkit.
"""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from flowkit.places import check_writable
from flowkit.runs import Run
from flowkit.runs import export as write
from flowkit.runs.known_data import place_of
from flowkit.runs.pushing import license_of_card


def export(cfg: DictConfig) -> dict[str, Any]:
    """Export as configured; print the largest difference from the run.

    Returns:
        The record of the export.
    """
    run = Run.load(cfg.run, cfg.weights, "cpu", cfg.guidance, cfg.trust, **place_of(cfg))
    folder = Path(cfg.out) if cfg.out else run.results / "exported" / cfg.format
    check_writable(folder, "out")
    if run.brings_starts:
        raise ValueError(
            "run must start from noise and class labels to be exported, got a run whose samples "
            "start from its data"
        )
    if cfg.steps is not None:
        if not isinstance(cfg.sampler.grid, int | None):
            raise ValueError(
                f"steps must be null for a sampler with times of its own, got {cfg.steps}"
            )
        cfg.sampler.grid = cfg.steps
    sampler = run.sampler(cfg.sampler)
    license = cfg.license or license_of_card(run)
    record = write(run.module, folder, cfg.format, sampler, run.guidance, run.classes, license)
    checks = record["checks"]
    print(
        f"checked   {checks['samples']} samples, batches of 1, 7 and 64: largest difference "
        f"{checks['largest difference']:.2g} (allowed {checks['tolerance']:.2g})\n"
        f"size      {record['bytes'] / 1e6:.2f} MB\n"
        f"export    {folder / record['file']}"
    )
    return record


@hydra.main(version_base="1.3", config_path="../conf", config_name="export")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit export``."""
    export(cfg)


if __name__ == "__main__":
    main()
