"""A run folder: its module, data, guidance, sampler and starts, and what is on record of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit import grids
from flowkit.blockwise import Blockwise, Drift, feature_drift
from flowkit.checks import check_at_least
from flowkit.data import SplitData
from flowkit.modules import FlowModule, SymmetricalFlowMatching, load_run
from flowkit.modules.checkpoints import read_config
from flowkit.modules.flow import Guidance
from flowkit.provenance import versions
from flowkit.runs.processes import say, usable_device
from flowkit.runs.records import weights
from flowkit.runs.splits import stored_data
from flowkit.runs.starts import Starts
from flowkit.sampling import ODESampler
from flowkit.velocity import Velocity


@dataclass(frozen=True)
class Run:
    """What ``flowkit train`` wrote, loaded to sample from.

    Attributes:
        folder: The run folder.
        config: The resolved configuration that it was trained with.
        module: The module, in ``eval`` mode.
        guidance: What the run is guided by, its own unless told otherwise.
    """

    folder: Path
    config: dict[str, Any]
    module: FlowModule
    guidance: Guidance = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        weights: str = "averaged",
        device: str | torch.device = "cpu",
        guidance: Guidance = None,
    ) -> "Run":
        """Load a run folder.

        Args:
            folder: What ``flowkit train`` wrote.
            weights: ``"averaged"``, where the run averaged any, or ``"raw"``.
            device: Where the module goes.
            guidance: A scale or a wrapper of velocities; None is the run's own scale, 1 is none.

        Raises:
            FileNotFoundError: If the folder is not a run or has no checkpoint yet.
            ValueError: If the device is not of this machine, the weights are of another kind, or
                the run cannot be guided.
        """
        place, config = usable_device(device), read_config(folder)
        module = load_run(folder, weights=weights).to(place)
        scale = config.get("guidance") if guidance is None else guidance
        module.guided(scale)  # refuses what the run was not trained for, before the work
        return cls(Path(folder), config, module, scale)

    @cached_property
    def data(self) -> SplitData:
        """The data that the run was trained on; of latents and pairs, what they were made of."""
        return stored_data(self.config["data"])

    @property
    def classes(self) -> int | None:
        """How many classes the network knows, None is none; ``data.class_names`` may name them."""
        return self.config["num_classes"]

    @property
    def brings_starts(self) -> bool:
        """Whether samples start from source samples or conditions that only the data bring."""
        return bool(self.config.get("needs_data"))

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.module.device

    @property
    def velocity(self) -> Velocity:
        """The guided velocity."""
        return self.module.guided(self.guidance)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one state.

        Raises:
            RuntimeError: If the run has not seen a batch.
        """
        if self.module.sample_shape is None:
            raise RuntimeError("run must have trained at least one step, got no sample shape")
        return self.module.sample_shape

    def starts(self, seed: int) -> Starts:
        """Source samples by their number, and conditions."""
        data = self.data if self.brings_starts else None
        return Starts(self.sample_shape, self.classes, seed, self.device, data)

    def sampler(self, node: DictConfig) -> ODESampler:
        """Build a sampler; a grid from a file that was made for something else is warned about."""
        sampler = instantiate(node)
        if OmegaConf.is_dict(node.grid) and (file := node.grid.get("file")):
            grids.load(file, self.made_with(sampler.method))
        return sampler

    # --- records ------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> dict[str, Any]:
        """Which weights these are: averaged or raw, their step and hash."""
        return weights(self.module)

    def made_with(self, method: str) -> dict[str, Any]:
        """What a grid or pairs depend on: weights, solver and guidance, of which 1 is none."""
        guidance = None if self.guidance == 1 else self.guidance
        return {"model_hash": self.weights["hash"], "method": method, "guidance": guidance}

    def describe(self, sampler: ODESampler) -> dict[str, Any]:
        """Return what a sample depends on besides weights and start."""
        return {
            "method": sampler.method,
            "grid": sampler.times.tolist(),
            "rtol": sampler.rtol,
            "atol": sampler.atol,
            "guidance": self.guidance,
        }

    def record(self, sampling: dict[str, Any], **parts: Any) -> dict[str, Any]:
        """Return a record of what was sampled: other parts, weights, how, on which data, by what.

        The data are named where there are metrics: what was only sampled may not need them.
        """
        record = {**parts, "weights": self.weights, "sampling": sampling}
        if "metrics" in parts and "data" not in parts:
            data = self.data
            record["data"] = {"name": type(data).__name__, "test": data.fingerprint("test")}
        return {**record, "versions": versions()}

    # --- blockwise runs -----------------------------------------------------------------------

    def reuse_features(self, mode: str | None, tolerance: float | None, seed: int) -> None:
        """Set the feature mode of a blockwise run, None is its own, and say it.

        With a tolerance the drift of its features is measured, said, and kept below.

        Raises:
            ValueError: If a feature mode is asked of a run without blocks, or of one that lacks
                the part for it; or a tolerance where no features are reused.
        """
        flow = self.module.velocity
        if isinstance(flow, Blockwise):
            flow.feature_mode = mode or flow.feature_mode
            say(f"features  {flow.feature_mode}")
        elif mode is not None:
            raise ValueError(f"feature_mode must be null for a run without blocks, got {mode}")
        if tolerance is None:
            return
        if not isinstance(flow, Blockwise) or flow.feature_mode == "full":
            raise ValueError(
                f"tolerance must be null where no features are reused, got {tolerance}; it "
                "goes with feature_mode=cached or fra of a blockwise run"
            )
        check_at_least(tolerance, 0, "tolerance")  # before the work
        drift = self.feature_drift(seed)
        flow.refresh_beyond(drift.rates(), tolerance)
        say(f"drift of reused features, mean and largest:\n{drift.table()}")

    def feature_drift(self, seed: int) -> Drift:
        """Drift of a blockwise run's features over 8 Euler steps a segment of 128 samples."""
        flow: Any = self.module.velocity
        x0, cond = self.starts(seed)(0, 128)
        grid = grids.blockwise(flow.edges, 8)
        return feature_drift(flow, x0, grid, cond, velocity=self.velocity)


def saved_grid(num_steps: int, folder: str) -> Tensor | None:
    """Return the grid of so many steps that `flowkit boss` wrote to a folder; None without one."""
    file = Path(folder) / f"grid-{num_steps}.json"
    return grids.load(file) if file.is_file() else None


def symmetrical(run: Run) -> SymmetricalFlowMatching:
    """Return the module of a run that can label images.

    Raises:
        TypeError: If it is of another method.
    """
    if not isinstance(run.module, SymmetricalFlowMatching):
        raise TypeError(
            "run must be of SymmetricalFlowMatching (module=symmetrical) to label images, "
            f"got {type(run.module).__name__}"
        )
    return run.module
