"""Where a run's trajectories start, and their conditions."""

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

FRESH = 1_000_000  # where the starts begin that nothing is chosen or trained with


class Starts:
    """``starts(first, count)``: source samples of those numbers ``(count, *)``, and conditions.

    They are noise of seeds ``seed + first, …`` and classes in turn, or what the run's data bring:
    the training split in turn, from number `FRESH` on the test split.

    Args:
        shape: Of one state.
        num_classes: Of the run; None is none.
        seed: Of the first noise.
        device: Where to put them.
        data: What brings source samples or conditions; None is noise and labels.

    Attributes:
        are_noise: Whether source samples are standard normal noise.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        num_classes: int | None,
        seed: int,
        device: torch.device,
        data: SplitData | None = None,
    ):
        self.shape, self.num_classes, self.seed = shape, num_classes, seed
        self.device, self.data = device, data
        self.are_noise = data is None or given_source(data.train[:1], data) is None

    def __call__(self, first: int, count: int) -> tuple[Tensor, Cond]:
        """Return starts ``first`` to ``first + count``."""
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
    """Cycle through the labels asked for, or through all classes.

    Raises:
        ValueError: If labels are asked of a run without classes, or are out of range.
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
    """Return the first samples of the test split, or the first with the labels asked for.

    Raises:
        ValueError: If labels are asked of data without, or the split holds none of them.
    """
    if labels is None:
        return data.test[:num_samples]
    wanted = choose_labels(labels, num_samples, data.num_classes)
    known = labels_of(data.test[:], data.num_classes)
    if known is None or wanted is None or not torch.isin(known, wanted).any():
        raise ValueError(f"labels must be among those of the test split, got {labels}")
    return data.test[torch.isin(known, wanted).nonzero()[:num_samples, 0]]


def given_source(batch: Batch, data: SplitData) -> Tensor | None:
    """Return source samples ``(N, *)`` that samples have to start from; None is any noise."""
    return None if data.x0_is_noise else batch.get("x0")


def start(
    run: "Run", cfg: DictConfig, num_samples: int, x0: Tensor | None = None
) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Cut source samples into batches: those given, or noise of seeds ``cfg.seed, …``.

    Returns:
        The batches, of one size but the last, and a record of how they were made.

    Raises:
        RuntimeError: If the run has not seen a batch.
        ValueError: If a number of samples is not positive.
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
    """Noise of consecutive seeds, in batches; a seed's noise does not depend on the batches."""
    return _Noise(shape, seeds, batch_size)


@dataclass(frozen=True)
class _Noise(Sequence[Tensor]):
    """Batches of noise, drawn when asked for."""

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
    """What samples start from that are to be compared with the test split.

    Returns:
        Batches of source samples, the conditions of all, a record of the former and one of the
        latter.
    """
    data, test = run.data, run.data.test[:]
    rows, chosen = _rows_like(test, data, cfg.num_samples)
    given = given_source(test, data)
    x0, source = start(run, cfg, len(rows), None if given is None else given[rows])
    return x0, take(test.get("cond"), rows), source, chosen


def _rows_like(test: Batch, data: SplitData, num_samples: int) -> tuple[Tensor, str]:
    """Test samples whose start the generated ones share, and how they were chosen."""
    if brings_start(test, data):
        return torch.arange(min(num_samples, len(test["x1"]))), "of the test split"
    labels = labels_of(test, data.num_classes)
    if labels is None:  # nothing is shared
        labels = torch.zeros(len(test["x1"]))
    return proportional_rows(labels, num_samples), "labels in the proportions of the test split"


def proportional_rows(labels: Tensor, num_samples: int) -> Tensor:
    """Choose rows of ``labels (N,)`` that keep its proportions, to within one sample.

    A distance between sets of other proportions would measure those.

    >>> labels = torch.tensor([1, 0, 0, 0])
    >>> labels[proportional_rows(labels, 8)]
    tensor([0, 0, 0, 0, 0, 0, 1, 1])
    """
    places = (torch.arange(num_samples, dtype=torch.float64) + 0.5) * len(labels) / num_samples
    return labels.argsort(stable=True)[places.long()]
