"""`Run`: a run folder with its module, data, guidance, sampler, starts and records."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit import grids
from flowkit.blockwise import Blockwise, Drift, feature_drift
from flowkit.checks import check_at_least, usable_device
from flowkit.data import SplitData
from flowkit.hub import folder_of, results_of
from flowkit.modules import FlowModule, load_run
from flowkit.modules.checkpoints import read_config
from flowkit.modules.flow import Guidance
from flowkit.provenance import versions
from flowkit.rules import did_you_mean
from flowkit.runs.known_data import Places, read_data_record
from flowkit.runs.processes import say
from flowkit.runs.records import weights
from flowkit.runs.splits import placed, stored_data
from flowkit.runs.starts import Starts
from flowkit.sampling import ADAPTIVE, MeanVelocity, ODESampler, Sampler, SDESampler
from flowkit.types import Cond
from flowkit.velocity import Velocity


@dataclass(frozen=True, eq=False)
class Run:
    """Output of ``flowkit train``, loaded to sample from.

    An example::

        run = Run.load("runs/quickstart")
        images = run.module.sample(4, cond=torch.tensor([3, 3, 8, 8]), guidance=run.guidance)
        print(run.classes, run.weights, len(run.data.test))

    Attributes:
        folder: The folder of the run or of the shared model.
        config: The resolved configuration of the training.
        module: The module, in ``eval`` mode.
        guidance: A guidance scale, a wrapper of velocities, or None for no guidance.
        trust: Names of classes that the configuration may name beside those that flowkit lists.
        data_root: New place of the data, if they have moved.
        data_changed: ``"refuse"`` or ``"accept"`` data that are not those of the training.
        place: The folder, or the name of a shared model; None is the folder.
    """

    folder: Path
    config: dict[str, Any] = field(repr=False)
    module: FlowModule = field(repr=False)
    guidance: Guidance = None
    trust: Sequence[str] = field(default=(), repr=False)
    data_root: str | Path | None = None
    data_changed: str = "refuse"
    place: str | Path | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        weights: str = "averaged",
        device: str | torch.device = "cpu",
        guidance: Guidance = None,
        trust: Sequence[str] = (),
        data_root: Places = None,
        data_changed: str = "refuse",
    ) -> "Run":
        """Load a run or a shared model.

        Args:
            folder: Folder that ``flowkit train`` or ``flowkit push`` wrote, ``hub:owner/name`` or
                ``flowkit:name``; see `flowkit.modules.load_run`.
            weights: ``"averaged"`` or ``"raw"``; see `flowkit.modules.load_run`.
            device: Device of the module.
            guidance: A scale or a wrapper of velocities. None takes the scale of the run's
                configuration, 1 is no guidance.
            trust: Dotted names of your own classes in the run; see `flowkit.modules.load_run`.
            data_root: New place of the data, if they have moved, or places by their options, such
                as ``{"data.root": "clips", "data.query.path": "encoder"}``.
            data_changed: ``"refuse"`` or ``"accept"`` data that are not those of the training.

        Raises:
            FileNotFoundError: If the folder is not a run, or has no checkpoint yet.
            ValueError: If this machine has no such device, if ``weights`` is another word, if the
                run's training does not allow the guidance scale, or if the run names a class that
                is neither listed nor trusted.
        """
        device, place, folder = usable_device(device), folder, folder_of(folder)
        config, root = placed(read_config(folder), data_root)
        module = load_run(folder, weights=weights, trust=trust).to(device)
        scale = config.get("guidance") if guidance is None else guidance
        module.guided(scale)  # refuses a wrong scale before the work
        return cls(folder, config, module, scale, trust, root, data_changed, place)

    @property
    def results(self) -> Path:
        """Folder for results: that of the run, but for shared models one of ``runs``."""
        return results_of(self.place or self.folder)

    @cached_property
    def data(self) -> SplitData:
        """The run's data with test split. For latents and pairs: the images they were made of.

        Raises:
            ValueError: If the data are not those of the training, or have other classes.
        """
        found = stored_data(
            self.config["data"], self.trust, self.folder, self.data_root, self.data_changed
        )
        count = found.num_classes
        if self.num_classes is not None and count is not None and count != self.num_classes:
            raise ValueError(
                f"data must have the {self.num_classes} classes of the run, got {count}: "
                f"{', '.join(map(str, found.class_names or range(count)))}"
            )
        return found

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the network; None for a run without classes."""
        return self.config["num_classes"]

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, numbers where the data have no names; None without classes."""
        if self.num_classes is None:
            return None
        record = read_data_record(self.folder)
        names = self.data.class_names if record is None else record["classes"]
        return names or [str(label) for label in range(self.num_classes)]

    def class_number(self, label: Any, name: str = "labels") -> Any:
        """Return the number of a class that may be given by its name; anything else as it is.

        Raises:
            ValueError: If the run has no class of this name.
        """
        if not isinstance(label, str):
            return label
        classes = self.classes or []
        if label not in classes:
            known = f"; classes are {', '.join(classes[:20])}" if classes else "; there are none"
            raise ValueError(
                f"{name} must be the number or name of a class of the run, got {label}"
                f"{did_you_mean(label, classes, known)}"
            )
        return classes.index(label)

    def names_of(self, cond: Cond, count: int) -> list[str] | None:
        """Return the class names of the first samples, for a picture; None without classes."""
        names, labels = self.module.class_names, cond
        if names is None or not isinstance(labels, Tensor) or labels.ndim != 1:
            return None
        return [names[int(label)] for label in labels[:count]]

    @property
    def brings_starts(self) -> bool:
        """True if samples start from source samples or conditions of the data."""
        return bool(self.config.get("needs_data"))

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        return self.module.device

    @property
    def velocity(self) -> Velocity:
        """Velocity of the module under the run's guidance."""
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

    def starts(self, seed: int, seeding: int = 2) -> Starts:
        """Return source samples by their number, and conditions; see `Starts`."""
        data = self.data if self.brings_starts else None
        return Starts(self.sample_shape, self.num_classes, seed, self.device, data, seeding)

    def sampler(self, node: DictConfig, *, needs_path: bool = False) -> Sampler:
        """Build a sampler. A grid file of another model, solver or guidance gives a warning.

        A stochastic sampler gets the path of the run.

        Args:
            node: Configuration of the sampler.
            needs_path: True if the states at the times of the grid are used.

        Raises:
            TypeError: If the sampler is stochastic, and the score of the run does not follow from
                its velocity.
            ValueError: If the method would ignore an option, see `build_sampler`.
        """
        follows_steps = isinstance(self.module.velocity, Blockwise)
        sampler = build_sampler(node, needs_path or follows_steps, self.module)
        if isinstance(sampler, SDESampler):
            sampler = self.module.with_score(sampler)
            if not self.starts(0).are_noise:
                raise TypeError(
                    "sampler must be an ODESampler (such as sampler=heun) for a run whose data "
                    "bring their source samples, got SDESampler"
                )
        if OmegaConf.is_dict(node.grid) and (file := node.grid.get("file")):
            grids.load(file, self.made_with(sampler.method))
        return sampler

    def ode_sampler(self, node: DictConfig) -> ODESampler:
        """Build a sampler that can also run a flow backwards.

        Raises:
            TypeError: If the sampler is stochastic.
        """
        if not isinstance(build_sampler(node, True, self.module), ODESampler):
            raise TypeError(
                "sampler must be an ODESampler (such as sampler=heun) to run a flow from data to "
                "noise, too, got SDESampler"
            )
        return cast(ODESampler, self.sampler(node))

    # --- records ------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> dict[str, Any]:
        """Record of the weights: kind (averaged or raw), step and hash."""
        return weights(self.module)

    def made_with(self, method: str) -> dict[str, Any]:
        """Return the record of a grid or pairs: weights, solver and guidance, None for 1."""
        guidance = None if self.guidance == 1 else _recorded(self.guidance)
        return {"model_hash": self.weights["hash"], "method": method, "guidance": guidance}

    def describe(self, sampler: Sampler) -> dict[str, Any]:
        """Return the settings of sampling: solver, grid, tolerances or diffusion, and guidance."""
        if isinstance(sampler, SDESampler):
            own = {"diffusion": str(sampler.diffusion), "scale": sampler.scale}
        else:
            own = {"rtol": sampler.rtol, "atol": sampler.atol}
        settings = {"method": sampler.method, "grid": sampler.times.tolist(), **own}
        if isinstance(self.module.velocity, MeanVelocity):
            means = isinstance(sampler, ODESampler) and sampler.method == "euler"
            settings["velocity"] = "mean over each step" if means else "instantaneous"
        return {**settings, "guidance": _recorded(self.guidance)}

    def record(self, sampling: dict[str, Any], **parts: Any) -> dict[str, Any]:
        """Return a record: other parts, weights, sampling, data and versions.

        The data are recorded only beside metrics, since sampling alone may not need the data.

        Args:
            sampling: Settings of sampling, see `describe`.
            parts: Other entries, for example ``metrics``.
        """
        record = {**parts, "weights": self.weights, "sampling": sampling}
        if "metrics" in parts and "data" not in parts:
            data = self.data
            record["data"] = {"name": type(data).__name__, "test": data.fingerprint("test")}
            if data.changes is not None:
                record["data"]["changes"] = data.changes
        return {**record, "versions": versions()}

    # --- blockwise runs -----------------------------------------------------------------------

    def reuse_features(
        self, mode: str | None, tolerance: float | None, seed: int, seeding: int = 2
    ) -> None:
        """Set the feature mode of a blockwise run, and print it.

        With a tolerance, the drift of reused features is measured and printed. The trunk then runs
        again where this measurement predicts a drift above the tolerance.

        Args:
            mode: ``"full"``, ``"cached"`` or ``"fra"``; None keeps the mode of the run.
            tolerance: Largest predicted drift of reused features, at least 0; None sets no limit.
            seed: Seed of the samples that measure the drift.
            seeding: Version of their seeds, see `flowkit.sampling.sample_seeds`.

        Raises:
            ValueError: If a feature mode is given for a run without blocks or without the part
                that the mode needs, or if a tolerance is given but no features are reused.
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
                f"tolerance must be null if no features are reused, got {tolerance}; use it with "
                "feature_mode=cached or fra of a blockwise run"
            )
        check_at_least(tolerance, 0, "tolerance")  # before the work
        drift = self.feature_drift(seed, seeding)
        flow.refresh_beyond(drift.pairs, tolerance)
        say(f"drift of reused features, mean and maximum:\n{drift.table()}")

    def feature_drift(self, seed: int, seeding: int = 2) -> Drift:
        """Return the drift of features in 8 Euler steps per segment, over 128 samples."""
        flow: Any = self.module.velocity
        x0, cond = self.starts(seed, seeding)(0, 128)
        grid = grids.blockwise(flow.edges, 8)
        return feature_drift(flow, x0, grid, cond, velocity=self.velocity)


def own_sampler(
    module: FlowModule, grid: Any = None, method: str | None = None, **tolerances: float
) -> ODESampler:
    """Return the default sampler of a module, with another grid or method if given."""
    own = module.default_sampler
    return ODESampler(own.grid if grid is None else grid, method or own.method, **tolerances)


def build_sampler(
    node: DictConfig, stops: bool = False, module: FlowModule | None = None
) -> Sampler:
    """Build a sampler whose method uses all of its options.

    Args:
        node: Configuration of the sampler.
        stops: True if an adaptive method stops at all times of the grid.
        module: The module whose own sampler ``sampler=auto`` stands for.

    Raises:
        TypeError: If the sampler is that of a module, and there is none.
        ValueError: If the grid has times between its ends, where an adaptive method does not stop,
            or if tolerances are given for a method with fixed steps.
    """
    sampler = instantiate(node)
    if isinstance(sampler, partial):
        if module is None:
            raise TypeError(
                "sampler must be another than auto, which is for trained runs, got auto"
            )
        sampler = sampler(module)
    method = sampler.method
    if method in ADAPTIVE and len(sampler.times) > 2 and not stops:
        grid = f"{len(sampler.times) - 1} steps"
        raise ValueError(
            f"sampler.grid must be 1 for {method}, which chooses its own steps, got {grid}; "
            "set sampler.rtol and sampler.atol"
        )
    for name in {"rtol", "atol"} & set(node):
        if method not in ADAPTIVE:
            raise ValueError(
                f"sampler.{name} must be absent for {method}, whose steps are those of the grid, "
                f"got {node[name]}; choose sampler={method}"
            )
    return sampler


def _recorded(guidance: Guidance) -> float | str | None:
    """Return guidance as a record can hold it: a wrapper of velocities by its description."""
    return repr(guidance) if callable(guidance) else guidance


def saved_grid(num_steps: int, folder: str) -> Tensor | None:
    """Return the grid of ``num_steps`` steps that ``flowkit boss`` wrote to a folder.

    Without such a file the result is None. The main grid of a search is ``grid.json``.
    """
    for file in (Path(folder) / f"grid-{num_steps}.json", Path(folder) / "grid.json"):
        if file.is_file() and len(grid := grids.load(file)) == num_steps + 1:
            return grid
    return None


def own_grid(num_steps: int, run: str) -> Tensor | None:
    """Return the grid of ``num_steps`` steps that is a run's own, or None.

    It is a grid of ``flowkit boss run=...``, one in a shared model, or one that the run was
    straightened onto: a grid of its pairs, or the times of its module.
    """
    config = read_config(run)
    data, taught = config["data"] or {}, config["module"].get("grid")
    for folder in (results_of(run) / "boss", folder_of(run)):
        if (found := saved_grid(num_steps, str(folder))) is not None:
            return found
    if data.get("_target_") == "flowkit.data.Pairs":
        return saved_grid(num_steps, data["root"])
    if isinstance(taught, list) and len(taught) == num_steps + 1:
        return torch.tensor(taught, dtype=torch.float64)
    return None
