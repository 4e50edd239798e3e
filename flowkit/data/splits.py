"""Splits train, val and test, and their loaders: the common part of all data modules."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowkit.checks import check_at_least, check_choice
from flowkit.couplings import Coupling
from flowkit.data.arrays import Split
from flowkit.data.stream import InOrder, Steps, Stream, keyed_generator
from flowkit.distributed import batches_seen
from flowkit.types import Batch

SPLITS = ("train", "val", "test")
LISTED = 500_000  # files; a record of more files holds their number and fingerprints only


def partition(
    size: int, fractions: Sequence[float], seed: int, labels: Tensor | None = None
) -> list[Tensor]:
    """Divide ``size`` samples at random into a remainder and one part per fraction.

    The samples are shuffled and then sorted by label. A part takes samples at evenly spaced places
    of this order. So the count of each class in a part is proportional to its count in the data,
    up to two samples.

    Args:
        size: The number of samples.
        fractions: The share of each part, each in (0, 1), with a sum below 1.
        seed: The same seed gives the same parts.
        labels: Integer classes ``(size,)``; None divides without classes.

    Returns:
        The positions of the remainder, then the positions of each part. The parts are disjoint and
        in random order.

    Raises:
        ValueError: If a fraction is out of range, or there are too few samples for all parts.

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
    """Data module with the splits train, val and test; the superclass of all data modules here.

    Training batches come from an endless `flowkit.data.stream.Stream`. A resumed run continues the
    stream at the right step. The splits val and test are read in order. Each rank takes its
    own share of a batch, so Lightning's trainer needs ``max_epochs=-1``, ``max_steps`` and
    ``use_distributed_sampler=False``.

    A new data set is a subclass with a method ``load``.

    Args:
        batch_size: Samples per process and training step, at least 1.
        seed: The seed of the training stream. It does not change the splits.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        flip: Mirror training images left to right with probability one half.
        coupling: Pairs each training batch with noise in the workers of the loader; the batches
            then hold ``x0`` too. None leaves the pairing to the training module.

    Attributes:
        num_classes: The number of classes, or None for data without classes; set by ``setup``.
        class_names: The names of the classes, or None if they have no names.
        notes: What the reader of files has to say, for example on files that it left out; set by
            ``setup``, part of the summary.
        files: SHA-256 and split of each file by its name, for data of single files; set by
            ``setup``.
        changes: What differs from the record of a run, if the user accepts it; else None.
        known: The record of these data in a run. Files and classes keep the splits and the numbers
            that they have in the record. None without a record.
        x0_is_noise: True if the source samples ``x0`` of the splits are standard normal noise. Then
            a model can sample from new noise instead.
        recipe: The command that uses a run on these data, for model cards: sample, separate,
            convert or rollout.

    Raises:
        ValueError: If ``batch_size`` or ``num_workers`` is out of range.

    >>> from flowkit.data.arrays import Arrays
    >>> class Line(SplitData):
    ...     def load(self):
    ...         parts = partition(100, [0.1, 0.1], seed=0)
    ...         x1 = torch.linspace(-1, 1, 100)[:, None]
    ...         names = ("train", "val", "test")
    ...         return {name: Arrays({"x1": x1[part]}) for name, part in zip(names, parts)}
    >>> data = Line(batch_size=4, seed=0, num_workers=0)
    >>> data.setup()
    >>> data.summary()
    'Line: 80 train, 10 val, 10 test samples of shape (1,), no classes'
    >>> next(iter(data.train_dataloader()))["x1"].shape
    torch.Size([4, 1])
    """

    num_classes: int | None = None
    class_names: list[str] | None = None
    x0_is_noise: bool = False
    recipe: str = "sample"
    notes: Sequence[str] = ()
    files: Mapping[str, tuple[str, str | None]] = MappingProxyType({})
    known: Mapping[str, Any] | None = None
    changes: str | None = None

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int,
        num_workers: int,
        flip: bool = False,
        coupling: Coupling | None = None,
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
        """Read the data, set ``num_classes`` and ``class_names``, and return the splits by name."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Read the data by `load`, at the first call only.

        Raises:
            TypeError: If `load` returns other things than splits.
        """
        if not self._splits:
            loaded = self.load()
            for part in loaded.values() if isinstance(loaded, Mapping) else [loaded]:
                if not hasattr(part, "fingerprint"):
                    raise TypeError(
                        "load must return splits by name, such as {'train': flowkit.data.Arrays("
                        f"{{'x1': images}}), ...}}, got {type(part).__name__}"
                    )
            self._splits = loaded

    def split(self, name: str) -> Split:
        """Return a split, for example for ``split("val")[:100]["x1"]``.

        Raises:
            RuntimeError: If ``setup`` was not called.
            ValueError: If ``name`` is not train, val or test.
        """
        check_choice(name, SPLITS, "split")
        if not self._splits:
            raise RuntimeError(
                f"{type(self).__name__} must be set up before use, got no data; call setup() first"
            )
        return self._splits[name]

    @property
    def train(self) -> Split:
        """Training split."""
        return self.split("train")

    @property
    def val(self) -> Split:
        """Validation split."""
        return self.split("val")

    @property
    def test(self) -> Split:
        """Test split."""
        return self.split("test")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, for example ``(C, H, W)`` or ``(d,)``."""
        return tuple(self.val[:1]["x1"].shape[1:])

    def summary(self) -> str:
        """Describe the data in one line: number of samples, shape, classes and conditions.

        >>> from flowkit.data import Digits
        >>> data = Digits()
        >>> data.setup()
        >>> data.summary()
        'Digits: 1,437 train, 180 val, 180 test samples of shape (1, 8, 8), 10 classes (0, 1, 2, …)'
        """
        counts = ", ".join(f"{len(self.split(name)):,} {name}" for name in SPLITS)
        found, first = f"{counts} samples of shape {self.shape}", self.val[:1]
        cond, names = first.get("cond"), self.class_names or []
        if self.num_classes:
            listed = ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])])
            kind = "class" if self.num_classes == 1 else "classes"
            found += f", {self.num_classes} {kind}" + (f" ({listed})" if listed else "")
        elif isinstance(cond, Tensor) and cond.shape[1:] == first["x1"].shape[2:] != ():
            found += ", masks"
        else:
            found += ", no classes" + ("" if cond is None else " but other conditions")
        found += ", source samples" if "x0" in first else ""
        return "; ".join([f"{type(self).__name__}: {found}", *self.notes])

    def sizes(self) -> dict[str, int]:
        """Return the number of samples of each split."""
        return {name: len(split) for name, split in self._splits.items()}

    def fingerprint(self, name: str) -> str:
        """Return the SHA-256 of the content of a split."""
        return self.split(name).fingerprint()

    def record(self) -> dict[str, Any]:
        """Return what a run keeps about its data, as JSON values.

        Returns:
            ``kind``, ``root``, ``classes``, ``num_classes``, ``preprocessing``, the number of
            samples and the fingerprint of each of the ``splits``, ``split_by`` for data that may
            be divided in several ways, and SHA-256 and split of all ``files``; without files, or
            with too many of them, ``files`` is empty.
        """
        root = getattr(self, "root", None) or getattr(self, "path", None)
        settings = ("image_size", "channels", "colors")
        return {
            "kind": type(self).__name__,
            "root": str(Path(root).resolve()) if root and Path(root).is_dir() else None,
            "classes": self.class_names,
            "num_classes": self.num_classes,
            "preprocessing": {k: getattr(self, k) for k in settings if hasattr(self, k)},
            "splits": {
                name: {"samples": len(split), "fingerprint": split.fingerprint()}
                for name, split in self._splits.items()
            },
            "split_by": getattr(self, "split_by", None),
            "files": {
                name: list(entry)
                for name, entry in sorted(self.files.items())
                if len(self.files) <= LISTED
            },
        }

    def stream(self, rank: int = 0, world_size: int = 1) -> Stream:
        """Return the training batches of one rank, indexed by step."""
        return Stream(
            self.train, self.batch_size, self.seed, rank, world_size, self.flip, self.coupling
        )

    def dataloader(self, name: str, batch_size: int | None = None) -> DataLoader[Batch]:
        """Return a loader over a split in order. Rank ``r`` of ``n`` reads samples ``r::n``."""
        size = self.batch_size if batch_size is None else batch_size
        return self._loader(InOrder(self.split(name), size, *self._rank()))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the endless training loader, which starts at the current step of the trainer."""
        stream = self.stream(*self._rank())
        return self._loader(stream, sampler=Steps(stream, self._consumed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return a loader over the validation split."""
        return self.dataloader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return a loader over the test split."""
        return self.dataloader("test")

    def _rank(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _consumed(self) -> int:
        trainer = cast(Any, self.trainer)
        return 0 if trainer is None or trainer.overfit_batches else batches_seen(trainer)

    def _loader(self, batches: Dataset[Batch], sampler: Steps | None = None) -> DataLoader[Batch]:
        """Return a loader over whole batches, which need no collation."""
        return DataLoader(
            batches,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
