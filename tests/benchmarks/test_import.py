"""Import time of flowkit beside that of torch, and of other toolkits (extra `bench`)."""

import importlib.util
import subprocess
import sys
import time
from statistics import median

import pytest

ROUNDS = 7
PEERS = ("torchcfm", "flow_matching.solver", "diffusers.schedulers", "torchdiffeq")


def seconds(module):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


@pytest.mark.benchmark
def test_import_costs_little_more_than_torch(benchmark):
    peers = [name for name in PEERS if importlib.util.find_spec(name.partition(".")[0])]
    modules = ("torch", "flowkit", *peers)
    for module in modules:
        seconds(module)  # compiled files and the disk cache

    def rounds():
        return [[seconds(module) for module in modules] for _ in range(ROUNDS)]

    spent = benchmark.pedantic(rounds, rounds=1)
    times = dict(zip(modules, map(median, zip(*spent, strict=True)), strict=True))
    print()
    for module, taken in times.items():
        print(f"import {module:22} {taken:5.2f} s, {taken / times['torch']:5.3f}x of torch's")
    assert times["flowkit"] <= 1.1 * times["torch"]
