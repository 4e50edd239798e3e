"""Starts of a run's trajectories: source samples and conditions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.data import SplitData
from flowkit.modules.flow import brings_start, labels_of
from flowkit.sampling import seeded_noise
from flowkit.types import Batch, Cond, take, to_device

if TYPE_CHECKING:
    from flowkit.runs.run import Run

FRESH = 1_000_000  # from this number on, no start is used to train or to choose


class Starts:
    """Source samples ``(count, *)`` and conditions, called as ``starts(first, count)``.

    Without data, start ``k`` is the noise of seed ``seed + k`` with class ``k mod num_classes``.
    With data, starts are rows of the training split in turn; from number `FRESH` on they are rows
    of the test split.

    Args:
        shape: Shape of one state.
        num_classes: Number of classes of the run; None for a run without classes.
        seed: Seed of the first noise.
        device: Device of the results.
        data: Data with source samples or conditions; with None, starts are noise and classes.

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
    ) -> None:
        self.shape, self.num_classes, self.seed = shape, num_classes, seed
        self.device, self.data = device, data
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
            x0 = seeded_noise(self.shape, range(self.seed + first, self.seed + first + count))
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


def start(
    run: "Run", cfg: DictConfig, num_samples: int, x0: Tensor | None = None
) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Cut source samples into batches: given samples, or noise of seeds ``cfg.seed, …``.

    Returns:
        The batches, of one size except for the last, and a record of their origin.

    Raises:
        RuntimeError: If the run has not seen a batch.
        ValueError: If ``num_samples`` or ``batch_size`` is below 1.
    """
    for name, number in (("num_samples", num_samples), ("batch_size", cfg.batch_size)):
        check_at_least(number, 1, name)
    shape, record = run.sample_shape, {"num_samples": num_samples, "batch_size": cfg.batch_size}
    if x0 is not None:
        return list(x0.split(cfg.batch_size)), {**record, "source": "test split", "seeds": None}
    seeds = range(cfg.seed, cfg.seed + num_samples)
    batches = noise_batches(shape, seeds, cfg.batch_size)
    return batches, {**record, "source": "noise", "seeds": [seeds.start, seeds.stop]}


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


def like_test(run: "Run", cfg: DictConfig) -> tuple[Sequence[Tensor], Cond, dict[str, Any], str]:
    """Return starts for samples that are compared with the test split.

    Returns:
        Batches of source samples, conditions of all samples, a record of the source samples, and
        the choice of conditions in words.
    """
    data, test = run.data, run.data.test[:]
    rows, chosen = _rows_like(test, data, cfg.num_samples)
    given = given_source(test, data)
    x0, source = start(run, cfg, len(rows), None if given is None else given[rows])
    return x0, take(test.get("cond"), rows), source, chosen


def _rows_like(test: Batch, data: SplitData, num_samples: int) -> tuple[Tensor, str]:
    """Return rows of the test split that give conditions (and starts), and the choice in words."""
    if brings_start(test, data):
        return torch.arange(min(num_samples, len(test["x1"]))), "of the test split"
    labels = labels_of(test, data.num_classes)
    if labels is None:  # then only the number of rows counts
        labels = torch.zeros(len(test["x1"]))
    return proportional_rows(labels, num_samples), "labels in the proportions of the test split"


def proportional_rows(labels: Tensor, num_samples: int) -> Tensor:
    """Return ``num_samples`` rows of ``labels (N,)`` in the proportions of ``labels``.

    Proportions are exact to within one sample. Between sets of different proportions a distance
    would also measure the difference in proportions.

    >>> labels = torch.tensor([1, 0, 0, 0])
    >>> labels[proportional_rows(labels, 8)]
    tensor([0, 0, 0, 0, 0, 0, 1, 1])
    """
    places = (torch.arange(num_samples, dtype=torch.float64) + 0.5) * len(labels) / num_samples
    return labels.argsort(stable=True)[places.long()]
