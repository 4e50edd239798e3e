"""Import time of flowkit beside that of torch."""

import subprocess
import sys
import time
from statistics import median

import pytest

ROUNDS = 7


def seconds(module):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


@pytest.mark.benchmark
def test_import_costs_little_more_than_torch(benchmark):
    for module in ("torch", "flowkit"):
        seconds(module)  # compiled files and the disk cache

    def rounds():
        return [(seconds("torch"), seconds("flowkit")) for _ in range(ROUNDS)]

    pairs = benchmark.pedantic(rounds, rounds=1)
    torch_s, flowkit_s = (median(side) for side in zip(*pairs, strict=True))
    print(f"\nimport torch {torch_s:.2f} s, flowkit {flowkit_s:.2f} s: {flowkit_s / torch_s:.3f}x")
    assert flowkit_s <= 1.1 * torch_s
