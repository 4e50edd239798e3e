"""What edits are made with: runs and pipelines behind one interface."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from flowkit.adapters import DiffusersPipelineFlow
from flowkit.autoencoders import mean_latents
from flowkit.provenance import tensor_hash
from flowkit.runs.run import Run
from flowkit.sampling import ODESampler
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, bind


class Settings(NamedTuple):
    """What the configuration leaves to the model."""

    num_steps: int
    skip: int
    num_iters: int
    step_size: float | str
    backtrack: bool
    source_guidance: float
    target_guidance: float


class RunFlow:
    """A run as a velocity whose guidance travels in the condition, so that it may differ."""

    def __init__(self, run: Run):
        self.run, self.module = run, run.module
        self.guidance: float = run.config.get("guidance") or 1.0
        self.image_shape = tuple(run.config.get("image_shape") or run.config["shape"])
        self.channels = self.image_shape[0]

    @classmethod
    def load(cls, cfg: DictConfig) -> "RunFlow":
        """Load the run of a configuration; its flow must be one of images."""
        flow = cls(Run.load(cfg.run, cfg.weights, cfg.device))
        if len(flow.image_shape) != 3:
            shape = flow.run.config["shape"]
            raise ValueError(f"run must be one of images, got data of shape {shape}")
        return flow

    def defaults(self, inverting: bool) -> Settings:
        """An edit takes small steps, so that there are iterates to choose from."""
        if inverting:
            return Settings(10, 0, 30, "auto", True, 1.0, 1.0)
        return Settings(10, 0, 12, 0.1, True, 1.0, self.guidance)

    def condition(self, label: Any, guidance: float, name: str, batch: int = 1) -> Cond:
        """The condition of a class, or of a run without classes."""
        classes = self.run.classes
        if classes is None:
            if label is not None:
                raise ValueError(f"{name} must be null for a run without classes, got {label}")
            return None
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(f"{name} must be a class in [0, {classes - 1}], got {label}")
        self.module.guided(guidance)  # refuses a scale that the run has not been trained for
        like = {"size": (batch,), "device": self.module.device}
        scale = torch.full(fill_value=float(guidance), **like)
        return {"label": torch.full(fill_value=label, **like), "guidance": scale}

    def encode(self, images: Tensor) -> Tensor:
        """States of the flow: the means of an autoencoder's latents."""
        shape = tuple(images.shape[1:])
        if shape != self.image_shape:
            raise ValueError(
                f"image must have the size of the run's, {self.image_shape}, got {shape}; resize it"
            )
        states = mean_latents(self.module.autoencoder, images)
        if tuple(states.shape[1:]) != self.module.sample_shape:
            raise ValueError(
                "run must have a flow of images and nothing else, got one of states of shape "
                f"{self.module.sample_shape}"
            )
        return states

    def decode(self, states: Tensor) -> Tensor:
        """Images of states."""
        return self.module.autoencoder.decode(states)

    def grid(self, num_steps: int, states: Tensor) -> Tensor:
        """Uniform times."""
        return ODESampler(num_steps).times

    def record(self) -> dict[str, Any]:
        """Which weights these are."""
        return self.run.weights

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity of the run under a condition of `condition`."""
        return self.bind(cond)(x, t, cond)

    def bind(self, cond: Any, grid: Tensor | None = None) -> BoundVelocity:
        """Guide by the scale in the condition, for one solve."""
        velocity, label = self.module.velocity, None
        if cond is not None:
            velocity, label = self.module.guided(cond["guidance"][0].item()), cond["label"]
        bound = bind(velocity, label, grid)
        return bound.wrapped(lambda x, t, cond=None: bound(x, t, label))


class PipelineFlow(DiffusersPipelineFlow):
    """A pipeline with what a recipe asks of a model."""

    channels = 3

    @classmethod
    def load(cls, cfg: DictConfig) -> "PipelineFlow":
        """Load the folder of a configuration, without looking elsewhere."""
        from diffusers import DiffusionPipeline  # type: ignore[attr-defined]

        index = Path(cfg.pipeline) / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"pipeline must be a folder written by save_pretrained, got {cfg.pipeline}"
            )
        # diffusers wants to be told again of encoders that the pipeline was saved without.
        absent = {k: None for k, v in json.loads(index.read_text()).items() if v == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(
            cfg.pipeline, torch_dtype=getattr(torch, cfg.dtype), local_files_only=True, **absent
        )
        return cls(pipeline.to(cfg.device))

    def defaults(self, inverting: bool) -> Settings:
        """The published settings, which know neither automatic steps nor backtracking."""
        s = self.inversion if inverting else self.editing
        skip = s.num_steps - s.num_kept
        guidance = s.source_guidance, s.target_guidance
        return Settings(s.num_steps, skip, s.num_iters, s.step_size, False, *guidance)

    def condition(self, prompt: Any, guidance: float, name: str) -> Cond:
        """The condition of a prompt."""
        if not isinstance(prompt, str):
            raise ValueError(f"{name} must be a prompt for a pipeline, got {prompt}")
        return self.encode_prompt(prompt, guidance)

    def record(self) -> dict[str, Any]:
        """Which pipeline and weights these are."""
        transformer = self.pipeline.transformer
        return {
            "pipeline": type(self.pipeline).__name__,
            "hash": tensor_hash(transformer.state_dict()),
        }
