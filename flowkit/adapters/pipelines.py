"""Text-to-image pipelines of diffusers as velocities: Stable Diffusion 3 and FLUX."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowkit.adapters.families import NEGATIVE, SCALE, Flux, StableDiffusion3
from flowkit.adapters.published import Published
from flowkit.adapters.sigmas import to_sigmas
from flowkit.checks import as_grid, check_at_least, expand_like
from flowkit.guidance import combine
from flowkit.types import Cond, per_sample, take


class DiffusersPipelineFlow:
    """Flow of a diffusers pipeline: velocity on latents, autoencoder, prompts and grids.

    The state is ``x (B, C, H/8, W/8)``, not packed, and the time is flowkit's. The network predicts
    ``noise − data`` at the noise level ``σ = 1 − t``, so the velocity is
    ``v(x, t) = −net(x, σ = 1 − t)``. Conditions are mappings that `encode_prompt` makes. A
    condition contains its own guidance, so the source and the target of an edit can have different
    guidance.

    Args:
        pipeline: A ``StableDiffusion3Pipeline`` or a ``FluxPipeline``. The pipeline does not
            change.
        batch_size: Largest number of samples in one call of the network; None sets no limit.

    Raises:
        TypeError: If the pipeline or its scheduler has another type.
        ValueError: If ``batch_size`` is below 1.

    An edit with the published settings::

        flow = DiffusersPipelineFlow(FluxPipeline.from_pretrained(folder))
        s, x1 = flow.editing, flow.encode(images)
        sampler = ODESampler(flow.grid(s.num_steps, x1)[-s.num_kept - 1 :])
        source = flow.encode_prompt("a cat", s.source_guidance)
        target = flow.encode_prompt("a dog", s.target_guidance)
        edit = FlowOpt(sampler, s.step_size, s.num_iters, backtrack=False)(flow, x1, source, target)
        images = flow.decode(edit.x)
    """

    def __init__(self, pipeline: Any, batch_size: int | None = None) -> None:
        from diffusers import (  # type: ignore[attr-defined]
            FlowMatchEulerDiscreteScheduler,
            FluxPipeline,
            StableDiffusion3Pipeline,
        )

        families = {StableDiffusion3Pipeline: StableDiffusion3, FluxPipeline: Flux}
        family = next((f for kind, f in families.items() if isinstance(pipeline, kind)), None)
        if family is None:
            raise TypeError(
                "pipeline must be a StableDiffusion3Pipeline or a FluxPipeline, "
                f"got {type(pipeline).__name__}"
            )
        if not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise TypeError(
                "pipeline.scheduler must be a FlowMatchEulerDiscreteScheduler, "
                f"got {type(pipeline.scheduler).__name__}"
            )
        if batch_size is not None:
            check_at_least(batch_size, 1, "batch_size")
        self.pipeline, self.batch_size, self._family = pipeline, batch_size, family(pipeline)

    @property
    def editing(self) -> Published:
        """Published settings of edits."""
        return self._family.editing

    @property
    def inversion(self) -> Published:
        """Published settings of inversions."""
        return self._family.inversion

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, C, H, W)`` at ``x``, ``t (B,)`` under a condition of `encode_prompt`."""
        return self.bind(cond)(x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> "_Bound":
        """Prepare for one solve, counting network rows."""
        if not isinstance(cond, Mapping):
            raise TypeError(f"cond must be made by encode_prompt, got {type(cond).__name__}")
        return _Bound(self._family, cond, self.batch_size)

    @property
    def guidance_scale(self) -> float:
        """The pipeline's own ``guidance_scale``; 1 for a network without this guidance."""
        if not self._family.has_guidance:
            return 1.0
        return inspect.signature(type(self.pipeline).__call__).parameters["guidance_scale"].default

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        guidance_scale: float = 1.0,
        *,
        negative_prompt: str = "",
        true_cfg_scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Return the condition of a prompt, or of one prompt per sample.

        Args:
            prompt: One prompt for a batch of any size, or a sequence with one prompt per sample.
            guidance_scale: The pipeline's argument of the same name. For Stable Diffusion 3, this
                is classifier-free guidance, which takes two network rows per sample unless the
                scale is 1. For a distilled FLUX, this is the embedded guidance.
            negative_prompt: Prompt of the unconditional part of classifier-free guidance.
            true_cfg_scale: Scale of classifier-free guidance of FLUX, in addition to the embedded
                guidance.

        Returns:
            A mapping of tensors, for the argument ``cond`` of the velocity. Each tensor has one row
            per prompt.

        Raises:
            ValueError: If there is no prompt, or the network has no guidance of this kind.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_at_least(len(prompts), 1, "number of prompts")
        return self._family.encode_prompt(prompts, guidance_scale, negative_prompt, true_cfg_scale)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return latents ``(B, C, H/8, W/8)`` of images ``(B, 3, H, W)`` in [-1, 1].

        The latents are the mode of the autoencoder's posterior.

        Raises:
            ValueError: If the images have another number of channels, or sides that are not
                divisible into patches.
        """
        vae = self.pipeline.vae
        channels, multiple = vae.config.in_channels, 2 * self.pipeline.vae_scale_factor
        if (
            images.ndim != 4
            or images.shape[1] != channels
            or any(side % multiple or not side for side in images.shape[2:])
        ):
            raise ValueError(
                f"images must have shape (B, {channels}, H, W) with sides divisible by {multiple}, "
                f"got {tuple(images.shape)}; crop or resize them"
            )
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()
        shift, scale = self._shift_and_scale
        return ((latents - shift) * scale).to(self.pipeline.transformer.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images ``(B, 3, H, W)`` of latents ``(B, C, H/8, W/8)``, in float32."""
        vae = self.pipeline.vae
        shift, scale = self._shift_and_scale
        return vae.decode(latents.to(vae.device, vae.dtype) / scale + shift).sample.float()

    @property
    def _shift_and_scale(self) -> tuple[float, float]:
        """Shift and scale between latents and the autoencoder's code."""
        config = self.pipeline.vae.config
        return config.shift_factor or 0.0, config.scaling_factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Return the shape ``(C, H/8, W/8)`` of the latents of one image.

        Args:
            height: Height of the image in pixels; None is the pipeline's own.
            width: Width of the image in pixels; None is the pipeline's own.

        Raises:
            ValueError: If a side is not divisible into patches.
        """
        factor = self.pipeline.vae_scale_factor
        own = self.pipeline.default_sample_size * factor
        sides = own if height is None else height, own if width is None else width
        for name, side in zip(("height", "width"), sides, strict=True):
            if side < 1 or side % (2 * factor):
                raise ValueError(f"{name} must be divisible by {2 * factor}, got {side}")
        return (self.pipeline.vae.config.latent_channels, *(side // factor for side in sides))

    def grid(self, num_steps: int, latents: Tensor) -> Tensor:
        """Return the pipeline's own grid of ``num_steps`` steps for the resolution of latents.

        Args:
            num_steps: Number of steps, at least 1.
            latents: Latents ``(B, C, h, w)``. Their sides set the shift of a scheduler with dynamic
                shifting.

        Returns:
            Times ``(num_steps + 1,)`` in float64.

        Raises:
            ValueError: If ``num_steps`` is below 1.
        """
        check_at_least(num_steps, 1, "num_steps")
        return as_grid(self._stepped(latents, num_steps, **self._family.sigmas(num_steps)))

    def sigmas(self, grid: Tensor, latents: Tensor) -> list[float]:
        """Return the pipeline's argument ``sigmas`` for its steps to lie on a grid.

        Args:
            grid: Times from 0 to 1.
            latents: Latents ``(B, C, h, w)``, as for `grid`.

        Raises:
            ValueError: If the grid does not end at 1, or the scheduler steps on other levels than
                the given ones.
        """
        config, shift = self.pipeline.scheduler.config, self.pipeline.scheduler.shift
        if (mu := self._mu(latents)) is not None:
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        sigmas = to_sigmas(grid, shift)
        found = None
        if self._family.takes_sigmas:
            found = self._stepped(latents, len(sigmas), sigmas=sigmas)
        if found is None or (found - as_grid(grid)).abs().max() > 1e-5:
            raise ValueError(
                "pipeline.scheduler must take the noise levels that it is given, got a "
                "configuration that replaces them"
            )
        return sigmas

    def _mu(self, latents: Tensor) -> float | None:
        """Return the shift for the resolution of latents; None for a fixed shift."""
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return None
        height, width = latents.shape[-2:]
        low, high = config.base_image_seq_len, config.max_image_seq_len
        place = (height // 2 * (width // 2) - low) / (high - low)
        return config.base_shift + place * (config.max_shift - config.base_shift)

    def _stepped(self, latents: Tensor, num_steps: int, **options: Any) -> Tensor:
        """Return the times ``1 − σ`` of the steps of a copy of the scheduler."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(num_steps, mu=self._mu(latents), **options)
        return 1 - scheduler.sigmas.double()


class _Bound:
    """The velocity of one solve: negated, guided, and counting network rows.

    A condition has one row per prompt. With guidance, each sample takes two rows of the network.
    """

    def __init__(self, family: Any, cond: Mapping[str, Tensor], batch_size: int | None) -> None:
        self.family, self.scale, self.rows = family, cond.get(SCALE), 0
        self.batch_size = batch_size
        names = [name for name in cond if name != SCALE and not name.startswith(NEGATIVE)]
        prefixes = ("",) if self.scale is None else ("", NEGATIVE)
        self.parts = [{name: cond[prefix + name] for name in names} for prefix in prefixes]

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        parts = [per_sample(part, len(x)) for part in self.parts]
        scale = per_sample(self.scale, len(x))
        size = self.batch_size or len(x)
        batches = [slice(first, first + size) for first in range(0, len(x), size)]
        v = [
            self._velocity(
                x[rows], t[rows], [take(part, rows) for part in parts], take(scale, rows)
            )
            for rows in batches
        ]
        return v[0] if len(v) == 1 else torch.cat(v)

    def _velocity(self, x: Tensor, t: Tensor, parts: list[Any], scale: Any) -> Tensor:
        """Return the velocity of one batch, under its prompts and its negative prompts."""
        cond = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        x, t = torch.cat([x] * len(parts)), torch.cat([t] * len(parts))
        self.rows += len(x)
        v = -self.family.network(x, 1 - t, cond)
        if scale is None:
            return v
        v, v_null = v.chunk(2)
        return combine(v, v_null, expand_like(scale, v).to(v.dtype))
