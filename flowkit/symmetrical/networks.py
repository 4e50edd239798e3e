"""What makes networks of images fit states of image and code: planes, and a path for the noise."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowkit.checks import check_at_least, expand_like
from flowkit.nn.embed import check_state
from flowkit.types import Cond


class CodesAsNumbers(nn.Module):
    """A perceptron on images whose last channels are constant planes, which it sees as numbers.

    ``(B, C + K, H, W) → (B, C·H·W + K) → net → (B, C + K, H, W)``. A perceptron on the planes
    themselves spends ``H·W`` times as many weights on every code.

    Args:
        net: A velocity on ``(C·H·W + K,)``.
        images: Shape ``(C, H, W)`` of the images; further channels of a state are codes.

    >>> from flowkit.nn import ResidualMLP
    >>> net = CodesAsNumbers(ResidualMLP((64 + 10,), num_times=2), images=(1, 8, 8))
    >>> net(torch.zeros(3, 1 + 10, 8, 8), torch.rand(3, 2)).shape
    torch.Size([3, 11, 8, 8])
    """

    def __init__(self, net: nn.Module, images: Sequence[int]):
        super().__init__()
        self.net, self.images = net, tuple(int(n) for n in images)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, C + K, H, W)`` at ``x`` and ``t``, constant on the codes' planes."""
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
    """A network of one time that is shown a second one as a plane.

    ``v(x, (t, s)) = net([x, 2 s − 1], t)`` without its last channel.

    Args:
        net: A velocity on images of one channel more, such as `flowkit.nn.unet2d`.

    >>> from flowkit.nn import unet2d
    >>> net = TwoTimes(unet2d((3, 8, 8), width=8))
    >>> net(torch.zeros(2, 2, 8, 8), torch.rand(2, 2)).shape
    torch.Size([2, 2, 8, 8])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, C, H, W)`` at ``x (B, C, H, W)`` and times ``t (B, 2)``."""
        check_state(x, t, tuple(x.shape[1:]), num_times=2)
        plane = (2 * t[:, 1] - 1).to(x).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.net(torch.cat([x, plane], 1), t[:, 0], cond)[:, :-1]


class NoisePath(nn.Module):
    """A network with a linear path from its state to its answer.

    ``v = net(x, t) + gain(t) x``, ``gain(t) = (2 t − 1) / (t² + (1 − t)²) + 4 t (1 − t) c``: the
    regression of ``x₁ − x₀`` on ``x_t`` for data of unit variance, and a learnt ``c``, 0 at the
    start. At both ends it is exact for data of any variance: ``− x₀`` at ``t = 0``, ``x₁`` at
    ``t = 1``, so that all that is left for the network there is the expected other end. With two
    times the image's channels have a gain of their own time, and the codes' one of theirs.

    Velocities hold the noise of every number of a state. A network that is narrower than that
    cannot carry it through: its images are speckled, and so are its labels.

    Args:
        net: A velocity on ``(B, C + K, *)``.
        channels: ``C``, those of the image.

    >>> from flowkit.nn import unet2d
    >>> net = NoisePath(TwoTimes(unet2d((13, 8, 8), width=8)), channels=1)
    >>> net(torch.zeros(2, 12, 8, 8), torch.rand(2, 2)).shape
    torch.Size([2, 12, 8, 8])
    """

    def __init__(self, net: nn.Module, channels: int):
        super().__init__()
        check_at_least(channels, 1, "channels")
        self.net, self.channels = net, channels
        self.correction = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 2))
        for parameter in self.correction[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Velocity ``(B, C + K, *)`` at ``x`` and times ``t``, ``(B,)`` or ``(B, 2)``."""
        times = t if t.ndim == 2 else torch.stack([t, t], 1)
        linear = (2 * times - 1) / (times**2 + (1 - times) ** 2)
        gains = linear + 4 * times * (1 - times) * self.correction(4 * times - 2)
        image, codes = x[:, : self.channels], x[:, self.channels :]
        of_image, of_codes = gains.unbind(1)
        path = [expand_like(of_image, image) * image, expand_like(of_codes, codes) * codes]
        return self.net(x, t, cond) + torch.cat(path, 1)
