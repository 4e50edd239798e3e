"""A small encoder of images that needs no labels and no downloads."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from flowkit.checks import check_at_least, check_between
from flowkit.nn.dit import PatchEmbed, patchify
from flowkit.nn.stored import Stored


class MaskedEncoder(Stored):
    """A vision transformer trained to fill in masked patches; its tokens describe the image.

    Source: Xie et al., *SimMIM*, 2021 (arXiv 2111.09886), with squared errors.
    `train_masked_encoder` makes one.

    Args:
        shape: ``(C, H, W)`` of the images.
        patch: Side of a patch in pixels; divides ``H`` and ``W``.
        width: Size of a token.
        depth: Number of blocks.
        heads: Attention heads.

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
    ):
        super().__init__()
        check_at_least(depth, 1, "depth")
        shape = [int(n) for n in shape]
        self.config = {
            "shape": shape,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
        }
        self.patches = PatchEmbed(shape, patch, width)
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
        """Tokens ``(B, N, width)`` of images ``(B, C, H, W)``; patches under a mask are unseen.

        Args:
            images: In [-1, 1].
            mask: True where a patch is hidden, ``(B, N)``.
        """
        tokens = self.patches(images)
        if mask is not None:
            hidden = self.mask_token + self.patches.positions
            tokens = torch.where(mask[..., None], hidden, tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def loss(self, images: Tensor, mask: Tensor) -> Tensor:
        """Mean square error of the pixels under the mask."""
        error = self.pixels(self(images, mask)) - patchify(images, self.patches.patch)
        return error[mask].square().mean()

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read what `save` wrote, see `flowkit.nn.stored.Stored`."""
        if file is None or not Path(file).is_file():
            raise ValueError(f"file must be an encoder, got {file}; `flowkit tokens` trains one")
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
    """Train a `MaskedEncoder` with AdamW under a one-cycle learning rate.

    The global random state is left alone; on one machine and number of threads, the same seed
    gives the same weights.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1]; the training runs on their device.
        steps: Batches.
        batch_size: Images per step.
        learning_rate: The largest of the cycle.
        masked: Share of patches that are hidden, in (0, 1).
        seed: Of weights, batches and masks.
        report: Called with the step and its loss.
        **sizes: Others of the constructor: ``patch``, ``width``, ``depth``, ``heads``.

    Returns:
        The encoder, frozen.
    """
    check_at_least(steps, 1, "steps")
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
