"""Where a run's trajectories start: what grids are sought with and pairs are made of."""

from typing import Any

from torch import Tensor

from flowkit.modules import FlowModule
from flowkit.recipes.sample import choose_labels, given_source, test_data
from flowkit.sampling import seeded_noise
from flowkit.types import Cond, to_device

FRESH = 1_000_000  # where the starts begin that nothing is chosen or trained with


class Starts:
    """``starts(first, count)``: source samples of those numbers ``(count, *)``, and conditions.

    They are noise of seeds ``seed + first, …`` and classes in turn, or what the run's data bring:
    the training split in turn, from number `FRESH` on the test split.

    Args:
        module: The run's.
        trained: The run's configuration.
        seed: Of the first noise.
        device: Where to put them.

    Attributes:
        are_noise: Whether source samples are standard normal noise.

    Raises:
        RuntimeError: If the run has not seen a batch.
    """

    def __init__(self, module: FlowModule, trained: dict[str, Any], seed: int, device: str):
        if module.sample_shape is None:
            raise RuntimeError("run must have trained at least one step, got no sample shape")
        self.shape, self.num_classes = module.sample_shape, trained["num_classes"]
        self.seed, self.device = seed, device
        self.data = test_data(trained) if trained.get("needs_data") else None
        self.are_noise = self.data is None or given_source(self.data.train[:1], self.data) is None

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
