"""A pipeline of diffusers that draws images with a flow, from noise and class labels.

This file is written beside the networks of an export of flowkit, and needs torch and diffusers
only. Time and sign are those of diffusers outside, and of the network inside: at the noise level
``σ = 1 − t`` the network is called with ``time_scale · (1 − σ)``, and predicts ``data − noise``;
`FlowMatchEulerDiscreteScheduler` gets ``noise − data``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput  # type: ignore[attr-defined]
from torch import Tensor


class FlowPipeline(DiffusionPipeline):
    """Draws images; the settings are those of the export, and can be given anew in a call.

    Args:
        scheduler: A ``FlowMatchEulerDiscreteScheduler``.
        unet: The network, or
        transformer: the network.
        vae: Decodes latents to images; None for a flow of images.
        sigmas: Noise levels at the start of each step.
        guidance_scale: Scale of classifier-free guidance; 1 is no guidance.
        num_classes: Number of classes, and the label that means *no label*; None without labels.
        state_shape: Shape of the noise of one image.
        time_scale: Time of the network at the data.
        latents_mean: Mean of the latents, for each channel.
        latents_std: Their standard deviation, for each channel.
        image_shape: Shape ``(C, H, W)`` of the images; decoded ones are cropped to it.
    """

    _optional_components = ["unet", "transformer", "vae"]  # noqa: RUF012  # as diffusers has it

    def __init__(
        self,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        vae: Any = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 1.0,
        num_classes: int | None = None,
        state_shape: list[int] | None = None,
        time_scale: float = 1000.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        image_shape: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)
        self.register_to_config(
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_classes=num_classes,
            state_shape=state_shape,
            time_scale=time_scale,
            latents_mean=latents_mean,
            latents_std=latents_std,
            image_shape=image_shape,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor | None = None,
        batch_size: int = 1,
        guidance_scale: float | None = None,
        sigmas: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw images.

        Args:
            class_labels: A label per image, for a network with classes.
            batch_size: Number of images, for a network without classes.
            guidance_scale: Scale of classifier-free guidance; None is that of the export.
            sigmas: Noise levels at the start of each step; None takes those of the export.
            generator: Draws the noise.
            noise: The noise ``(B, *)`` itself.
            output_type: ``"pil"``, ``"np"`` or ``"pt"``; numbers lie in [0, 1].
        """
        config: Any = self.config
        device, network = self._execution_device, self.unet or self.transformer
        if (class_labels is None) != (config.num_classes is None):
            raise ValueError(
                "class_labels must be given exactly for a network with classes, got "
                f"{class_labels} for {config.num_classes} classes"
            )
        if class_labels is not None:
            wrong = [k for k in map(int, class_labels) if not 0 <= k <= config.num_classes]
            if wrong:
                raise ValueError(
                    f"class_labels must lie in [0, {config.num_classes - 1}], or be "
                    f"{config.num_classes} for no label, got {wrong}"
                )
        count = batch_size if class_labels is None else len(class_labels)
        if noise is None:
            noise = torch.randn(count, *config.state_shape, generator=generator)
        x, scale = noise.to(device), config.guidance_scale
        scale = scale if guidance_scale is None else guidance_scale
        options = {}
        if class_labels is not None:
            labels = torch.as_tensor(class_labels, device=device)
            null = torch.full_like(labels, config.num_classes)
            options["class_labels"] = labels if scale == 1 else torch.cat([labels, null])
        self.scheduler.set_timesteps(sigmas=list(sigmas or config.sigmas), device=device)
        levels = self.scheduler.timesteps / self.scheduler.config.num_train_timesteps
        for timestep, sigma in zip(self.scheduler.timesteps, levels, strict=True):
            both = x if scale == 1 else torch.cat([x, x])
            time = (config.time_scale * (1 - sigma)).expand(len(both))
            velocity = network(both, timestep=time, **options).sample[:, : x.shape[1]]
            if scale != 1:
                velocity, without = velocity.chunk(2)
                velocity = torch.lerp(without, velocity, scale)
            x = self.scheduler.step(-velocity, timestep, x).prev_sample
        images = (self._decoded(x) / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return ImagePipelineOutput(images=images)  # type: ignore[arg-type]
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(
            images=self.numpy_to_pil(arrays) if output_type == "pil" else arrays
        )

    def _decoded(self, x: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` in [-1, 1]."""
        if self.vae is None:
            return x
        config: Any = self.config
        mean, std = (
            torch.tensor(values, device=x.device)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        images = self.vae.decode(x * std + mean).sample
        if config.image_shape is None:
            return images
        channels, height, width = config.image_shape
        images = images[..., :height, :width]
        return images if images.shape[1] == channels else images.mean(1, keepdim=True)
