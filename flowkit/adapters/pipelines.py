"""Text-to-image pipelines of diffusers as velocities: Stable Diffusion 3 and FLUX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.checks import as_grid, check_at_least, expand_like
from flowkit.guidance import combine
from flowkit.types import Cond


@dataclass(frozen=True)
class Published:
    """Settings of FlowOpt that were published for a pipeline at 1024x1024, with Euler steps.

    Source: Ronai et al., *FlowOpt*, 2025 (arXiv 2510.22010).

    Args:
        num_steps: Steps ``T`` of the whole grid.
        num_kept: The last ``n`` of them, which are solved.
        num_iters: Updates ``N``.
        step_size: Fixed ``η``, without backtracking.
        source_guidance: ``guidance_scale`` of the source prompt.
        target_guidance: ``guidance_scale`` of the target prompt.

    >>> SD3_EDITING.nfe, FLUX_EDITING.nfe, FLUX_INVERSION.nfe
    (121, 131, 321)
    """

    num_steps: int
    num_kept: int
    num_iters: int
    step_size: float
    source_guidance: float = 1.0
    target_guidance: float = 3.5

    @property
    def nfe(self) -> int:
        """Velocity evaluations, ``(n + 1) + (N + 1) n``."""
        return self.num_kept + 1 + (self.num_iters + 1) * self.num_kept


SD3_EDITING = Published(15, 12, 8, 0.01)
SD3_INVERSION = Published(10, 10, 30, 0.01)
FLUX_EDITING = Published(15, 13, 8, 0.0025)
FLUX_INVERSION = Published(10, 10, 30, 0.0025)


class DiffusersPipelineFlow:
    """The flow of a pipeline: a velocity on its latents, their autoencoder, prompts and grids.

    The state is ``x (B, C, H/8, W/8)``, not packed; time is flowkit's. With the network's
    ``noise − data`` at the noise level ``σ`` the velocity is ``v(x, t) = −net(x, σ = 1 − t)``.
    Conditions are mappings made by `encode_prompt`; guidance travels in them, so that the source
    and the target of an edit may have their own.

    Args:
        pipeline: A ``StableDiffusion3Pipeline`` or a ``FluxPipeline``. It is not changed.

    Raises:
        TypeError: If the pipeline or its scheduler is another.

    An edit with the published settings::

        flow = DiffusersPipelineFlow(FluxPipeline.from_pretrained(folder))
        s, x1 = flow.editing, flow.encode(images)
        sampler = ODESampler(flow.grid(s.num_steps, x1)[-s.num_kept - 1 :])
        source = flow.encode_prompt("a cat", s.source_guidance)
        target = flow.encode_prompt("a dog", s.target_guidance)
        edit = FlowOpt(sampler, s.step_size, s.num_iters, backtrack=False)(flow, x1, source, target)
        images = flow.decode(edit.x)
    """

    def __init__(self, pipeline: Any):
        from diffusers import (  # type: ignore[attr-defined]
            FlowMatchEulerDiscreteScheduler,
            FluxPipeline,
            StableDiffusion3Pipeline,
        )

        families = {StableDiffusion3Pipeline: _StableDiffusion3, FluxPipeline: _Flux}
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
        self.pipeline, self._family = pipeline, family(pipeline)

    @property
    def editing(self) -> Published:
        """The published settings of edits."""
        return self._family.editing

    @property
    def inversion(self) -> Published:
        """The published settings of inversions."""
        return self._family.inversion

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, C, H, W)`` at ``x``, ``t (B,)`` under a condition of `encode_prompt`."""
        return self.bind(cond)(x, t, cond)

    def bind(self, cond: Cond, grid: Tensor | None = None) -> "_Bound":
        """Prepare for one solve, counting network rows."""
        if not isinstance(cond, Mapping):
            raise TypeError(f"cond must be made by encode_prompt, got {type(cond).__name__}")
        return _Bound(self._family, cond)

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
            prompt: One prompt serves a batch of any size.
            guidance_scale: What the pipeline calls so: classifier-free guidance of Stable
                Diffusion 3 (two network rows per sample unless it is 1), the embedded guidance of
                a distilled FLUX.
            negative_prompt: What classifier-free guidance leads away from.
            true_cfg_scale: Classifier-free guidance of FLUX, beside the embedded.

        Raises:
            ValueError: If the network has no guidance of this kind.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_at_least(len(prompts), 1, "number of prompts")
        return self._family.encode_prompt(prompts, guidance_scale, negative_prompt, true_cfg_scale)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents ``(B, C, H/8, W/8)`` of images ``(B, 3, H, W)`` in [-1, 1]: the posterior's mode.

        Raises:
            ValueError: If the images have other channels, or sides that the network cannot cut
                into patches.
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
        """Images of latents, in float32."""
        vae = self.pipeline.vae
        shift, scale = self._shift_and_scale
        return vae.decode(latents.to(vae.device, vae.dtype) / scale + shift).sample.float()

    @property
    def _shift_and_scale(self) -> tuple[float, float]:
        config = self.pipeline.vae.config
        return config.shift_factor or 0.0, config.scaling_factor

    def grid(self, num_steps: int, latents: Tensor) -> Tensor:
        """The pipeline's own times for so many steps, shifted as it does for this resolution."""
        check_at_least(num_steps, 1, "num_steps")
        pipeline = self.pipeline
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        config, options = scheduler.config, self._family.sigmas(num_steps)
        if config.use_dynamic_shifting:
            height, width = latents.shape[-2:]
            low, high = config.base_image_seq_len, config.max_image_seq_len
            place = (height // 2 * (width // 2) - low) / (high - low)
            options["mu"] = config.base_shift + place * (config.max_shift - config.base_shift)
        scheduler.set_timesteps(num_steps, **options)
        return as_grid(1 - scheduler.sigmas.double())


class _Bound:
    """The velocity of one solve: negated, guided, and counting network rows."""

    def __init__(self, family: Any, cond: Mapping[str, Tensor]):
        self.family, self.cond, self.rows = family, dict(cond), 0
        self.scale = self.cond.pop("cfg_scale", None)

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        batch, cond = len(x), self.cond
        if self.scale is not None:  # the halves of each condition: the prompt, the negative prompt
            x, t = torch.cat([x, x]), torch.cat([t, t])
            cond = {name: _rows(value, 2, batch) for name, value in cond.items()}
        else:
            cond = {name: _rows(value, 1, batch) for name, value in cond.items()}
        self.rows += len(x)
        v = -self.family.network(x, 1 - t, cond)
        if self.scale is None:
            return v
        v, v_null = v.chunk(2)
        return combine(v, v_null, expand_like(_rows(self.scale, 1, batch), v).to(v.dtype))


def _rows(value: Tensor, parts: int, batch: int) -> Tensor:
    """Conditions of one sample serve a batch."""
    if len(value) == parts * batch:
        return value
    if len(value) != parts:
        raise ValueError(
            f"number of prompts must be 1 or that of the samples, {batch}, "
            f"got {len(value) // parts}"
        )
    return value.repeat_interleave(batch, 0)


def _guided(prompt: dict[str, Tensor], negative: dict[str, Tensor], scale: float) -> dict:
    both = {name: torch.cat([value, negative[name]]) for name, value in prompt.items()}
    first = next(iter(prompt.values()))
    return {**both, "cfg_scale": torch.full((len(first),), scale, device=first.device)}


class _StableDiffusion3:
    editing, inversion = SD3_EDITING, SD3_INVERSION

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline

    def encode_prompt(self, prompts, guidance_scale, negative_prompt, true_cfg_scale):
        if true_cfg_scale != 1:
            raise ValueError(
                f"true_cfg_scale must be 1 for Stable Diffusion 3, got {true_cfg_scale}; its "
                "classifier-free guidance is guidance_scale"
            )
        guided = guidance_scale != 1
        embeds, null, pooled, null_pooled = self.pipeline.encode_prompt(
            prompts, None, None, negative_prompt=negative_prompt, do_classifier_free_guidance=guided
        )
        prompt = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if not guided:
            return prompt
        negative = {"encoder_hidden_states": null, "pooled_projections": null_pooled}
        return _guided(prompt, negative, guidance_scale)

    def sigmas(self, num_steps: int) -> dict[str, Any]:
        return {}

    def network(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        return self.pipeline.transformer(x, timestep=timestep, **cond, return_dict=False)[0]


class _Flux:
    editing, inversion = FLUX_EDITING, FLUX_INVERSION

    def __init__(self, pipeline: Any):
        self.pipeline = pipeline
        self.distilled = pipeline.transformer.config.guidance_embeds

    def encode_prompt(self, prompts, guidance_scale, negative_prompt, true_cfg_scale):
        if guidance_scale != 1 and not self.distilled:
            raise ValueError(
                f"guidance_scale must be 1 for a FLUX without embedded guidance, "
                f"got {guidance_scale}; its classifier-free guidance is true_cfg_scale"
            )
        prompt = self._encode(prompts, guidance_scale)
        if true_cfg_scale == 1:
            return prompt
        negative = self._encode([negative_prompt] * len(prompts), guidance_scale)
        return _guided(prompt, negative, true_cfg_scale)

    def _encode(self, prompts: list[str], guidance_scale: float) -> dict[str, Tensor]:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, None)
        cond = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.distilled:
            cond["guidance"] = torch.full((len(prompts),), guidance_scale, device=embeds.device)
        return cond

    def sigmas(self, num_steps: int) -> dict[str, Any]:
        if self.pipeline.scheduler.config.get("use_flow_sigmas"):
            return {}
        return {"sigmas": torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).numpy()}

    def network(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The transformer sees 2x2 patches as tokens, with the places of theirs and of the text."""
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
        tokens = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)
        places = torch.zeros(height // 2, width // 2, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(height // 2)[:, None]
        places[..., 2] = torch.arange(width // 2)
        text_places = places.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
        out = self.pipeline.transformer(
            tokens,
            timestep=(1000 * sigma).to(x.dtype) / 1000,  # rounded as the pipeline does
            img_ids=places.flatten(0, 1),
            txt_ids=text_places,
            **cond,
            return_dict=False,
        )[0]
        patches = out.reshape(batch, height // 2, width // 2, channels, 2, 2)
        return cast(Tensor, patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape))
