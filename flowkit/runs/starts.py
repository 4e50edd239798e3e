"""Starts of a run's trajectories: source samples and conditions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowkit.data import SplitData
from flowkit.modules.flow import labels_of
from flowkit.sampling import sample_seeds, seeded_noise
from flowkit.types import Batch, Cond, to_device

FRESH = 1_000_000  # from this number on, no start is used to train or to choose


class Starts:
    """Source samples ``(count, *)`` and conditions, called as ``starts(first, count)``.

    Without data, start ``k`` is the noise of sample ``k`` with class ``k mod num_classes``.
    With data, starts are rows of the training split in turn; from number `FRESH` on they are rows
    of the test split.

    Args:
        shape: Shape of one state.
        num_classes: Number of classes of the run; None for a run without classes.
        seed: Seed of the noise.
        device: Device of the results.
        data: Data with source samples or conditions; with None, starts are noise and classes.
        seeding: Version of the noise's seeds, see `flowkit.sampling.sample_seeds`.

    Attributes:
        are_noise: True if source samples are standard normal noise.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        seed: int,
        device: torch.device,
        data: SplitData | None = None,
        seeding: int = 2,
    ) -> None:
        self.shape, self.num_classes, self.seed = shape, num_classes, seed
        self.device, self.data, self.seeding = device, data, seeding
        self.are_noise = data is None or given_source(data.train[:1], data) is None

    def __call__(self, first: int, count: int) -> tuple[Tensor, Cond]:
        """Return source samples and conditions of starts ``first`` to ``first + count − 1``."""
        number, x0 = first % FRESH, None
        if self.data is None:
            labels = choose_labels(None, number + count, self.num_classes)
            cond = None if labels is None else labels[number:]
        else:
            split = self.data.train if first < FRESH else self.data.test
            batch = split[[(number + k) % len(split) for k in range(count)]]
            x0, cond = given_source(batch, self.data), batch.get("cond")
        if x0 is None:
            seeds = sample_seeds(self.seed, first, count, self.seeding)
            x0 = seeded_noise(self.shape, seeds)
        return x0.to(self.device), to_device(cond, self.device)


def choose_labels(labels: Any, num_samples: int, num_classes: int | None) -> Tensor | None:
    """Return ``num_samples`` labels that cycle through the given labels, or through all classes.

    Without classes the result is None.

    Raises:
        ValueError: If labels are given for a run without classes, or if a label is out of range.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError(f"labels must be null for a run without classes, got {labels}")
        return None
    if labels is not None and not (
        isinstance(labels, Sequence) and all(isinstance(label, int) for label in labels)
    ):
        raise ValueError(f"labels must be a list of classes, such as [0,1], got {labels}")
    wanted = torch.tensor(range(num_classes) if labels is None else list(labels))
    if wanted.numel() == 0 or wanted.min() < 0 or wanted.max() >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes - 1}], got {wanted.tolist()}")
    return wanted.repeat(-(-num_samples // len(wanted)))[:num_samples]


def choose_samples(data: SplitData, labels: Any, num_samples: int) -> Batch:
    """Return the first samples of the test split, or the first with one of the given labels.

    Raises:
        ValueError: If the data have no labels, or if no sample of the test split has one of the
            given labels.
    """
    if labels is None:
        return data.test[:num_samples]
    wanted = choose_labels(labels, num_samples, data.num_classes)
    known = labels_of(data.test[:], data.num_classes)
    if known is None or wanted is None or not torch.isin(known, wanted).any():
        raise ValueError(f"labels must be among those of the test split, got {labels}")
    return data.test[torch.isin(known, wanted).nonzero()[:num_samples, 0]]


def given_source(batch: Batch, data: SplitData) -> Tensor | None:
    """Return the source samples ``(N, *)`` of a batch; None if samples start from any noise."""
    return None if data.x0_is_noise else batch.get("x0")


def noise_batches(shape: tuple[int, ...], seeds: range, batch_size: int) -> Sequence[Tensor]:
    """Return noise of consecutive seeds in batches; the noise of a seed is equal in any batch."""
    return _Noise(shape, seeds, batch_size)


@dataclass(frozen=True)
class _Noise(Sequence[Tensor]):
    """Batches of noise. A batch is drawn when it is read."""

    shape: tuple[int, ...]
    seeds: range
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(len(self.seeds) / self.batch_size)

    def __getitem__(self, number: Any) -> Tensor:
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = number * self.batch_size
        return seeded_noise(self.shape, self.seeds[first : first + self.batch_size])
