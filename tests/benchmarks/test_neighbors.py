"""Peak memory and time of precision and recall, 10 000 images beside 10 000, 2048 features."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, time, torch
from flowkit.metrics import prdc
torch.set_num_threads(2)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux
real, fake = torch.randn(2, 10_000, 2048, generator=torch.Generator().manual_seed(0))
prdc(real[:50], fake[:50], 3)
before, start = peak(), time.perf_counter()
prdc(real, fake, 3)
print(peak() - before, time.perf_counter() - start)
"""


@pytest.mark.benchmark
def test_precision_and_recall_in_blocks(benchmark):
    """The features themselves are 164 MB, and not counted."""

    def measured():
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [float(x) for x in done.stdout.split()]

    megabytes, seconds = benchmark.pedantic(measured, rounds=1, warmup_rounds=0)
    print(f"\n{megabytes:.0f} MB, {seconds:.1f} s")
    assert megabytes < 1000
