"""Alignment of a trunk's features with a frozen encoder: semantic feature guidance.

An encoder is any callable ``encoder(images (B, C, H, W)) -> tokens (B, N, D)``. Its attribute
``sides``, the rows and columns of the tokens, is necessary for images that are not square.

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

from flowkit.extras import install
from flowkit.provenance import located, write_atomically

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


def token_sides(encoder: Any, images: Tensor, count: int) -> tuple[int, int]:
    """Return the rows and columns of an encoder's tokens.

    They are the attribute ``sides`` of the encoder. The number of tokens alone does not tell them:
    256 tokens are 16 rows of 16, or 8 rows of 32. Without the attribute, tokens of square images
    form a square.

    Args:
        encoder: The encoder.
        images: Images ``(B, C, H, W)``.
        count: Number ``N`` of tokens of an image.

    Raises:
        ValueError: If the sides are not known, or do not hold ``N`` tokens.

    >>> token_sides(None, torch.zeros(1, 1, 8, 8), 16)
    (4, 4)
    """
    sides = getattr(encoder, "sides", None)
    if sides is None:
        side = math.isqrt(count)
        square = images.shape[-1] == images.shape[-2]
        if side**2 != count or not (square or count == 1):
            raise ValueError(
                "encoder must have the attribute sides, the rows and columns of its tokens, got "
                f"{count} tokens of images {tuple(images.shape[-2:])}; write stored tokens again "
                "with `flowkit tokens`"
            )
        sides = (side, side)
    rows, columns = (int(n) for n in sides)
    if rows * columns != count:
        raise ValueError(f"encoder.sides must hold {count} tokens, got {rows}x{columns}")
    return rows, columns


def resize_tokens(tokens: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Resize a grid of tokens ``(B, rows·columns, D)`` to other sides.

    Args:
        tokens: Tokens in row order.
        old: Rows and columns of the tokens.
        new: Rows and columns of the result.

    >>> resize_tokens(torch.arange(4.0).reshape(1, 4, 1), (2, 2), (1, 1))
    tensor([[[1.5000]]])
    """
    if tuple(old) == tuple(new):
        return tokens
    grid = tokens.transpose(1, 2).unflatten(2, tuple(old))
    grid = F.interpolate(grid, size=tuple(new), mode="bilinear", antialias=True)
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
            sides = stored.metadata().get("sides")  # earlier versions did not store them
            keys, self.tokens = stored.get_tensor("keys"), stored.get_tensor("tokens")
        self.sides = None if sides is None else tuple(int(n) for n in sides.split("x"))
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
    directions only. The file also holds the rows and columns of the tokens, see `token_sides`.

    Args:
        file: Path of the new file; its folder must exist.
        batches: Batches of images ``(B, *)``.
        encoder: Function from images to tokens ``(B, N, D)``.

    Returns:
        The number of distinct images.

    Raises:
        ValueError: If the rows and columns of the tokens are not known.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "tokens.safetensors"
    >>> store_tokens(file, [torch.zeros(3, 1, 4, 4)], lambda x: x.flatten(1)[:, :, None])
    1
    """
    from safetensors.torch import save_file

    kept: dict[int, Tensor] = {}
    sides: Sequence[int] = ()
    for images in batches:
        with torch.no_grad():
            tokens = F.normalize(encoder(images).float(), dim=-1).half().cpu()
        sides = token_sides(encoder, images, tokens.shape[1])
        kept.update(zip(content_keys(images), tokens, strict=True))
    tensors = {"keys": torch.tensor([*kept]), "tokens": torch.stack([*kept.values()])}
    metadata = {"format": FORMAT, "sides": "x".join(map(str, sides))}
    write_atomically(Path(file), partial(save_file, tensors, metadata=metadata))
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
        model: A ``Dinov2Model``, or the folder of one, or ``hub:owner/name`` for one of the
            Hugging Face hub.
        size: Side of the resized images in pixels, a multiple of the network's patch.

    Raises:
        ImportError: If ``model`` is a place and the transformers library is not installed.
        FileNotFoundError: If ``model`` is a folder that does not exist.

    Source: Oquab et al., *DINOv2*, 2023 (arXiv 2304.07193).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any = "hub:facebook/dinov2-base", size: int = 224) -> None:
        super().__init__()
        if isinstance(model, str | Path):
            try:
                from transformers import AutoModel
            except ImportError as error:
                raise ImportError(
                    f"transformers must be installed to load {model}, got none; {install('dinov2')}"
                ) from error
            place, on_hub = located(model, "model")
            # The file of the model may name an attention whose code transformers would download.
            plain = {"trust_remote_code": False, "attn_implementation": "sdpa"}
            model = AutoModel.from_pretrained(place, local_files_only=not on_hub, **plain)
        self.model, self.size = model.eval().requires_grad_(False), size
        self.sides = (size // model.config.patch_size,) * 2
        for name, values in {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return tokens ``(B, (size / patch)², D)`` of images ``(B, 1|3, H, W)`` in [-1, 1]."""
        x = images.expand(-1, 3, -1, -1) / 2 + 0.5
        x = F.interpolate(x, size=(self.size,) * 2, mode="bicubic", antialias=True)
        states = self.model((x - self.mean) / self.std).last_hidden_state
        return states[:, -math.prod(self.sides) :]  # the class token and registers come first
