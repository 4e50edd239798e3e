"""A flow as a folder of diffusers: network, autoencoder, scheduler and pipeline."""

import json
from pathlib import Path
from shutil import copyfile
from typing import Any

from flowkit.adapters.sigmas import to_sigmas
from flowkit.autoencoders import Autoencoder, Identity, KLAutoencoder
from flowkit.autoencoders.frozen import forget_place
from flowkit.nn import DiffusersVelocity
from flowkit.sampling import ODESampler
from flowkit.velocity import Velocity

KINDS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}
OTHERS = "format=torch and format=onnx take every network"


def check_diffusers(velocity: Velocity, sampler: ODESampler, autoencoder: Autoencoder) -> None:
    """Require what a folder of diffusers can hold.

    Raises:
        TypeError: If the network or the autoencoder is not one of diffusers.
        ValueError: If the solver does not take Euler steps, or the network two times.
    """
    net = velocity.net if isinstance(velocity, DiffusersVelocity) else velocity
    if type(net).__name__ not in KINDS or not isinstance(velocity, DiffusersVelocity):
        raise TypeError(
            f"velocity must be one of {', '.join(KINDS)} of diffusers for format=diffusers, got "
            f"{type(net).__name__}; {OTHERS}"
        )
    if velocity.num_times != 1:
        raise ValueError(
            f"velocity must take one time for format=diffusers, got {velocity.num_times}; {OTHERS}"
        )
    if type(autoencoder) not in (Identity, KLAutoencoder):
        raise TypeError(
            "autoencoder must be an AutoencoderKL of diffusers for format=diffusers, got "
            f"{type(autoencoder).__name__}; {OTHERS}"
        )
    if sampler.method != "euler":
        raise ValueError(
            f"sampler must be euler for format=diffusers, got {sampler.method}; sampler=euler "
            "steps=25 takes 25 Euler steps"
        )


def write_diffusers(
    velocity: DiffusersVelocity,
    sampler: ODESampler,
    autoencoder: Autoencoder,
    scale: float,
    num_classes: int | None,
    shape: tuple[int, ...],
    folder: Path,
) -> None:
    """Write a folder with ``model_index.json`` for ``DiffusionPipeline.from_pretrained``.

    Args:
        velocity: The network, see `check_diffusers`.
        sampler: Euler steps from 0 to 1.
        autoencoder: Decodes the last state.
        scale: Scale of classifier-free guidance; 1 is no guidance.
        num_classes: Number of classes; None without labels.
        shape: Shape of the noise of one sample.
        folder: The folder.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler  # type: ignore[attr-defined]

    from flowkit.adapters import flow_pipeline

    net: Any = velocity.net
    parts: dict[str, Any] = {KINDS[type(net).__name__]: net}
    if isinstance(autoencoder, KLAutoencoder):
        parts |= {
            "vae": autoencoder.vae,
            "latents_mean": autoencoder.mean.flatten().tolist(),
            "latents_std": autoencoder.std.flatten().tolist(),
            "image_shape": autoencoder.image_shape and list(autoencoder.image_shape),
        }
    pipeline = flow_pipeline.FlowPipeline(
        FlowMatchEulerDiscreteScheduler(),
        sigmas=to_sigmas(sampler.times),
        guidance_scale=scale,
        num_classes=num_classes,
        state_shape=list(shape),
        time_scale=float(velocity.time_scale),
        **parts,
    )
    pipeline.save_pretrained(folder)
    for config in folder.glob("*/config.json"):
        forget_place(config)
    copyfile(flow_pipeline.__file__, folder / "pipeline.py")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "FlowPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
