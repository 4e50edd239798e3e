"""Networks whose state has companions: channels that condition it pixel by pixel."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.checks import check_at_least, check_labels
from flowkit.types import Cond


class Inpainting(nn.Module):
    """A velocity given an image with a hole: ``net([x, masked, mask], t, label)``.

    The condition is a mapping: ``masked (B, c, h, w)``, the state of the masked image, ``mask
    (B, 1, h, w)``, 1 in the hole and -1 elsewhere, and for a network with classes ``label (B,)``.
    `flowkit.inpainting.inpainting_cond` makes it. Source: Dao et al., *Flow Matching in Latent
    Space*, 2023 (arXiv 2307.08698), section 4.3: ``4 + 4 + 1`` channels of latents.

    Args:
        net: A network that takes ``2 c + 1`` channels and returns ``c``.

    >>> from flowkit.nn import DiT
    >>> net = Inpainting(DiT((4, 8, 8), width=32, depth=1, heads=2, in_channels=9))
    >>> x, mask = torch.randn(2, 4, 8, 8), torch.ones(2, 1, 8, 8)
    >>> net(x, torch.rand(2), {"masked": x, "mask": mask}).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, c, h, w)`` at ``x (B, c, h, w)`` and ``t (B,)``."""
        if not isinstance(cond, Mapping) or not {"masked", "mask"} <= set(cond):
            given = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise TypeError(f"cond must be a mapping with masked and mask, got {given}")
        masked, mask = cond["masked"], cond["mask"]
        for name, value, shape in (
            ("cond['masked']", masked, x.shape),
            ("cond['mask']", mask, (len(x), 1, *x.shape[2:])),
        ):
            if tuple(value.shape) != tuple(shape):
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        parts = [x, masked.to(x.dtype), mask.to(x.dtype)]
        return self.net(torch.cat(parts, 1), t, cond.get("label"))


class SemanticMap(nn.Module):
    """A velocity given a map of labels: ``net([x, r(one-hot map)], t)`` with a learned ``r``.

    The map ``(B, H, W)`` holds integers in ``[0, num_classes]``, the last of which stands for *no
    label*: a map full of it is the null condition of guidance. The reduction ``r`` cuts the map
    into squares of ``factor x factor`` labels, one for each pixel of the state, and is learned
    with the rest. Source: Dao et al., *Flow Matching in Latent Space*, 2023 (arXiv 2307.08698),
    section 4.3.

    Args:
        net: A network that takes ``channels`` more channels than it returns.
        num_classes: Labels of the map, the null label not counted.
        factor: Labels of the map per pixel of the state along a side: the autoencoder's factor.
        channels: Channels of the reduced map.

    >>> from flowkit.nn import DiT
    >>> net = DiT((4, 8, 8), width=32, depth=1, heads=2, in_channels=8)
    >>> velocity = SemanticMap(net, num_classes=3, factor=4)
    >>> velocity(torch.randn(2, 4, 8, 8), torch.rand(2), torch.full((2, 32, 32), 3)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, net: nn.Module, num_classes: int, factor: int, channels: int = 4) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "factor": factor, "channels": channels}
        for name, size in sizes.items():
            check_at_least(size, 1, name)
        self.net, self.num_classes, self.factor = net, num_classes, factor
        self.reduce = nn.Sequential(
            nn.Conv2d(num_classes + 1, 8 * channels, factor, stride=factor),
            nn.SiLU(),
            nn.Conv2d(8 * channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, c, h, w)`` at ``x (B, c, h, w)`` and ``t (B,)``."""
        if not isinstance(cond, Tensor):
            raise TypeError(f"cond must be a map of labels, got {type(cond).__name__}")
        reduced = [-(-side // self.factor) for side in cond.shape[1:]]
        if cond.ndim != 3 or len(cond) != len(x) or reduced != list(x.shape[2:]):
            sides = (side * self.factor for side in x.shape[2:])
            raise ValueError(
                f"cond must have shape ({len(x)}, {', '.join(map(str, sides))}), up to "
                f"{self.factor - 1} less along a side, got {tuple(cond.shape)}"
            )
        check_labels(cond, self.num_classes + 1, "cond")
        codes = F.one_hot(cond.long(), self.num_classes + 1).movedim(-1, 1).to(x.dtype)
        extra = [-side % self.factor for side in cond.shape[1:]]
        if any(extra):
            codes = F.pad(codes, (0, extra[1], 0, extra[0]), "replicate")
        return self.net(torch.cat([x, self.reduce(codes)], 1), t)
