"""Alignment of a trunk's features with a frozen encoder's: semantic feature guidance.

An encoder is any callable ``encoder(images (B, C, H, W)) -> tokens (B, N, D)``. Sources:
*Blockwise Flow Matching*, 2025 (arXiv 2510.21167), section on semantic feature guidance; Yu et
al., *Representation Alignment for Generation*, 2024 (arXiv 2410.06940), for the loss.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.provenance import write_atomically

FORMAT = "flowkit-tokens-1"


def alignment_loss(projected: Tensor, tokens: Tensor) -> Tensor:
    """Mean over tokens of minus the cosine, in [−1, 1].

    Args:
        projected: ``(B, N, D)``.
        tokens: Of the frozen encoder, likewise.

    Raises:
        ValueError: If shapes differ.

    >>> z = torch.randn(2, 4, 8)
    >>> alignment_loss(3 * z, z)
    tensor(-1.)
    """
    if projected.shape != tokens.shape:
        raise ValueError(
            f"projected must have the shape of tokens, {tuple(tokens.shape)}, "
            f"got {tuple(projected.shape)}"
        )
    return -F.cosine_similarity(projected.float(), tokens.float(), dim=-1).mean()


def resize_tokens(tokens: Tensor, sides: Sequence[int]) -> Tensor:
    """Bring a square grid of tokens ``(B, n, D)`` to other sides, ``(B, rows·columns, D)``.

    >>> resize_tokens(torch.arange(4.0).reshape(1, 4, 1), (1, 1))
    tensor([[[1.5000]]])
    """
    rows, columns = sides
    if tokens.shape[1] == rows * columns:
        return tokens
    side = math.isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        raise ValueError(f"tokens must be a square grid, or {rows}x{columns}, got {len(tokens[0])}")
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", antialias=True)
    return grid.flatten(2).transpose(1, 2)


class Projector(nn.Sequential):
    """The three layers between features and an encoder's tokens; needed in training alone.

    Args:
        inputs: Size of the trunk's features.
        outputs: Size of the encoder's tokens.
        width: Of the two hidden layers.

    >>> Projector(1152, 768)(torch.zeros(1, 4, 1152)).shape
    torch.Size([1, 4, 768])
    """

    def __init__(self, inputs: int, outputs: int, width: int = 2048):
        super().__init__(
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, outputs),
        )


class StoredTokens:
    """Tokens computed beforehand, found by the content of an image.

    Args:
        file: What `store_tokens` wrote.

    Raises:
        ValueError: If the file is none; when called, if an image's tokens are not in it.
    """

    def __init__(self, file: str | Path):
        from safetensors import safe_open

        if file is None or not Path(file).is_file():
            raise ValueError(f"file must hold tokens, got {file}; `flowkit tokens` writes them")
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"file must be written by `flowkit tokens`, got {file}")
            keys, self.tokens = stored.get_tensor("keys"), stored.get_tensor("tokens")
        self.file, self.rows = file, {key: row for row, key in enumerate(keys.tolist())}

    def __call__(self, images: Tensor) -> Tensor:
        """Tokens ``(B, N, D)`` of images ``(B, *)``, as they were when stored."""
        found = [self.rows.get(key) for key in content_keys(images)]
        known = [row for row in found if row is not None]
        if len(known) < len(found):
            raise ValueError(
                f"images must be those whose tokens are in {self.file}, got "
                f"{len(found) - len(known)} unknown of {len(found)}; `flowkit tokens` with the "
                "same data stores theirs, mirrored ones too"
            )
        return self.tokens[known].to(images.device, torch.float32)


def store_tokens(file: str | Path, batches: Iterable[Tensor], encoder: Any) -> int:
    """Write the tokens of all images, once for equal ones; returns how many.

    They are kept in half precision and of length 1, since alignment minds directions alone.

    Args:
        file: Where to write; its folder must exist.
        batches: Images ``(B, *)``.
        encoder: Maps them to tokens ``(B, N, D)``.
    """
    from safetensors.torch import save_file

    kept: dict[int, Tensor] = {}
    for images in batches:
        with torch.no_grad():
            tokens = F.normalize(encoder(images).float(), dim=-1).half().cpu()
        kept.update(zip(content_keys(images), tokens, strict=True))
    tensors = {"keys": torch.tensor([*kept]), "tokens": torch.stack([*kept.values()])}
    write_atomically(Path(file), partial(save_file, tensors, metadata={"format": FORMAT}))
    return len(kept)


def content_keys(images: Tensor) -> list[int]:
    """64 bits of a hash of each image's float32 content."""
    rows = images.detach().float().cpu().contiguous().flatten(1).numpy()
    return [
        int.from_bytes(
            hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little", signed=True
        )
        for row in rows
    ]


class DINOv2(nn.Module):
    """Patch tokens of a DINOv2 network of the transformers library.

    Images are brought to its range and size; gray ones become color. Source: Oquab et al.,
    *DINOv2*, 2023 (arXiv 2304.07193).

    Args:
        model: A ``Dinov2Model``, or the name or folder of one.
        size: Side that images are resized to, a multiple of the network's patch.

    Raises:
        ImportError: If a name is given and transformers is not installed.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any = "facebook/dinov2-base", size: int = 224):
        super().__init__()
        if isinstance(model, str | Path):
            try:
                from transformers import AutoModel
            except ImportError as error:
                raise ImportError(
                    f"transformers must be installed to load {model}; pip install transformers"
                ) from error
            model = AutoModel.from_pretrained(model)
        self.model, self.size = model.eval().requires_grad_(False), size
        for name, values in {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Tokens ``(B, (size / patch)², D)`` of images ``(B, 1|3, H, W)`` in [-1, 1]."""
        x = images.expand(-1, 3, -1, -1) / 2 + 0.5
        x = F.interpolate(x, size=(self.size,) * 2, mode="bicubic", antialias=True)
        states = self.model((x - self.mean) / self.std).last_hidden_state
        side = self.size // self.model.config.patch_size
        return states[:, -(side**2) :]  # after the class token and registers, if any
