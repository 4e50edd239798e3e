"""A run: its module, ready to sample."""

from typing import Any

import torch
from omegaconf import DictConfig

from flowkit import grids
from flowkit.blockwise import Blockwise, Drift, feature_drift
from flowkit.checks import check_at_least
from flowkit.modules import FlowModule, load_run
from flowkit.modules.checkpoints import read_config
from flowkit.modules.flow import Guidance
from flowkit.runs.parts import say
from flowkit.runs.starts import Starts


def loaded(cfg: DictConfig, device: torch.device, guidance: Guidance = None) -> FlowModule:
    """Load a run; a blockwise one samples in the feature mode asked for, or its own, and says so.

    With a tolerance the drift of its features is measured, said, and kept below.

    Raises:
        ValueError: If a feature mode is asked of a run without blocks, or of one that lacks the
            part for it; or a tolerance where no features are reused.
    """
    module = load_run(cfg.run).to(device)
    flow = module.velocity
    if isinstance(flow, Blockwise):
        flow.feature_mode = cfg.feature_mode or flow.feature_mode
        say(f"features  {flow.feature_mode}")
    elif cfg.feature_mode is not None:
        raise ValueError(
            f"feature_mode must be null for a run without blocks, got {cfg.feature_mode}"
        )
    if cfg.tolerance is not None:
        if not isinstance(flow, Blockwise) or flow.feature_mode == "full":
            raise ValueError(
                f"tolerance must be null where no features are reused, got {cfg.tolerance}; it "
                "goes with feature_mode=cached or fra of a blockwise run"
            )
        check_at_least(cfg.tolerance, 0, "tolerance")  # before the work
        drift = measure_drift(module, read_config(cfg.run), guidance, cfg.seed)
        flow.refresh_beyond(drift.rates(), cfg.tolerance)
        say(f"drift of reused features, mean and largest:\n{drift.table()}")
    return module


def measure_drift(
    module: FlowModule, trained: dict[str, Any], guidance: Guidance, seed: int
) -> Drift:
    """Drift of a blockwise run's features over 8 Euler steps a segment of 128 samples."""
    flow: Any = module.velocity
    x0, cond = Starts(module, trained, seed, str(module.device))(0, 128)
    grid = grids.blockwise(flow.edges, 8)
    return feature_drift(flow, x0, grid, cond, velocity=module.guided(guidance))
