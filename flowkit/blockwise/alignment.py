"""Alignment of a trunk's features with a frozen encoder: semantic feature guidance.

An encoder is any callable ``encoder(images (B, C, H, W)) -> tokens (B, N, D)``.

Sources: *Blockwise Flow Matching*, 2025 (arXiv 2510.21167), section on semantic feature guidance;
Yu et al., *Representation Alignment for Generation*, 2024 (arXiv 2410.06940), for the loss.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.provenance import write_atomically

FORMAT = "flowkit-tokens-1"


def alignment_loss(projected: Tensor, tokens: Tensor) -> Tensor:
    """Return minus the mean cosine between projected features and tokens, in [−1, 1].

    Args:
        projected: Projected features ``(B, N, D)``.
        tokens: Tokens of the frozen encoder ``(B, N, D)``.

    Raises:
        ValueError: If shapes differ.

    Source: Yu et al., 2024 (arXiv 2410.06940), with the cosine similarity.

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
    """Resize a square grid of tokens ``(B, n, D)`` to other sides, ``(B, rows·columns, D)``.

    Args:
        tokens: Tokens in row order.
        sides: Rows and columns of the result.

    Raises:
        ValueError: If the number of tokens is not a square number, and not ``rows·columns``.

    >>> resize_tokens(torch.arange(4.0).reshape(1, 4, 1), (1, 1))
    tensor([[[1.5000]]])
    """
    rows, columns = sides
    if tokens.shape[1] == rows * columns:
        return tokens
    side = math.isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        raise ValueError(
            f"tokens must form a square grid or a grid of {rows}x{columns}, got {len(tokens[0])}"
        )
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, size=(rows, columns), mode="bilinear", antialias=True)
    return grid.flatten(2).transpose(1, 2)


class Projector(nn.Sequential):
    """Perceptron of three layers from features to an encoder's tokens; used in training only.

    Args:
        inputs: Size of the trunk's features.
        outputs: Size of the encoder's tokens.
        width: Size of the two hidden layers.

    >>> Projector(1152, 768)(torch.zeros(1, 4, 1152)).shape
    torch.Size([1, 4, 768])
    """

    def __init__(self, inputs: int, outputs: int, width: int = 2048) -> None:
        super().__init__(
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, outputs),
        )


class StoredTokens:
    """Encoder that reads precomputed tokens from a file, by the content of each image.

    Args:
        file: Path of a file that `store_tokens` wrote.

    Raises:
        ValueError: If the file does not exist or holds no tokens. In a call, if the file does not
            hold the tokens of an image.

    >>> import tempfile
    >>> file, images = Path(tempfile.mkdtemp()) / "tokens.safetensors", torch.rand(3, 1, 4, 4)
    >>> store_tokens(file, [images], lambda x: x.flatten(1)[:, :, None])
    3
    >>> StoredTokens(file)(images[1:]).shape
    torch.Size([2, 16, 1])
    """

    def __init__(self, file: str | Path) -> None:
        from safetensors import safe_open

        if file is None or not Path(file).is_file():
            raise ValueError(f"file must hold tokens, got {file}; write one with `flowkit tokens`")
        with safe_open(file, framework="pt") as stored:
            if (stored.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"file must be written by `flowkit tokens`, got {file}")
            keys, self.tokens = stored.get_tensor("keys"), stored.get_tensor("tokens")
        self.file, self.rows = file, {key: row for row, key in enumerate(keys.tolist())}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the stored tokens ``(B, N, D)`` of images ``(B, *)``, in float32.

        Raises:
            ValueError: If the file does not hold the tokens of an image.
        """
        found = [self.rows.get(key) for key in content_keys(images)]
        known = [row for row in found if row is not None]
        if len(known) < len(found):
            raise ValueError(
                f"images must have tokens in {self.file}, got {len(found) - len(known)} unknown "
                f"of {len(found)}; run `flowkit tokens` with the same data, which also stores "
                "the tokens of mirrored images"
            )
        return self.tokens[known].to(images.device, torch.float32)


def store_tokens(
    file: str | Path, batches: Iterable[Tensor], encoder: Callable[[Tensor], Tensor]
) -> int:
    """Write the tokens of all images to a file, once per distinct image.

    The tokens are stored in half precision with length 1, because the alignment loss depends on
    directions only.

    Args:
        file: Path of the new file; its folder must exist.
        batches: Batches of images ``(B, *)``.
        encoder: Function from images to tokens ``(B, N, D)``.

    Returns:
        The number of distinct images.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "tokens.safetensors"
    >>> store_tokens(file, [torch.zeros(3, 1, 4, 4)], lambda x: x.flatten(1)[:, :, None])
    1
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
    """Return a 64-bit hash of each image's float32 content."""
    rows = images.detach().float().cpu().contiguous().flatten(1).numpy()
    return [
        int.from_bytes(
            hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little", signed=True
        )
        for row in rows
    ]


class DINOv2(nn.Module):
    """Encoder that returns the patch tokens of a DINOv2 network of the transformers library.

    Images are converted to the range and size of the network. Images with one channel are repeated
    to three channels.

    Args:
        model: A ``Dinov2Model``, or the name or folder of such a model.
        size: Side of the resized images in pixels, a multiple of the network's patch.

    Raises:
        ImportError: If ``model`` is a name and the transformers library is not installed.

    Source: Oquab et al., *DINOv2*, 2023 (arXiv 2304.07193).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any = "facebook/dinov2-base", size: int = 224) -> None:
        super().__init__()
        if isinstance(model, str | Path):
            try:
                from transformers import AutoModel
            except ImportError as error:
                raise ImportError(
                    f"transformers must be installed to load {model}; "
                    "pip install 'flowkit-fm[dinov2]'"
                ) from error
            model = AutoModel.from_pretrained(model)
        self.model, self.size = model.eval().requires_grad_(False), size
        for name, values in {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return tokens ``(B, (size / patch)², D)`` of images ``(B, 1|3, H, W)`` in [-1, 1]."""
        x = images.expand(-1, 3, -1, -1) / 2 + 0.5
        x = F.interpolate(x, size=(self.size,) * 2, mode="bicubic", antialias=True)
        states = self.model((x - self.mean) / self.std).last_hidden_state
        side = self.size // self.model.config.patch_size
        return states[:, -(side**2) :]  # the class token and registers come first
