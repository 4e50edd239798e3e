"""A small network for `flowkit.autoencoders.KLAutoencoder`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from flowkit.checks import check_at_least

if TYPE_CHECKING:
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]


def autoencoder_kl(
    shape: Sequence[int],
    width: int = 32,
    multipliers: Sequence[int] = (1, 2, 2),
    latent_channels: int = 4,
    layers: int = 1,
) -> "AutoencoderKL":
    """A new, small ``AutoencoderKL`` for images of one shape; its factor is 2 per further level.

    Args:
        shape: ``(C, H, W)`` of the images.
        width: Channels of the first level.
        multipliers: Channels of each level, in units of ``width``.
        latent_channels: Channels of the latents.
        layers: Residual blocks per level.

    >>> autoencoder_kl((1, 8, 8), width=8, multipliers=(1, 2)).config.sample_size
    [8, 8]
    """
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]

    if len(shape) != 3:
        raise ValueError(f"shape must be (C, H, W), got {tuple(shape)}")
    sizes = {"width": width, "multipliers": len(multipliers), "layers": layers}
    for name, size in {**sizes, "latent_channels": latent_channels}.items():
        check_at_least(size, 1, name)
    return cast(Any, AutoencoderKL)(
        in_channels=int(shape[0]),
        out_channels=int(shape[0]),
        down_block_types=("DownEncoderBlock2D",) * len(multipliers),
        up_block_types=("UpDecoderBlock2D",) * len(multipliers),
        block_out_channels=tuple(width * int(m) for m in multipliers),
        layers_per_block=layers,
        latent_channels=latent_channels,
        # Four channels a group at least: norms of single channels take an image's brightness away.
        norm_num_groups=max(1, math.gcd(128, width) // 4),
        sample_size=[int(n) for n in shape[1:]],
        scaling_factor=1.0,
    )
