"""How much faster whole batches are than samples that are collated one by one."""

import itertools
import time
from statistics import median

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from flowkit.data.arrays import Arrays
from flowkit.data.stream import Steps, Stream
from flowkit.metrics import from_uint8

STEPS = 50


class Samples(Dataset):
    """The usual way: one sample per item."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["x1"])

    def __getitem__(self, i):
        return {"x1": from_uint8(self.columns["x1"][i]), "cond": self.columns["cond"][i]}


def seconds(loader):
    start = time.perf_counter()
    for _ in itertools.islice(loader, STEPS):
        pass
    return time.perf_counter() - start


@pytest.mark.benchmark
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)], ids=str)
def test_whole_batches_against_single_samples(benchmark, shape):
    columns = {
        "x1": torch.randint(0, 256, (20_000, *shape), dtype=torch.uint8),
        "cond": torch.randint(0, 10, (20_000,)),
    }
    stream = Stream(Arrays(columns), batch_size=128, seed=0)
    whole = DataLoader(stream, batch_size=None, sampler=Steps(stream, lambda: 0))
    single = DataLoader(Samples(columns), batch_size=128, shuffle=True)
    rounds = [(seconds(whole), seconds(single)) for _ in range(7)]
    ratio = median(b for _, b in rounds) / median(a for a, _ in rounds)
    benchmark.extra_info["times_faster"] = ratio
    benchmark.pedantic(seconds, args=(whole,), rounds=5)
    print(
        f"\n{shape}: {1e3 * median(a for a, _ in rounds) / STEPS:.3f} ms a batch of 128, "
        f"{ratio:.1f} times faster than one by one"
    )
