"""Features of DINOv2 and CLIP by the transformers library, and of any network."""

import re
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.extras import install
from flowkit.metrics.features import in_batches
from flowkit.metrics.pictures import to_uint8
from flowkit.provenance import content_hash, located, tensor_hash

Kind = Literal["dinov2", "clip"]
CLASSES = {"dinov2": "Dinov2Model", "clip": "CLIPVisionModelWithProjection"}
PUBLISHED = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
CHANNELS = {  # means and standard deviations of the colors in [0, 1]
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class Pretrained:
    """Features of a vision transformer, see `pretrained`.

    Args:
        net: A ``Dinov2Model`` or ``CLIPVisionModelWithProjection`` of the transformers library.
        kind: ``"dinov2"`` or ``"clip"``.
        device: Device of the network.
    """

    def __init__(self, net: Any, kind: Kind, device: torch.device | str = "cpu") -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.family, self.device = kind, device
        self.side = 224 if kind == "dinov2" else net.config.image_size
        self.name = f"{kind}-{net.config.hidden_size}-at-{self.side}"
        self.hash = tensor_hash(net.state_dict())

    def __call__(self, images: Tensor) -> Tensor:
        """Return features ``(B, F)`` of images ``(B, 1 or 3, H, W)`` in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have shape (B, 1 or 3, H, W), got {tuple(images.shape)}")
        colors = torch.tensor(CHANNELS[self.family], device=self.device)[..., None, None]

        def features(batch: Tensor) -> Tensor:
            pixels = to_uint8(batch).expand(-1, 3, -1, -1).to(self.device).float() / 255
            sized = F.interpolate(pixels, (self.side,) * 2, mode="bicubic", antialias=True)
            found = self.net(pixel_values=(sized - colors[0]) / colors[1])
            chosen = found.pooler_output if self.family == "dinov2" else found.image_embeds
            return chosen.float().to(batch.device)

        return in_batches(features, images, 50)


def pretrained(
    kind: Kind, weights: str | Path | None, device: torch.device | str = "cpu"
) -> Pretrained:
    """Load the features of DINOv2 (its class token) or CLIP (its image embedding).

    Images are rounded by `to_uint8` and resized with the bicubic filter with antialiasing, DINOv2's
    to 224 pixels, CLIP's to the size of the network. Libraries differ in the filter: compare values
    of this function only with values of this function.

    Sources: Stein et al. 2023, *Exposing flaws of generative model evaluation metrics* (arXiv
    2306.04675), for DINOv2 ViT-L/14; Jayasumana et al. 2024 (arXiv 2401.09603), for CLIP ViT-L/14
    at 336 pixels.

    Args:
        kind: ``"dinov2"`` or ``"clip"``.
        weights: Folder of the network in the format of the transformers library, or
            ``hub:owner/name``, which downloads it.
        device: Device of the network.

    Returns:
        The features. Their ``hash`` is that of all tensors of the network.

    Raises:
        ImportError: If the transformers library is not installed.
        FileNotFoundError: If the folder does not exist.
        ValueError: If ``weights`` is None, or the folder holds another network.
    """
    name = PUBLISHED[kind]
    fix = f"its makers publish {name} on the Hugging Face hub: give a folder of it, or hub:{name}"
    if weights is None:
        raise ValueError(f"weights must be the folder of a {kind} network, got None; {fix}")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"transformers must be installed for {kind}, got none; {install('fid')}"
        ) from error
    place, on_hub = located(weights, "weights")
    plain = {"trust_remote_code": False, "attn_implementation": "sdpa"}
    try:
        config = transformers.AutoConfig.from_pretrained(
            place, local_files_only=not on_hub, trust_remote_code=False
        )
        if kind not in config.model_type:
            raise ValueError(f"a network of the type {config.model_type}")
        net = getattr(transformers, CLASSES[kind]).from_pretrained(
            place, local_files_only=not on_hub, **plain
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"weights must hold a {kind} network, got {error}; {fix}") from error
    return Pretrained(net, kind, device)


class NetworkFeatures:
    """Features of any network, for images, audio or other data.

    Args:
        net: Maps data ``(B, *)`` to features ``(B, F)``; more dimensions are flattened. It is set
            to evaluation mode.
        name: Name in records; None stands for the class of the network.
        device: Device of the network.
        settings: The arguments of the network, as a text. They belong to its ``hash``, with its
            class, its printed form and all its tensors: networks of the same weights may differ.

    >>> features = NetworkFeatures(nn.Linear(4, 2), name="linear")
    >>> features(torch.zeros(3, 4)).shape, features.name
    (torch.Size([3, 2]), 'linear')
    """

    def __init__(
        self,
        net: nn.Module,
        name: str | None = None,
        device: torch.device | str = "cpu",
        settings: str = "",
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch module, got {type(net).__name__}")
        self.net, self.device = net.to(device).eval(), device
        kind = type(net)
        self.name = name or kind.__name__
        shown = re.sub(r" at 0x[0-9a-f]+", "", str(net))  # places in memory change with each call
        header = repr((kind.__module__, kind.__qualname__, shown, settings))
        # Buffers that are not stored have a part in the features, too.
        self.hash = content_hash({**dict(net.named_buffers()), **net.state_dict()}, header)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features ``(B, F)`` of data ``(B, *)``."""

        def features(batch: Tensor) -> Tensor:
            found = self.net(batch.to(self.device))
            if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(batch):
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"net must return features ({len(batch)}, F), got {got}")
            return found.flatten(1).float().to(batch.device)

        return in_batches(features, images, 50)
