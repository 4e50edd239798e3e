"""Models of the search for a grid: runs and diffusers pipelines with one interface."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from tqdm import tqdm

from flowkit import grids
from flowkit.modules import Regression
from flowkit.provenance import write_json
from flowkit.runs.editing import PipelineFlow
from flowkit.runs.known_data import place_of
from flowkit.runs.run import Run
from flowkit.sampling import sample_seeds, seeded_noise
from flowkit.types import Cond, take
from flowkit.velocity import BoundVelocity, Velocity, bind


class RunModel:
    """Velocity, starts and grids of a run.

    Raises:
        ValueError: If the run is a regression.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.run = Run.load(
            cfg.run, cfg.weights, cfg.device, cfg.guidance, cfg.trust, **place_of(cfg)
        )
        if isinstance(self.run.module, Regression):
            raise ValueError(
                f"run must be a flow to have a grid of times, got a regression, {cfg.run}; it "
                "takes one step"
            )
        self.folder, self.velocity = self.run.results, self.run.velocity
        self.starts = self.run.starts(cfg.seed, cfg.seeding)
        self.guided = self.velocity is not self.run.module.velocity

    def grid(self, num_steps: int) -> Tensor:
        """Return the uniform grid."""
        return grids.uniform(num_steps)

    def baseline(self, num_steps: int) -> Tensor | None:
        """Return the grid that another must beat; None is the uniform grid."""
        return None

    def made_with(self, method: str) -> dict[str, Any]:
        """Return the provenance of a grid."""
        condition = "none" if self.starts(0, 1)[1] is None else "all in turn"
        return {**self.run.made_with(method), "condition": condition}

    def write_sigmas(self, grid: Tensor, file: Path) -> None:
        """Write nothing: a grid of a run has one file."""


class PipelineModel:
    """Velocity, starts and grids of a diffusers pipeline under prompts in turn.

    Raises:
        FileNotFoundError: If the folder holds no pipeline.
        TypeError: If the pipeline is not a flow that flowkit knows.
        ValueError: If an option does not fit a pipeline.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.prompts = _prompts(cfg)
        if cfg.method != "euler":
            raise ValueError(f"method must be euler for a pipeline, got {cfg.method}")
        if cfg.metric is not None:
            raise ValueError(f"metric must be null for a pipeline, got {cfg.metric._target_}")
        self.velocity = flow = PipelineFlow.load(cfg, batch_size=cfg.batch_size)
        self.folder = Path(cfg.pipeline)
        shape = flow.latent_shape(cfg.height, cfg.width)
        self.latents = torch.empty(1, *shape, device="meta")
        self.guidance = flow.guidance_scale if cfg.guidance is None else cfg.guidance
        true_cfg = {} if cfg.true_cfg_scale is None else {"true_cfg_scale": cfg.true_cfg_scale}
        negative = cfg.negative_prompt or ""
        cond = flow.encode_prompt(self.prompts, self.guidance, negative_prompt=negative, **true_cfg)
        self.guided = len(flow.bind(cond).parts) == 2
        if cfg.negative_prompt is not None and not self.guided:
            raise ValueError(
                f"negative_prompt must be null without guidance, got {cfg.negative_prompt}"
            )
        self.arguments = {"guidance_scale": self.guidance, **true_cfg}
        if self.guided:
            self.arguments["negative_prompt"] = negative
        self.starts = PromptStarts(flow, shape, cond, cfg.seed, cfg.seeding)
        flow.sigmas(grids.uniform(4), self.latents)  # refuses a scheduler before the work

    def grid(self, num_steps: int) -> Tensor:
        """Return the grid of the pipeline's scheduler."""
        return self.velocity.grid(num_steps, self.latents)

    def baseline(self, num_steps: int) -> Tensor:
        """Return the grid that another must beat: that of the pipeline's scheduler."""
        return self.grid(num_steps)

    def made_with(self, method: str) -> dict[str, Any]:
        """Return the provenance of a grid."""
        record = self.velocity.record()
        return {
            "model_hash": record["hash"],
            "pipeline": record["pipeline"],
            "method": method,
            "guidance": None if self.guidance == 1 else self.guidance,
            "prompts": self.prompts,
            "arguments": self.arguments,
            "latents": list(self.latents.shape[1:]),
            "condition": "all in turn",
        }

    def write_sigmas(self, grid: Tensor, file: Path) -> None:
        """Write the arguments of the pipeline's call for a grid."""
        height, width = (
            n * self.velocity.pipeline.vae_scale_factor for n in self.latents.shape[2:]
        )
        sigmas = self.velocity.sigmas(grid, self.latents)
        steps = {"sigmas": sigmas, "num_inference_steps": len(sigmas)}
        write_json(file, {**steps, "height": height, "width": width, **self.arguments})


def load(cfg: DictConfig) -> RunModel | PipelineModel:
    """Load the run or the pipeline of a configuration.

    Raises:
        ValueError: If both or neither are given, or an option of pipelines is given for a run.
    """
    if (cfg.run is None) == (cfg.pipeline is None):
        raise ValueError(
            f"run or pipeline must be given, but not both, got {cfg.run} and {cfg.pipeline}"
        )
    if cfg.pipeline is not None:
        return PipelineModel(cfg)
    for name in ("prompt", "negative_prompt", "true_cfg_scale", "height", "width"):
        if cfg[name] is not None:
            raise ValueError(f"{name} must be null without pipeline=, got {cfg[name]}")
    return RunModel(cfg)


class PromptStarts:
    """Noise and the conditions of prompts in turn, called as ``starts(first, count)``."""

    are_noise = True

    def __init__(
        self, flow: PipelineFlow, shape: tuple[int, ...], cond: Cond, seed: int, seeding: int
    ) -> None:
        self.transformer, self.shape, self.cond = flow.pipeline.transformer, shape, cond
        self.count = len(next(iter(cond.values())))  # type: ignore[union-attr]
        self.seed, self.seeding = seed, seeding

    def __call__(self, first: int, count: int) -> tuple[Tensor, Cond]:
        """Return noise and conditions of starts ``first`` to ``first + count − 1``."""
        net, seeds = self.transformer, sample_seeds(self.seed, first, count, self.seeding)
        x0 = seeded_noise(self.shape, seeds).to(net.device, net.dtype)
        if self.count == 1:  # one row serves all samples
            return x0, self.cond
        rows = torch.arange(first, first + count, device=net.device) % self.count
        return x0, take(self.cond, rows)


def _prompts(cfg: DictConfig) -> list[str]:
    """Return the prompts of a configuration."""
    prompts = list(cfg.prompt) if isinstance(cfg.prompt, ListConfig) else [cfg.prompt]
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"prompt must be given for a pipeline, got {cfg.prompt}")
    return prompts


class Watched:
    """A velocity that moves a progress bar by its samples."""

    def __init__(self, velocity: Velocity, bar: "tqdm[Any]") -> None:
        self.velocity, self.bar = velocity, bar

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)``."""
        return self.bind(cond)(x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> BoundVelocity:
        """Prepare the velocity for one solve."""
        bound = bind(self.velocity, cond, grid)

        def call(x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
            self.bar.update(len(x))
            return bound(x, t, cond)

        return bound.wrapped(call)
