"""Toy data: random points in the plane."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_choice
from flowkit.couplings import Coupling
from flowkit.data.arrays import Arrays
from flowkit.data.splits import SplitData
from flowkit.data.stream import Stream, keyed_generator
from flowkit.types import Batch

Samples = tuple[Tensor, Tensor | None]
"""Points ``(n, 2)`` and their labels ``(n,)``, or None for a set without parts."""


def _components(centers: Tensor, std: float, n: int, generator: torch.Generator | None) -> Samples:
    """Draw from a mixture of equal Gaussians with the given centers ``(k, 2)``."""
    labels = torch.randint(len(centers), (n,), generator=generator)
    return centers[labels] + std * torch.randn(n, 2, generator=generator), labels


def _circle(count: int) -> Tensor:
    """Return ``count`` evenly spaced points on the unit circle, from (1, 0) on."""
    angles = 2 * math.pi * torch.arange(count) / count
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def _gaussian(n: int, generator: torch.Generator | None) -> Samples:
    """Draw from N(0, I)."""
    return torch.randn(n, 2, generator=generator), None


def _gaussians(count: int) -> Callable[[int, torch.Generator | None], Samples]:
    """Return a function that draws from Gaussians on a circle of radius 5."""

    # The published code uses √var = √0.1 as the variance per axis; the published tables need it.
    def draw(n: int, generator: torch.Generator | None) -> Samples:
        return _components(5 * _circle(count), 0.1**0.25, n, generator)

    return draw


def _mixture(n: int, generator: torch.Generator | None) -> Samples:
    """Draw from two Gaussians, see `sample_toy`."""
    return _components(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.5, n, generator)


def _moons(n: int, generator: torch.Generator | None) -> Samples:
    """Draw from two half circles, see `sample_toy`."""
    labels = torch.randint(2, (n,), generator=generator)
    angle = math.pi * torch.rand(n, generator=generator)
    arc = torch.stack([angle.cos(), angle.sin()], dim=1)
    points = torch.where(labels[:, None] == 0, arc, torch.tensor([1.0, 0.5]) - arc)
    return 3 * (points + 0.2 * torch.rand(n, 1, generator=generator)) - 1, labels


def _checkerboard(n: int, generator: torch.Generator | None) -> Samples:
    """Draw from eight cells of a checkerboard, see `sample_toy`."""
    cells = torch.randint(8, (n,), generator=generator)
    column = cells // 2
    corner = torch.stack([column, 2 * (cells % 2) + column % 2], dim=1)
    return 2 * (corner + torch.rand(n, 2, generator=generator)) - 4, cells


_SETS = {
    "gaussian": _gaussian,
    "mixture": _mixture,
    "5gaussians": _gaussians(5),
    "8gaussians": _gaussians(8),
    "moons": _moons,
    "checkerboard": _checkerboard,
}
_NUM_CLASSES = {"mixture": 2, "5gaussians": 5, "8gaussians": 8, "moons": 2, "checkerboard": 8}


def sample_toy(name: str, n: int, generator: torch.Generator | None = None) -> Samples:
    """Draw ``n`` independent points of a two-dimensional distribution, with labels of its parts.

    - ``gaussian``: N(0, I), without labels.
    - ``mixture``: N((-2, 0), 0.25 I) and N((2, 0), 0.25 I), each with probability 1/2.
    - ``5gaussians``, ``8gaussians``: 5 or 8 Gaussians of equal probability. Their centers are
      evenly spaced on a circle of radius 5, from (5, 0) on. The variance is √0.1 ≈ 0.316 per axis.
    - ``moons``: ``3 m - 1``, with the point m on the upper half circle (cos a, sin a) or on the
      lower half circle (1 - cos a, 1/2 - sin a). The angle a is uniform in [0, π]. Both coordinates
      of m are shifted by the same uniform draw from [0, 0.2].
    - ``checkerboard``: uniform on eight of the sixteen cells of size 2x2 in [-4, 4]². The cell at
      the lower left is one of them.

    Source of ``8gaussians`` and ``moons``: the published code of Tong et al., *Improving and
    Generalizing Flow-Based Generative Models with Minibatch Optimal Transport* (2023,
    arXiv 2302.00482). Their code spaces the angles of ``moons`` evenly and draws equal numbers of
    both classes. Here angles and classes are independent random draws.

    Args:
        name: Name of the distribution.
        n: Number of points, at least 0.
        generator: Draws the points; None means torch's global generator.

    Returns:
        Points ``(n, 2)`` as float32, and labels ``(n,)`` as int64 or None.

    Raises:
        ValueError: If the name is unknown or ``n`` is negative.

    >>> points, labels = sample_toy("moons", 1000, torch.Generator().manual_seed(0))
    >>> points.shape, labels.unique().tolist()
    (torch.Size([1000, 2]), [0, 1])
    """
    check_choice(name, _SETS, "name of a toy set")
    check_at_least(n, 0, "n")
    return _SETS[name](n, generator)


def _draw(source: str, target: str, cond: str | None, n: int, generator: torch.Generator) -> Batch:
    """Draw a batch of ``n`` points, see `Toy`."""
    x1, labels = sample_toy(target, n, generator)
    columns = {"x1": x1}
    if cond == "continuous":
        columns["cond"] = x1[:, :1].clone()
    elif cond is not None and labels is not None:
        columns["cond"] = labels
    if source != "gaussian":
        columns["x0"] = sample_toy(source, n, generator)[0]
    return cast(Batch, columns)


@dataclass(frozen=True, eq=False)
class FreshPoints(Stream):
    """Training stream that draws new points at every step.

    The points of a step depend on the seed, the step, and the number of samples over all ranks.
    Arguments: those of `flowkit.data.stream.Stream`, and ``source``, ``target`` and ``cond`` of
    `Toy`.
    """

    source: str = "gaussian"
    target: str = "moons"
    cond: str | None = None

    def samples(self, step: int) -> Batch:
        """Draw the points of all ranks, and return those of this rank."""
        generator = keyed_generator(self.seed, "toy", step)
        batch = _draw(self.source, self.target, self.cond, self.total, generator)
        columns = cast(Mapping[str, Tensor], batch)
        return cast(Batch, {key: column[self.share] for key, column in columns.items()})


class Toy(SplitData):
    """Random points in the plane: ``x1 (B, 2)`` and optionally ``x0 (B, 2)`` and ``cond``.

    Training draws new points at every step. The splits are fixed samples. If the source is not
    ``gaussian``, batches hold ``x0``, independent of ``x1``.

    Source of the conditions ``"binary"`` and ``"continuous"`` on ``moons``: Cheng and Schwing, *The
    Curse of Conditions* (C²OT, 2025, arXiv 2503.10636).

    Args:
        source: The distribution at t = 0, a name of `sample_toy`.
        target: The distribution at t = 1, a name of `sample_toy`.
        cond: The condition of a target point. ``"label"``: the number of its part, int64 ``(B,)``.
            ``"binary"``: the same, for a target of two parts. ``"continuous"``: its first
            coordinate, float32 ``(B, 1)``. None: no condition.
        size: Number of points in each split.
        batch_size: Samples per process and training step.
        split_seed: The seed of the splits.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs target with source points in the workers of the loader; see `SplitData`.

    Raises:
        ValueError: If a name is unknown, ``size`` is below 1, or the target has no such condition.

    >>> data = Toy("8gaussians", "moons", cond="binary", batch_size=4)
    >>> data.setup()
    >>> {key: tuple(value.shape) for key, value in data.stream()[0].items()}
    {'x1': (4, 2), 'cond': (4,), 'x0': (4, 2)}
    """

    def __init__(
        self,
        source: str = "gaussian",
        target: str = "moons",
        cond: Literal["label", "binary", "continuous"] | None = None,
        size: int = 10_000,
        batch_size: int = 256,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, coupling=coupling
        )
        check_choice(source, _SETS, "source")
        check_choice(target, _SETS, "target")
        check_at_least(size, 1, "size")
        if cond is not None:
            check_choice(cond, ("label", "binary", "continuous"), "cond")
        if cond in ("label", "binary"):
            self.num_classes = _NUM_CLASSES.get(target)
            if self.num_classes is None or (cond == "binary" and self.num_classes != 2):
                raise ValueError(
                    f"cond must fit the target, got {cond!r} for {target} with "
                    f"{self.num_classes or 'no'} labels"
                )
        self.source, self.target, self.cond = source, target, cond
        self.size = size
        self.split_seed = split_seed

    def load(self) -> Mapping[str, Arrays]:
        """Draw the three splits."""
        draws = {
            name: _draw(
                self.source,
                self.target,
                self.cond,
                self.size,
                keyed_generator(self.split_seed, "toy split", name),
            )
            for name in ("train", "val", "test")
        }
        return {name: Arrays(cast(Any, batch), self.target) for name, batch in draws.items()}

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Return the training batches of one rank, indexed by step."""
        return FreshPoints(
            self.train,
            self.batch_size,
            self.seed,
            rank,
            world_size,
            coupling=self.coupling,
            source=self.source,
            target=self.target,
            cond=self.cond,
        )
