"""Wrappers that fit networks of images to states of image and code."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowkit.checks import as_sizes, check_integer, expand_like
from flowkit.nn.embed import check_state
from flowkit.types import Cond


class CodesAsNumbers(nn.Module):
    """A perceptron on images and codes that takes every plane of a code as one number.

    ``(B, C + K, H, W) → (B, C·H·W + K) → net → (B, C + K, H, W)``. A perceptron on the planes
    themselves would spend ``H·W`` times as many weights on every code.

    Args:
        net: A velocity on vectors ``(B, C·H·W + K)``.
        images: Shape ``(C, H, W)`` of an image. Further channels of a state are codes.

    >>> from flowkit.nn import ResidualMLP
    >>> net = CodesAsNumbers(ResidualMLP((64 + 10,), num_times=2), images=(1, 8, 8))
    >>> net(torch.zeros(3, 1 + 10, 8, 8), torch.rand(3, 2)).shape
    torch.Size([3, 11, 8, 8])
    """

    def __init__(self, net: nn.Module, images: Sequence[int]) -> None:
        super().__init__()
        self.net, self.images = net, as_sizes(images, "images")

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Compute the velocity of states ``x``; it is constant on every plane of a code.

        Args:
            x: States ``(B, C + K, H, W)``.
            t: Times that ``net`` takes.
            cond: Condition that ``net`` takes.

        Returns:
            Velocities of the shape of ``x``.

        Raises:
            ValueError: If ``x`` does not hold images of the given shape.
        """
        channels, *size = self.images
        if tuple(x.shape[2:]) != tuple(size) or x.shape[1] < channels:
            raise ValueError(
                f"x must hold images of shape {self.images} and planes, got shape {tuple(x.shape)}"
            )
        image, planes = x[:, :channels], x[:, channels:]
        v = self.net(torch.cat([image.flatten(1), planes.flatten(2).mean(2)], 1), t, cond)
        pixels, codes = v.split([math.prod(self.images), planes.shape[1]], 1)
        codes = codes[..., None, None].expand(planes.shape)
        return torch.cat([pixels.reshape(image.shape), codes], 1)


class TwoTimes(nn.Module):
    """A network of one time that takes the second time as a plane.

    ``v(x, (t, s)) = net([x, 2 s − 1], t)``, without the last channel of the network's result.

    Args:
        net: A velocity on images with one more channel, such as `flowkit.nn.unet2d`.

    >>> from flowkit.nn import unet2d
    >>> net = TwoTimes(unet2d((3, 8, 8), width=8))
    >>> net(torch.zeros(2, 2, 8, 8), torch.rand(2, 2)).shape
    torch.Size([2, 2, 8, 8])
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Compute the velocity ``(B, C, H, W)`` of ``x (B, C, H, W)`` at times ``t (B, 2)``.

        Raises:
            ValueError: If ``t`` has another shape.
        """
        check_state(x, t, tuple(x.shape[1:]), num_times=2)
        plane = (2 * t[:, 1] - 1).to(x).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.net(torch.cat([x, plane], 1), t[:, 0], cond)[:, :-1]


class NoisePath(nn.Module):
    """A network with a linear path from its state to its result.

    ``v = net(x, t) + gain(t) x`` with
    ``gain(t) = (2 t − 1) / (t² + (1 − t)²) + 4 t (1 − t) c(t)``. The first term of the gain is the
    regression of ``x₁ − x₀`` on ``x_t`` for data of unit variance. The correction ``c`` is learnt
    and starts at 0. At both ends the path is exact for data of any variance: ``−x₀`` at ``t = 0``
    and ``x₁`` at ``t = 1``. There the network only has to predict the expected other end. With two
    times, the channels of the image have a gain at ``t``, and those of the codes a gain at ``s``.

    A velocity contains the noise of every element of a state. A network that is narrower than a
    state cannot carry all of this noise. Without the path its images and labels are speckled.

    Args:
        net: A velocity on states ``(B, C + K, *)``.
        channels: Number ``C ≥ 1`` of channels of the image.

    Raises:
        ValueError: If ``channels`` is below 1.

    >>> from flowkit.nn import unet2d
    >>> net = NoisePath(TwoTimes(unet2d((13, 8, 8), width=8)), channels=1)
    >>> net(torch.zeros(2, 12, 8, 8), torch.rand(2, 2)).shape
    torch.Size([2, 12, 8, 8])
    """

    def __init__(self, net: nn.Module, channels: int) -> None:
        super().__init__()
        check_integer(channels, "channels", 1)
        self.net, self.channels = net, channels
        self.correction = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 2))
        for parameter in self.correction[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Compute the velocity of ``x (B, C + K, *)`` at times ``t``, ``(B,)`` or ``(B, 2)``."""
        times = t if t.ndim == 2 else torch.stack([t, t], 1)
        linear = (2 * times - 1) / (times**2 + (1 - times) ** 2)
        dtype = next(self.correction.parameters()).dtype
        gains = linear + 4 * times * (1 - times) * self.correction((4 * times - 2).to(dtype))
        image, codes = x[:, : self.channels], x[:, self.channels :]
        of_image, of_codes = gains.unbind(1)
        path = [expand_like(of_image, image) * image, expand_like(of_codes, codes) * codes]
        return self.net(x, t, cond) + torch.cat(path, 1).to(x.dtype)
