"""Models for the editing recipes: runs and diffusers pipelines with one interface."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from flowkit.adapters import DiffusersPipelineFlow
from flowkit.autoencoders import mean_latents
from flowkit.checks import usable_device
from flowkit.provenance import read_json, tensor_hash
from flowkit.runs.known_data import place_of
from flowkit.runs.run import Run
from flowkit.sampling import ODESampler
from flowkit.types import Cond
from flowkit.velocity import BoundVelocity, bind


class Settings(NamedTuple):
    """Default settings of an edit or an inversion, which depend on the model."""

    num_steps: int
    skip: int
    num_iters: int
    step_size: float | str
    backtrack: bool
    source_guidance: float
    target_guidance: float


class RunFlow:
    """Velocity of a run. The condition holds the guidance scale, so that each call has its own.

    Args:
        run: A run of images.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.module = run, run.module
        self.guidance: float = run.config.get("guidance") or 1.0
        self.image_shape = tuple(run.config.get("image_shape") or run.config["shape"])
        self.channels = self.image_shape[0]
        height, width = (0, 1, *self.image_shape)[-2:]
        self.side = height if height == width else None
        """Side of the run's images; None if they are not square."""

    @classmethod
    def load(cls, cfg: DictConfig) -> "RunFlow":
        """Load the run of a configuration.

        Raises:
            ValueError: If the data of the run are not images.
        """
        flow = cls(Run.load(cfg.run, cfg.weights, cfg.device, trust=cfg.trust, **place_of(cfg)))
        if len(flow.image_shape) != 3:
            shape = flow.run.config["shape"]
            raise ValueError(f"run must be a run of images, got data of shape {shape}")
        return flow

    def defaults(self, inverting: bool) -> Settings:
        """Return default settings. Steps of an edit are small, to give iterates to choose from."""
        if inverting:
            return Settings(10, 0, 30, "auto", True, 1.0, 1.0)
        return Settings(10, 0, 12, 0.1, True, 1.0, self.guidance)

    def condition(self, label: Any, guidance: float, name: str, batch: int = 1) -> Cond:
        """Return the condition of a class under guidance, or None for a run without classes.

        Args:
            label: Number or name of the class, or None for a run without classes.
            guidance: Scale of classifier-free guidance.
            name: Name of the option, for error messages.
            batch: Number of samples.

        Raises:
            ValueError: If the run has no such class, or does not allow the guidance scale.
        """
        label, classes = self.run.class_number(label, name), self.run.num_classes
        if classes is None:
            if label is not None:
                raise ValueError(f"{name} must be null for a run without classes, got {label}")
            return None
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(f"{name} must be a class in [0, {classes - 1}], got {label}")
        self.module.guided(guidance)  # refuses a scale that the run's training does not allow
        like = {"size": (batch,), "device": self.module.device}
        scale = torch.full(fill_value=float(guidance), **like)
        return {"label": torch.full(fill_value=label, **like), "guidance": scale}

    def encode(self, images: Tensor) -> Tensor:
        """Return the states of images; with an autoencoder, the means of their latents.

        Raises:
            ValueError: If the images have another size than the run's images, or if a state of the
                run holds more than an image.
        """
        shape = tuple(images.shape[1:])
        if shape != self.image_shape:
            raise ValueError(
                f"image must have the shape of the run's images, {self.image_shape}, got {shape}; "
                "resize the image"
            )
        states = mean_latents(self.module.autoencoder, images)
        if tuple(states.shape[1:]) != self.module.sample_shape:
            raise ValueError(
                "run must be a flow of images alone, got a flow of states of shape "
                f"{self.module.sample_shape}"
            )
        return states

    def decode(self, states: Tensor) -> Tensor:
        """Return the images of states."""
        return self.module.autoencoder.decode(states)

    def grid(self, num_steps: int, states: Tensor) -> Tensor:
        """Return uniform times from 0 to 1, ``(num_steps + 1,)``."""
        return ODESampler(num_steps).times

    def record(self) -> dict[str, Any]:
        """Return the kind, step and hash of the weights, for a record."""
        return self.run.weights

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity at ``x (B, *)``, ``t (B,)`` under a condition of `condition`."""
        return self.bind(cond)(x, t, cond)

    def bind(self, cond: Any, grid: Tensor | None = None) -> BoundVelocity:
        """Return the velocity of one solve, guided by the scale in the condition."""
        velocity, label = self.module.velocity, None
        if cond is not None:
            velocity, label = self.module.guided(cond["guidance"][0].item()), cond["label"]
        bound = bind(velocity, label, grid)
        return bound.wrapped(lambda x, t, cond=None: bound(x, t, label))


class PipelineFlow(DiffusersPipelineFlow):
    """Velocity of a diffusers pipeline, with the same interface as `RunFlow`."""

    channels, side = 3, None

    @classmethod
    def load(cls, cfg: DictConfig, batch_size: int | None = None) -> "PipelineFlow":
        """Load the pipeline from the folder of a configuration, without a network connection.

        Args:
            cfg: A configuration with ``pipeline``, ``dtype`` and ``device``.
            batch_size: Largest number of samples in one call of the network; None sets no limit.

        Raises:
            FileNotFoundError: If the folder holds no pipeline.
            ValueError: If the pipeline cannot be loaded.
            TypeError: If the pipeline is not a flow that flowkit knows.
        """
        from diffusers import DiffusionPipeline  # type: ignore[attr-defined]

        index = Path(cfg.pipeline) / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(
                f"pipeline must be a folder written by save_pretrained, got {cfg.pipeline}"
            )
        # diffusers needs the names of the encoders that the saved pipeline does not contain.
        absent = {k: None for k, v in read_json(index).items() if v == [None, None]}
        options = {"torch_dtype": getattr(torch, cfg.dtype), "local_files_only": True, **absent}
        try:
            pipeline = DiffusionPipeline.from_pretrained(cfg.pipeline, **options)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(
                "pipeline must be a whole folder written by save_pretrained, "
                f"got {cfg.pipeline}: {error}"
            ) from error
        return cls(pipeline.to(usable_device(cfg.device)), batch_size)

    def defaults(self, inverting: bool) -> Settings:
        """Return the published settings: fixed steps without backtracking."""
        s = self.inversion if inverting else self.editing
        skip = s.num_steps - s.num_kept
        guidance = s.source_guidance, s.target_guidance
        return Settings(s.num_steps, skip, s.num_iters, s.step_size, False, *guidance)

    def condition(self, prompt: Any, guidance: float, name: str) -> Cond:
        """Return the condition of a prompt under guidance.

        Raises:
            ValueError: If the prompt is not a string.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"{name} must be a prompt for a pipeline, got {prompt}")
        return self.encode_prompt(prompt, guidance)

    def record(self) -> dict[str, Any]:
        """Return the class of the pipeline and the hash of its weights, for a record."""
        transformer = self.pipeline.transformer
        return {
            "pipeline": type(self.pipeline).__name__,
            "hash": tensor_hash(transformer.state_dict()),
        }
