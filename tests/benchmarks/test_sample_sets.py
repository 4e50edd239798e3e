"""Reading of sample sets: against Pillow alone, and beside the feature network's own calls."""

import subprocess
import sys
import time
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.data.broken import FORMATS
from flowkit.data.image_files import folder_of_images

FILES = 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """PNG files of 32x32 pixels in color, smooth as pictures are."""
    root = tmp_path_factory.mktemp("pngs")
    small = np.random.default_rng(0).integers(0, 256, (FILES, 5, 5, 3), dtype=np.uint8)
    for k, one in enumerate(small):
        Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC).save(root / f"{k}.png")
    return root


def pillow(root):
    """Pillow and NumPy alone."""
    images = []
    for k in range(FILES):
        with Image.open(root / f"{k}.png", formats=FORMATS) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images)


@pytest.mark.benchmark
def test_reading_png_files_against_pillow_alone(benchmark, folder):
    found = folder_of_images(folder, "samples")

    def ours():
        return [found.read(rows).pixels for rows in torch.arange(FILES).split(256)]

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    rounds = [(seconds(ours), seconds(lambda: pillow(folder))) for _ in range(7)]
    share = median(b / a for a, b in rounds)
    per_second = FILES / median(a for a, _ in rounds)
    benchmark.extra_info.update(share_of_pillow=share, images_per_second=per_second)
    benchmark.pedantic(ours, rounds=3)
    print(f"\n{per_second:,.0f} images of 32x32 a second, {share:.2f} of Pillow alone")
    assert share > 0.9 or per_second > 5000


EVALUATE = """
import resource, sys, time
from pathlib import Path
import torch
from lightning.fabric import Fabric
from torch import nn
from flowkit.data.npz import Npz
from flowkit.data.sample_sets import NpzImages
from flowkit.runs.judging import Watch, see

torch.set_num_threads(1)
file, width = sys.argv[1], int(sys.argv[2])

class Network:
    name = hash = "network"
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 2048),
    ).requires_grad_(False)
    spent = 0.0

    def __call__(self, images):
        start = time.perf_counter()
        found = self.net(images)
        self.spent += time.perf_counter() - start
        return found

network = Network()
images = NpzImages(Npz.open(file))
watch = Watch(network, Fabric(accelerator="cpu"), Path(file).parent, 256, 3)
start = time.perf_counter()
found = see(watch, images, torch.arange(len(images)), "samples")
whole = time.perf_counter() - start
assert found.features.shape == (len(images), 2048)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(whole, network.spent, peak)
"""


def evaluated(folder, count, width):
    """Seconds, those of the network, and peak memory in GB of a process of its own."""
    file = folder / "samples.npz"
    rng = np.random.default_rng(0)
    np.savez(file, arr_0=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    command = [sys.executable, "-c", EVALUATE, str(file), str(width)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in result.stdout.split()]


@pytest.mark.benchmark
def test_the_memory_of_50_000_images_of_an_npz_file(benchmark, tmp_path):
    """Of the whole process, with 2048 features of all images, which are 0.4 GB of it."""
    _, _, peak = benchmark.pedantic(evaluated, (tmp_path, 50_000, 8), rounds=1)
    benchmark.extra_info["peak_gb"] = peak
    print(f"\npeak {peak:.2f} GB")
    assert peak < 1.5


@pytest.mark.benchmark
def test_the_time_of_an_npz_file_beside_the_network(benchmark, tmp_path):
    """A network of about 3 ms an image on one core; Inception takes ten times as long."""
    whole, own, _ = benchmark.pedantic(evaluated, (tmp_path, 6_000, 192), rounds=1)
    benchmark.extra_info["ratio"] = whole / own
    print(f"\n{1e3 * own / 6000:.1f} ms an image in the network, {whole / own:.3f} of it in all")
    assert whole / own < 1.1


METRICS = """
import resource, sys
import torch
from flowkit.metrics import FeatureSet, Pixels, feature_metrics

torch.set_num_threads(1)
count, width = map(int, sys.argv[1:])
generator = torch.Generator().manual_seed(0)
few = torch.randn(2, 200, 2, generator=generator)
feature_metrics(*map(FeatureSet, few), Pixels())  # imports all
a, b = torch.randn(count + 10_000, width, generator=generator).split([count, 10_000])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
feature_metrics(FeatureSet(a), FeatureSet(b), Pixels())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - start) / 2**20, 4 * width * (count + 10_000) / 2**30)
"""


@pytest.mark.benchmark
def test_the_memory_of_all_metrics_beside_the_features(benchmark):
    """Of features in float32, which precision holds once more in float64."""

    def measured():
        command = [sys.executable, "-c", METRICS, "12000", "256"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return [float(value) for value in result.stdout.split()]

    more, own = benchmark.pedantic(measured, rounds=1)
    benchmark.extra_info.update(more_gb=more, features_gb=own)
    print(f"\\n{more:.2f} GB more than the features of {own:.2f} GB")
    assert more < 3 * own + 0.4  # blocks of distances take most of it
