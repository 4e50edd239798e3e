"""Networks with companions of the state: extra channels that condition it pixel by pixel."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.checks import check_at_least, check_labels
from flowkit.types import Cond


class Inpainting(nn.Module):
    """Velocity conditioned by an image with a hole: ``net([x, masked, mask], t, label)``.

    The condition is a mapping that `flowkit.inpainting.inpainting_cond` makes.
    ``masked (B, c, h, w)`` is the state of the masked image. ``mask (B, 1, h, w)`` is 1 in the hole
    and -1 elsewhere. ``label (B,)`` is needed for a network with classes.

    Args:
        net: Network with ``2 c + 1`` input and ``c`` output channels.

    Source: Dao et al., *Flow Matching in Latent Space*, 2023 (arXiv 2307.08698), section 4.3:
    ``4 + 4 + 1`` channels of latents.

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
        """Return the velocity ``(B, c, h, w)`` at ``x (B, c, h, w)`` and ``t (B,)``.

        Raises:
            TypeError: If ``cond`` is not a mapping with ``masked`` and ``mask``.
            ValueError: If ``masked`` or ``mask`` has another shape.
        """
        if not isinstance(cond, Mapping) or not {"masked", "mask"} <= set(cond):
            given = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise TypeError(f"cond must be a mapping with the names masked and mask, got {given}")
        masked, mask = cond["masked"], cond["mask"]
        for name, value, shape in (
            ("cond['masked']", masked, x.shape),
            ("cond['mask']", mask, (len(x), 1, *x.shape[2:])),
        ):
            if tuple(value.shape) != tuple(shape):
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        parts = [x, masked.to(x.dtype), mask.to(x.dtype)]
        return self.net(torch.cat(parts, 1), t, cond.get("label"))


class Separation(nn.Module):
    """Velocity conditioned by a mixture and a text: ``net([x, frames], t, tokens)``.

    The condition is a mapping, as `flowkit.data.Mixtures` makes it. ``frames (B, c, h, w)`` is the
    state of the mixture, on channels beside the state. ``tokens (B, N, W)`` are attended to, with
    the booleans ``token_mask (B, N)``.

    Args:
        net: Velocity of a network of diffusers with cross-attention, with ``2 c`` input and ``c``
            output channels.

    Source: Yuan et al., *FlowSep*, 2024 (arXiv 2409.07614), section 3.2: ``8 + 8`` channels.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, c, h, w)`` at ``x (B, c, h, w)`` and ``t (B,)``.

        Raises:
            TypeError: If ``cond`` is not a mapping with ``frames``, ``tokens`` and ``token_mask``.
            ValueError: If ``frames`` have another shape than the state.
        """
        names = ("frames", "tokens", "token_mask")
        if not isinstance(cond, Mapping) or not set(names) <= set(cond):
            given = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise TypeError(
                f"cond must be a mapping with the names {', '.join(names)}, got {given}; set "
                "data.query.tokens=true"
            )
        frames, tokens, mask = (cond[name] for name in names)
        if frames.shape != x.shape:
            raise ValueError(
                f"cond['frames'] must have shape {tuple(x.shape)}, got {tuple(frames.shape)}"
            )
        options = {"encoder_hidden_states": tokens.to(x.dtype), "encoder_attention_mask": mask}
        return self.net(torch.cat([x, frames.to(x.dtype)], 1), t, options)


class SemanticMap(nn.Module):
    """Velocity conditioned by a map of labels: ``net([x, r(one-hot map)], t)``.

    The map ``(B, H, W)`` holds integers in ``[0, num_classes]``. The last label means *no label*: a
    map of this label everywhere is the null condition of guidance. The reduction ``r`` maps each
    square of ``factor x factor`` labels to one pixel of the state. Training learns ``r`` together
    with the network.

    Args:
        net: Network with ``channels`` more input channels than output channels.
        num_classes: Number of labels, without the null label.
        factor: Labels of the map per pixel of the state, along one side: the factor of the
            autoencoder.
        channels: Channels of the reduced map.

    Raises:
        ValueError: If a number is below 1.

    Source: Dao et al., *Flow Matching in Latent Space*, 2023 (arXiv 2307.08698), section 4.3.

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
        """Return the velocity ``(B, c, h, w)`` at ``x (B, c, h, w)`` and ``t (B,)``.

        Raises:
            TypeError: If ``cond`` is not a tensor of integers.
            ValueError: If the map has another size, or a label is out of its range.
        """
        if not isinstance(cond, Tensor):
            raise TypeError(f"cond must be a map of labels, got {type(cond).__name__}")
        reduced = [-(-side // self.factor) for side in cond.shape[1:]]
        if cond.ndim != 3 or len(cond) != len(x) or reduced != list(x.shape[2:]):
            sides = (side * self.factor for side in x.shape[2:])
            raise ValueError(
                f"cond must have shape ({len(x)}, {', '.join(map(str, sides))}), or sides up to "
                f"{self.factor - 1} smaller, got {tuple(cond.shape)}"
            )
        check_labels(cond, self.num_classes + 1, "cond")
        codes = F.one_hot(cond.long(), self.num_classes + 1).movedim(-1, 1).to(x.dtype)
        extra = [-side % self.factor for side in cond.shape[1:]]
        if any(extra):
            codes = F.pad(codes, (0, extra[1], 0, extra[0]), "replicate")
        return self.net(torch.cat([x, self.reduce(codes)], 1), t)
