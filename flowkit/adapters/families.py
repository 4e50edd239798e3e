"""Families of text-to-image networks: prompts, noise levels and calls of the transformer."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.adapters.published import (
    FLUX_EDITING,
    FLUX_INVERSION,
    SD3_EDITING,
    SD3_INVERSION,
)

NEGATIVE = "negative_"  # prefix of the names of the negative prompt's tensors in a condition
SCALE = "cfg_scale"  # name of the scale of classifier-free guidance in a condition


def _guided(
    prompt: dict[str, Tensor], negative: dict[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """Return the condition of a prompt, of a negative prompt and of the scale, a row per prompt."""
    first = next(iter(prompt.values()))
    scales = torch.full((len(first),), scale, device=first.device)
    return {**prompt, **{NEGATIVE + name: v for name, v in negative.items()}, SCALE: scales}


class StableDiffusion3:
    """Network, prompts and noise levels of Stable Diffusion 3."""

    editing, inversion = SD3_EDITING, SD3_INVERSION
    has_guidance = takes_sigmas = True

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def encode_prompt(
        self,
        prompts: list[str],
        guidance_scale: float,
        negative_prompt: str,
        true_cfg_scale: float,
    ) -> dict[str, Tensor]:
        """Return the condition of prompts."""
        if true_cfg_scale != 1:
            raise ValueError(
                f"true_cfg_scale must be 1 for Stable Diffusion 3, got {true_cfg_scale}; set "
                "guidance_scale for classifier-free guidance"
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
        """Return an empty mapping: the scheduler computes its own noise levels."""
        return {}

    def network(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction ``noise − data`` of the transformer."""
        timestep = sigma * self.pipeline.scheduler.config.num_train_timesteps
        return self.pipeline.transformer(x, timestep=timestep, **cond, return_dict=False)[0]


class Flux:
    """Network, prompts and noise levels of FLUX."""

    editing, inversion = FLUX_EDITING, FLUX_INVERSION

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.distilled = self.has_guidance = pipeline.transformer.config.guidance_embeds
        self.takes_sigmas = not pipeline.scheduler.config.get("use_flow_sigmas")

    def encode_prompt(
        self,
        prompts: list[str],
        guidance_scale: float,
        negative_prompt: str,
        true_cfg_scale: float,
    ) -> dict[str, Tensor]:
        """Return the condition of prompts."""
        if guidance_scale != 1 and not self.distilled:
            raise ValueError(
                f"guidance_scale must be 1 for a FLUX without embedded guidance, "
                f"got {guidance_scale}; set true_cfg_scale for classifier-free guidance"
            )
        prompt = self._encode(prompts, guidance_scale)
        if true_cfg_scale == 1:
            return prompt
        negative = self._encode([negative_prompt] * len(prompts), guidance_scale)
        return _guided(prompt, negative, true_cfg_scale)

    def _encode(self, prompts: list[str], guidance_scale: float) -> dict[str, Tensor]:
        """Return the condition of prompts without a negative prompt."""
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, None)
        cond = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        if self.distilled:
            cond["guidance"] = torch.full((len(prompts),), guidance_scale, device=embeds.device)
        return cond

    def sigmas(self, num_steps: int) -> dict[str, Any]:
        """Return the scheduler's argument with noise levels, as the pipeline sets it."""
        if not self.takes_sigmas:
            return {}
        return {"sigmas": torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).numpy()}

    def network(self, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction ``noise − data`` of the transformer.

        The tokens are patches of 2x2 latents. The transformer also receives the positions of image
        tokens and of text tokens.
        """
        batch, channels, height, width = x.shape
        patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
        tokens = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)
        places = torch.zeros(height // 2, width // 2, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(height // 2)[:, None]
        places[..., 2] = torch.arange(width // 2)
        text_places = places.new_zeros(cond["encoder_hidden_states"].shape[1], 3)
        out = self.pipeline.transformer(
            tokens,
            timestep=(1000 * sigma).to(x.dtype) / 1000,  # the pipeline rounds in the same way
            img_ids=places.flatten(0, 1),
            txt_ids=text_places,
            **cond,
            return_dict=False,
        )[0]
        patches = out.reshape(batch, height // 2, width // 2, channels, 2, 2)
        return cast(Tensor, patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape))
