"""Fréchet distance at 2048 features against torchmetrics' ``FrechetInceptionDistance.compute``."""

import time
from statistics import median

import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from flowkit.metrics import frechet_distance, frechet_from_moments

DIM = 2048


class Vectors(torch.nn.Module):
    """Takes "images" that are the features already."""

    num_features = DIM

    def forward(self, images):
        return images.flatten(1)


def features(count, seed):
    """Correlated features with a decaying spectrum."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, DIM, dtype=torch.float64)
    x = torch.randn(count, DIM, generator=generator, dtype=torch.float64) * scale
    x += 0.3 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return x


def filled_metric(a, b):
    metric = FrechetInceptionDistance(feature=Vectors()).set_dtype(torch.float64)
    metric.update(a[:, None, None], real=True)
    metric.update(b[:, None, None], real=False)
    return metric


def seconds(function):
    start = time.perf_counter()
    value = function()
    return time.perf_counter() - start, float(value)


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("count", "given", "limit"),
    [
        pytest.param(4000, "moments", 0.35, id="moments"),
        # Both sum 4000 outer products as well.
        pytest.param(4000, "features", 0.6, id="features"),
        pytest.param(10_000, "moments", 0.35, id="moments of 10 000"),
        pytest.param(1000, "features", 0.35, id="fewer samples than features"),
    ],
)
def test_faster_than_torchmetrics(benchmark, count, given, limit):
    a, b = (features(count, seed) for seed in (0, 1))
    moments = (a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    metric = filled_metric(a, b)

    def ours():
        return frechet_distance(a, b) if given == "features" else frechet_from_moments(*moments)

    def theirs():
        metric._computed = None  # compute() caches
        return (filled_metric(a, b) if given == "features" else metric).compute()

    def interleaved():
        return [(seconds(ours), seconds(theirs)) for _ in range(3)]

    pairs = benchmark.pedantic(interleaved, rounds=1, warmup_rounds=0)
    ours_s, theirs_s = (median(pair[side][0] for pair in pairs) for side in (0, 1))
    print(f"\n{ours_s:.2f} s, torchmetrics {theirs_s:.2f} s, {ours_s / theirs_s:.2f}x")
    # Where samples are few, torchmetrics' eigenvalues of a singular product carry noise.
    assert pairs[0][0][1] == pytest.approx(pairs[0][1][1], rel=1e-3)
    assert ours_s <= limit * theirs_s
