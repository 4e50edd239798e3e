"""InceptionV3 of 2015: the features of FID, sFID, Inception score, and ADM's precision."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.metrics.features import in_batches
from flowkit.metrics.pictures import to_uint8

NAME = "inception-v3"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
BYTES = 95_628_359
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLISHED = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}",
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_{WEIGHTS[8:]}",
)
HELP = (
    f"the published file is {WEIGHTS} ({BYTES:,} bytes, SHA-256 {SHA256}) at {PUBLISHED[0]}, "
    f"the same file at {PUBLISHED[1]}"
)
SIDE, CHANNELS = 299, 7  # of the input; of the spatial features
CROSS = "cross"  # two convolutions side by side, 1×3 and 3×1


class InceptionV3(nn.Module):
    """The InceptionV3 network of TensorFlow's graph of 2015-12-05, from 8-bit images.

    It differs from the network of the paper in the borders of its average pools, which do not
    count, and in the last pool of the last block, which takes the maximum. Parameters have the
    names of torch-fidelity and pytorch-fid, so both files of weights fit.

    Source: Szegedy et al. 2015 (arXiv 1512.00567); Heusel et al. 2017 (arXiv 1706.08500) for this
    graph.

    >>> net = InceptionV3().eval()
    >>> images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    >>> {name: tuple(x.shape) for name, x in net(images).items()}
    {'features': (1, 2048), 'spatial': (1, 2023), 'logits': (1, 1008)}
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padding=0)
        for name, (channels, pooled) in zip("bcd", ((192, 32), (256, 64), (288, 64)), strict=True):
            five, double = [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)]
            branches = {"1x1": [(64, 1)], "5x5": five, "3x3dbl": double}
            self.add_module(f"Mixed_5{name}", _Mixed(channels, branches, "average", pooled))
        branches = {"3x3": [(384, 3, 2)], "3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}
        self.Mixed_6a = _Mixed(288, branches)
        wide, high = (1, 7), (7, 1)
        for name, n in zip("bcde", (128, 160, 160, 192), strict=True):
            double = [(n, 1), (n, high), (n, wide), (n, high), (192, wide)]
            branches = {"1x1": [(192, 1)], "7x7": [(n, 1), (n, wide), (192, high)]}
            branches["7x7dbl"] = double
            self.add_module(f"Mixed_6{name}", _Mixed(768, branches, "average", 192))
        branches = {"3x3": [(192, 1), (320, 3, 2)]}
        branches["7x7x3"] = [(192, 1), (192, wide), (192, high), (192, 3, 2)]
        self.Mixed_7a = _Mixed(768, branches)
        for name, channels, pool in (("b", 1280, "average"), ("c", 2048, "largest")):
            branches = {"1x1": [(320, 1)], "3x3": [(384, 1), (384, CROSS)]}
            branches["3x3dbl"] = [(448, 1), (384, 3), (384, CROSS)]
            self.add_module(f"Mixed_7{name}", _Mixed(channels, branches, pool, 192))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of 8-bit images ``(B, 3, H, W)``.

        ``features`` ``(B, 2048)`` are the mean of the last block. ``spatial`` ``(B, 17·17·7)`` are
        the first 7 channels of the block 6d in the order of ADM: row, column, channel. ``logits``
        ``(B, 1008)`` have no bias, as in ADM and torch-fidelity.
        """
        x = (resize(images.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self._blocks(F.max_pool2d(x, 3, 2), "5b 5c 5d 6a 6b 6c 6d")
        spatial = x[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self._blocks(x, "6e 7a 7b 7c")
        features = x.mean((2, 3))
        logits = features @ self.fc.weight.T
        return {"features": features, "spatial": spatial, "logits": logits}

    def _blocks(self, x: Tensor, names: str) -> Tensor:
        """Apply some blocks in order."""
        for name in names.split():
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x


class _Conv(nn.Module):
    """Convolution, batch norm and ReLU. With stride 2 there is no padding."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Any, stride: int = 1, padding: Any = None
    ) -> None:
        super().__init__()
        sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if padding is None:
            padding = tuple(side // 2 for side in sides) if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches of convolutions beside a pool, joined by channel.

    Args:
        inputs: Channels of the input.
        branches: For each branch its convolutions: outputs, kernel and stride.
        pool: ``"average"`` or ``"largest"`` before a convolution; with None the maximum of stride 2
            alone.
        pooled: Channels of the convolution after the pool.
    """

    def __init__(
        self,
        inputs: int,
        branches: dict[str, list[tuple[Any, ...]]],
        pool: str | None = None,
        pooled: int = 0,
    ) -> None:
        super().__init__()
        self.pool, self.branches = pool, list[list[tuple[str, ...]]]()
        for branch, convolutions in branches.items():
            channels, steps = inputs, []
            for number, (outputs, kernel, *stride) in enumerate(convolutions, 1):
                name = f"branch{branch}" + (f"_{number}" if len(convolutions) > 1 else "")
                sides = {f"{name}a": (1, 3), f"{name}b": (3, 1)} if kernel == CROSS else None
                for part, side in (sides or {name: kernel}).items():
                    self.add_module(part, _Conv(channels, outputs, side, *stride))
                steps.append(tuple(sides or (name,)))
                channels = outputs
            self.branches.append(steps)
        if pool is not None:
            self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for steps in self.branches:
            y = x
            for names in steps:
                y = _join([self.get_submodule(name)(y) for name in names])
            found.append(y)
        if self.pool is None:
            return _join([*found, F.max_pool2d(x, 3, 2)])
        if self.pool == "average":
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            x = F.max_pool2d(x, 3, 1, 1)
        return _join([*found, self.branch_pool(x)])


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate channels."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def resize(x: Tensor, side: int) -> Tensor:
    """Resize images ``(B, C, H, W)`` to a square, bilinear and without half pixels.

    It is the method of TensorFlow 1, which the published FID takes.

    Pixel ``i`` of the result lies at ``i · H / side``, and no filter is widened for smaller images.

    >>> resize(torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]]), 4)[0, 0, 0].tolist()
    [0.0, 1.0, 2.0, 2.0]
    """
    for dim in (3, 2):
        size = x.shape[dim]
        place = torch.arange(side, device=x.device, dtype=x.dtype) * (size / side)
        low = place.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        share = (place - low).reshape(-1, *(1,) * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return x


class Inception:
    """Features of `InceptionV3` with name and hash, see `inception`.

    Args:
        net: The network.
        hash: SHA-256 of its file of weights.
        device: Device of the network.
    """

    family = "inception"

    def __init__(self, net: InceptionV3, hash: str, device: torch.device | str = "cpu") -> None:
        self.net, self.hash, self.device = net.to(device).eval(), hash, device
        self.published = hash == SHA256
        self.name = NAME if self.published else f"{NAME} of other weights"
        self.distance_name = "FID" if self.published else "Fréchet distance"

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of `InceptionV3` for images ``(B, 1 or 3, H, W)`` in [-1, 1]."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must have shape (B, 1 or 3, H, W), got {tuple(images.shape)}")

        def found(batch: Tensor) -> dict[str, Tensor]:
            pixels = to_uint8(batch).expand(-1, 3, -1, -1).to(self.device)
            return {name: x.float().to(batch.device) for name, x in self.net(pixels).items()}

        return in_batches(found, images, 50)

    def __call__(self, images: Tensor) -> Tensor:
        """Return features ``(B, 2048)`` of images ``(B, 1 or 3, H, W)`` in [-1, 1]."""
        return self.outputs(images)["features"]


def inception(weights: str | Path | None, device: torch.device | str = "cpu") -> Inception:
    """Load the features of the Fréchet Inception distance (FID).

    Only the Fréchet distance of these features, with the published weights, may be called FID: with
    other weights ``name`` and ``distance_name`` say so. Images are rounded by `to_uint8` and
    resized to 299×299 with the method of TensorFlow 1, see `resize`. Nothing is downloaded.

    Source: Heusel et al. 2017 (arXiv 1706.08500).

    Args:
        weights: File of the weights, as torch-fidelity and pytorch-fid publish it. A file that
            holds other objects than tensors is refused.
        device: Device of the network. Images may be on another device; their features are then on
            the device of the images.

    Returns:
        The features. Their ``hash`` is the SHA-256 of the file.

    Raises:
        ValueError: If the file does not exist, or holds other objects than the tensors of the
            network.
    """
    if weights is None or not Path(weights).is_file():
        raise ValueError(f"weights must be a file of InceptionV3 weights, got {weights}; {HELP}")
    file = Path(weights)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds of errors for such a file
        raise ValueError(f"weights must hold tensors only, got {file}; {HELP}") from error
    net = InceptionV3()
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"weights must hold the tensors of InceptionV3, got {file}; {HELP}"
        ) from error
    return Inception(net.requires_grad_(False), digest, device)
