"""Handwritten digits of scikit-learn, 8x8 pixels."""

from collections.abc import Mapping

import torch

from flowkit.couplings import Coupling
from flowkit.data.arrays import Arrays
from flowkit.data.splits import SplitData, partition


class Digits(SplitData):
    """Handwritten digits of scikit-learn, 1797 images: ``x1 (B, 1, 8, 8)``, ``cond (B,)`` in 0…9.

    The gray levels 0…16 are mapped to [-1, 1] by ``x / 8 - 1``, without rounding.

    Source: Alpaydin and Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998 (the test
    part of this data set).

    Args:
        batch_size: Samples per process and training step.
        val_fraction: The share of the validation split, stratified by class.
        test_fraction: The share of the test split, stratified by class.
        split_seed: The seed of the splits.
        seed: The seed of the training stream.
        num_workers: Processes that prepare batches in advance; 0 means the main process.
        coupling: Pairs data with noise in the workers of the loader; see `SplitData`.

    >>> data = Digits(batch_size=32)
    >>> data.setup()
    >>> data.shape, data.num_classes, len(data.train), len(data.val), len(data.test)
    ((1, 8, 8), 10, 1437, 180, 180)
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch["x1"].shape, batch["cond"].dtype
    (torch.Size([32, 1, 8, 8]), torch.int64)
    """

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        coupling: Coupling | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size, seed=seed, num_workers=num_workers, coupling=coupling
        )
        self.fractions = (val_fraction, test_fraction)
        self.split_seed = split_seed

    def load(self) -> Mapping[str, Arrays]:
        """Read the digits from scikit-learn and divide them into splits."""
        from sklearn.datasets import load_digits

        pixels, targets = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
        labels = torch.from_numpy(targets).long()
        self.num_classes, self.class_names = 10, [str(digit) for digit in range(10)]
        parts = partition(len(images), self.fractions, self.split_seed, labels)
        return {
            name: Arrays({"x1": images[part], "cond": labels[part]}, "digits")
            for name, part in zip(("train", "val", "test"), parts, strict=True)
        }
