"""Small image encoder that needs no labels and no downloads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from flowkit.checks import as_sizes, check_between, check_integer
from flowkit.nn.dit import PatchEmbed, patchify
from flowkit.nn.stored import Stored


class MaskedEncoder(Stored):
    """Vision transformer that predicts masked patches; its tokens describe the image.

    Train one with `train_masked_encoder`.

    Args:
        shape: ``(C, H, W)`` of the images.
        patch: Side of a patch in pixels; divides ``H`` and ``W``.
        width: Size of a token, a multiple of 4.
        depth: Number of blocks, at least 1.
        heads: Number of attention heads; divides ``width``.

    Raises:
        ValueError: If sizes do not fit together or ``patch``, ``depth`` or
            ``heads`` is below 1.

    Source: Xie et al., *SimMIM*, 2021 (arXiv 2111.09886), with squared errors.

    >>> MaskedEncoder((1, 8, 8)).eval()(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 16, 64])
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        check_integer(depth, "depth", 1)
        check_integer(heads, "heads", 1)
        shape = as_sizes(shape, "shape")
        self.config = {
            "shape": list(shape),
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
        }
        self.patches = PatchEmbed(shape, patch, width)
        self.sides = (shape[1] // patch, shape[2] // patch)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, shape[0] * patch**2)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return tokens ``(B, N, width)`` of images ``(B, C, H, W)``; masked patches are hidden.

        Args:
            images: Images ``(B, C, H, W)`` in [-1, 1].
            mask: Mask ``(B, N)``, ``True`` for a hidden patch; ``None`` hides no patch.
        """
        tokens = self.patches(images)
        if mask is not None:
            hidden = self.mask_token + self.patches.positions
            tokens = torch.where(mask[..., None], hidden, tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def loss(self, images: Tensor, mask: Tensor) -> Tensor:
        """Return the mean square error of the pixels of masked patches.

        Args:
            images: Images ``(B, C, H, W)`` in [-1, 1].
            mask: Mask ``(B, N)``, ``True`` for a hidden patch.
        """
        error = self.pixels(self(images, mask)) - patchify(images, self.patches.patch)
        return error[mask].square().mean()

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a file that `save` wrote; the encoder is frozen and on the CPU.

        Raises:
            ValueError: If the file does not exist or `save` did not write it.

        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "encoder.safetensors"
        >>> MaskedEncoder((1, 8, 8), width=16).save(file)
        >>> MaskedEncoder.load(file).config["width"]
        16
        """
        if file is None or not Path(file).is_file():
            raise ValueError(
                f"file must hold an encoder, got {file}; train one with `flowkit tokens`"
            )
        return super().load(file)


def train_masked_encoder(
    images: Tensor,
    *,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    masked: float = 0.6,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
    **sizes: int,
) -> MaskedEncoder:
    """Train a `MaskedEncoder` with AdamW and a one-cycle learning rate.

    The global random state does not change. On one machine and with one number of threads, equal
    seeds give equal weights.

    Args:
        images: Images ``(N, C, H, W)`` in [-1, 1]; the training runs on their device.
        steps: Number of batches, at least 1.
        batch_size: Number of images per batch.
        learning_rate: Largest learning rate of the cycle.
        masked: Share of hidden patches, in [0.01, 0.99].
        seed: Seed of weights, batches and masks.
        report: Function that receives the step and its loss.
        **sizes: Other arguments of `MaskedEncoder`: ``patch``, ``width``, ``depth``, ``heads``.

    Returns:
        The trained encoder, frozen.

    Raises:
        ValueError: If ``steps`` or ``masked`` is out of its range.

    >>> net = train_masked_encoder(torch.zeros(4, 1, 4, 4), steps=2, width=8, depth=1, heads=2)
    >>> net(torch.zeros(2, 1, 4, 4)).shape
    torch.Size([2, 4, 8])
    """
    check_integer(steps, "steps", 1)
    check_between(masked, 0.01, 0.99, "masked")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MaskedEncoder(images.shape[1:], **sizes)
    net.to(images.device).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=learning_rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    num_tokens = len(net.patches.positions)
    for step in range(steps):
        rows = torch.randint(len(images), (min(batch_size, len(images)),), generator=generator)
        noise = torch.rand(len(rows), num_tokens, generator=generator)
        hidden = noise.argsort(1) < max(1, round(masked * num_tokens))
        loss = net.loss(images[rows], hidden.to(images.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        if report is not None:
            report(step, loss.item())
    return net.eval().requires_grad_(False)
