"""Networks with companions of the state: extra channels that condition it pixel by pixel."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.checks import check_choice, check_integer, check_labels, check_same_shape
from flowkit.nn.embed import SidesError
from flowkit.types import Cond


class Conditioned(nn.Module):
    """Velocity with conditions on channels: ``net([x, *beside], t, rest) + onto``.

    The condition is a mapping. Its parts named in ``beside``, ``(B, c_i, *)`` on the grid of the
    state ``x (B, c, *)``, join the channels of the state in that order. The rest is left to the
    network: labels alone as a tensor, ``label (B,)``, and other parts as a mapping, such as
    ``tokens (B, N, W)`` and ``token_mask (B, N)``, which a network of diffusers attends to.

    Args:
        net: Network with as many more input channels as the parts have.
        beside: Names of the parts beside the state, at least one.
        onto: Name of the one of these that the answer of the network is added to; None for none.
            A network that predicts data then begins with this part, such as the mixture that holds
            a sound, and learns how the data differ from it.

    Raises:
        ValueError: If no part is named, or ``onto`` is not one of them.

    Source: the channels of Dao et al., *Flow Matching in Latent Space*, 2023 (arXiv 2307.08698),
    section 4.3 (``4 + 4 + 1``), and of Yuan et al., *FlowSep*, 2024 (arXiv 2409.07614), section 3.2
    (``8 + 8``).

    >>> from flowkit.nn import DiT
    >>> net = Conditioned(DiT((4, 8, 8), width=32, depth=1, heads=2, in_channels=5), ["mask"])
    >>> net(torch.randn(2, 4, 8, 8), torch.rand(2), {"mask": torch.ones(2, 1, 8, 8)}).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, net: nn.Module, beside: Sequence[str], onto: str | None = None) -> None:
        super().__init__()
        check_integer(len(beside), "number of names in beside", 1)
        if onto is not None:
            check_choice(onto, tuple(beside), "onto")
        self.net, self.beside, self.onto = net, tuple(beside), onto

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, c, *)`` at ``x (B, c, *)`` and ``t (B,)``.

        Raises:
            TypeError: If ``cond`` is not a mapping with the parts beside the state.
            ValueError: If one of them is not on the grid of the state.
        """
        if not isinstance(cond, Mapping) or not set(self.beside) <= set(cond):
            given = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise TypeError(
                f"cond must be a mapping with the names {' and '.join(self.beside)}, got {given}"
            )
        parts = [cond[name].to(x.dtype) for name in self.beside]
        for name, part in zip(self.beside, parts, strict=True):
            wanted = (len(x), *part.shape[1:2], *x.shape[2:])
            if tuple(part.shape) != wanted:
                raise ValueError(
                    f"cond[{name!r}] must have shape {wanted}, got {tuple(part.shape)}"
                )
        rest = {name: value for name, value in cond.items() if name not in self.beside}
        own = rest.get("label") if set(rest) <= {"label"} else rest
        found = self.net(torch.cat([x, *parts], 1), t, own)
        if self.onto is None:
            return found
        begun = parts[self.beside.index(self.onto)]
        check_same_shape(begun, found, (f"cond[{self.onto!r}]", "the answer of net"))
        return found + begun


class Patches(nn.Module):
    """Velocity on squares of pixels: each square of ``size · size`` becomes one pixel.

    The channels of its pixels become channels of the new one, so nothing is lost, and the noise
    stays white. A convolutional network then has fewer and wider layers, which is faster where
    small ones keep a processor waiting.

    Args:
        net: Network with ``size²`` times the input and output channels.
        size: Pixels of a side of a square, which divides the sides of the state.

    Raises:
        ValueError: If ``size`` is below 1.

    Source: Shi et al., *Real-Time Single Image and Video Super-Resolution*, 2016 (arXiv
    1609.05158), section 3.2, for the map and its inverse.

    >>> from flowkit.nn import DiT
    >>> net = Patches(DiT((4, 4, 4), width=32, depth=1, heads=2), 2)
    >>> net(torch.randn(2, 1, 8, 8), torch.rand(2)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        check_integer(size, "size", 1)
        self.net, self.size = net, size

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, c', H, W)`` at ``x (B, c, H, W)`` and ``t (B,)``.

        Raises:
            ValueError: If the sides of ``x`` are not multiples of ``size``, or the network takes
                no such number of squares.
        """
        if x.ndim != 4:
            raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
        if x.shape[2] % self.size or x.shape[3] % self.size:
            inside = getattr(self.net, "factor", 1)  # that of a UNet, which has not run to tell it
            raise SidesError(x.shape, self.size * inside)
        try:
            v = self.net(F.pixel_unshuffle(x, self.size), t, cond)
        except SidesError as error:
            raise SidesError(x.shape, self.size * error.multiple) from error
        return F.pixel_shuffle(v, self.size)


class Inpainting(Conditioned):
    """Velocity conditioned by an image with a hole: ``net([x, masked, mask], t, label)``.

    The condition is a mapping that `flowkit.inpainting.inpainting_cond` makes.
    ``masked (B, c, h, w)`` is the state of the masked image. ``mask (B, 1, h, w)`` is 1 in the hole
    and -1 elsewhere. ``label (B,)`` is needed for a network with classes.

    Args:
        net: Network with ``2 c + 1`` input and ``c`` output channels.

    >>> from flowkit.nn import DiT
    >>> net = Inpainting(DiT((4, 8, 8), width=32, depth=1, heads=2, in_channels=9))
    >>> x, mask = torch.randn(2, 4, 8, 8), torch.ones(2, 1, 8, 8)
    >>> net(x, torch.rand(2), {"masked": x, "mask": mask}).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, ("masked", "mask"))


class SemanticMap(Conditioned):
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
        super().__init__(net, ("map",))
        sizes = {"num_classes": num_classes, "factor": factor, "channels": channels}
        for name, size in sizes.items():
            check_integer(size, name, 1)
        self.num_classes, self.factor = num_classes, factor
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
        return super().forward(x, t, {"map": self.reduce(codes)})
