"""What all data modules share: three splits, and the loaders over them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from flowkit.checks import check_at_least, check_choice
from flowkit.data.arrays import Split
from flowkit.data.stream import InOrder, Steps, Stream, keyed_generator
from flowkit.distributed import batches_seen
from flowkit.types import Batch


def partition(
    size: int, fractions: Sequence[float], seed: int, labels: Tensor | None = None
) -> list[Tensor]:
    """Cut ``size`` samples at random into a remainder and one part per fraction.

    A part takes evenly spaced places of the shuffled samples sorted by label, so that every
    class is represented in proportion, to within two samples.

    Args:
        size: The number of samples.
        fractions: The share of each part, each in (0, 1), below 1 together.
        seed: The same seed gives the same parts.
        labels: Integer classes ``(size,)``.

    Returns:
        Positions of the remainder, then of each part; disjoint, in random order.

    Raises:
        ValueError: If fractions are out of range, or samples too few for a part each.

    >>> train, val, test = partition(100, [0.1, 0.2], seed=0)
    >>> len(train), len(val), len(test)
    (70, 10, 20)
    """
    if not (all(f > 0 for f in fractions) and sum(fractions) < 1):
        raise ValueError(
            f"fractions of the splits must be positive and sum to less than 1, got {fractions}"
        )
    check_at_least(size, len(fractions) + 1, "number of samples")
    shuffled = torch.randperm(size, generator=keyed_generator(seed, "split"))
    left = shuffled if labels is None else shuffled[labels[shuffled].argsort(stable=True)]
    owner = torch.zeros(size, dtype=torch.long)
    for part, fraction in enumerate(fractions, start=1):
        count = max(1, round(fraction * size))
        places = ((torch.arange(count, dtype=torch.float64) + 0.5) * len(left) / count).long()
        owner[left[places]] = part
        left = left[owner[left] == 0]
    if not len(left):
        raise ValueError(
            f"fractions of the splits must leave samples for training, got {fractions} of {size}"
        )
    return [shuffled[owner[shuffled] == part] for part in range(len(fractions) + 1)]


class SplitData(LightningDataModule):
    """A data set in three splits: train, val and test.

    Training batches come from an endless ``Stream`` that resumes exactly; the other splits
    are read in order. Give Lightning's trainer ``max_epochs=-1``, ``max_steps`` and
    ``use_distributed_sampler=False``: each rank takes its own share here.

    A data set is added by writing ``load``.

    Args:
        batch_size: Samples per process and step.
        seed: The seed of the training stream; how the splits are cut does not depend on it.
        num_workers: Processes that read ahead.
        flip: Mirror training images left to right with probability one half.
        coupling: Anything with ``pair(x0, x1, cond, generator) -> Pairs``: training batches
            then hold ``x0`` as well, paired by the loader's workers.

    Attributes:
        num_classes: The number of labels, or None without labels; known after ``setup``.
        class_names: Their names where known.
        x0_is_noise: Whether source samples in the splits are standard normal noise, so that a
            model samples from any noise rather than from them.

    Raises:
        ValueError: If ``batch_size`` or ``num_workers`` is out of range.
    """

    num_classes: int | None = None
    class_names: list[str] | None = None
    x0_is_noise: bool = False

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        num_workers: int,
        flip: bool = False,
        coupling: Any = None,
    ) -> None:
        super().__init__()
        check_at_least(batch_size, 1, "batch_size")
        check_at_least(num_workers, 0, "num_workers")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.flip = flip
        self.coupling = coupling
        self._splits: Mapping[str, Split] = {}

    @abstractmethod
    def load(self) -> Mapping[str, Split]:
        """Read the data; return the splits train, val and test, and set the classes."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read the data, once."""
        if not self._splits:
            self._splits = self.load()

    def split(self, name: str) -> Split:
        """Return a whole split: ``split("val")[:100]["x1"]``.

        Raises:
            RuntimeError: Before ``setup``.
            ValueError: If ``name`` is not train, val or test.
        """
        check_choice(name, ("train", "val", "test"), "split")
        if not self._splits:
            raise RuntimeError(
                f"{type(self).__name__} must be set up before use, got no data; call setup() first"
            )
        return self._splits[name]

    @property
    def train(self) -> Split:
        """The training split."""
        return self.split("train")

    @property
    def val(self) -> Split:
        """The validation split."""
        return self.split("val")

    @property
    def test(self) -> Split:
        """The test split."""
        return self.split("test")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample: ``(C, H, W)`` or ``(d,)``."""
        return tuple(self.val[:1]["x1"].shape[1:])

    def summary(self) -> str:
        """Say in a line what was found: samples, their shape, classes and other conditions.

        >>> from flowkit.data import Digits
        >>> data = Digits()
        >>> data.setup()
        >>> data.summary()
        'Digits: 1,437 train, 180 val, 180 test samples of shape (1, 8, 8), 10 classes (0, 1, 2, …)'
        """
        counts = ", ".join(f"{len(self.split(name)):,} {name}" for name in ("train", "val", "test"))
        found, first = f"{counts} samples of shape {self.shape}", self.val[:1]
        cond, names = first.get("cond"), self.class_names or []
        if self.num_classes:
            listed = ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])])
            found += f", {self.num_classes} classes" + (f" ({listed})" if listed else "")
        elif isinstance(cond, Tensor) and cond.shape[1:] == first["x1"].shape[2:] != ():
            found += ", masks"
        else:
            found += ", no classes" + ("" if cond is None else " but other conditions")
        return f"{type(self).__name__}: {found}" + (", source samples" if "x0" in first else "")

    def fingerprint(self, name: str) -> str:
        """Return the SHA-256 of a split's content."""
        return self.split(name).fingerprint()

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Return the training batches of one rank, indexed by step."""
        return Stream(
            self.train, self.batch_size, self.seed, rank, world_size, self.flip, self.coupling
        )

    def dataloader(self, name: str, batch_size: int | None = None) -> DataLoader[Batch]:
        """Return a loader over a whole split in order; each rank gets a strided part of it."""
        size = self.batch_size if batch_size is None else batch_size
        return self._loader(InOrder(self.split(name), size, *self._rank()))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the endless training loader, which starts where the trainer stands."""
        stream = self.stream(*self._rank())
        return self._loader(stream, sampler=Steps(stream, self._consumed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return a loader over the validation split."""
        return self.dataloader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return a loader over the test split."""
        return self.dataloader("test")

    def _rank(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _consumed(self) -> int:
        trainer = cast(Any, self.trainer)
        return 0 if trainer is None or trainer.overfit_batches else batches_seen(trainer)

    def _loader(self, batches: Any, sampler: Steps | None = None) -> DataLoader[Batch]:
        # The items are whole batches already, so nothing is collated.
        return DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
