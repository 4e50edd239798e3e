"""One-step classification beside plain classifiers of the same size, in one process."""

import statistics
import time

import pytest
import torch
from torch import nn

from flowkit.codecs import OneHot
from flowkit.modules.symmetrical import SymmetricalFlowMatching
from flowkit.nn import ResidualMLP
from flowkit.sampling import ODESampler

pytestmark = pytest.mark.benchmark

IMAGES, ROUNDS = 1000, 9


class Classifier(nn.Module):
    """A residual perceptron from pixels to logits: as many parameters as the flow's network."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.inputs = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(depth)
        )
        self.outputs = nn.Linear(width, 10)

    def forward(self, images):
        h = self.inputs(images.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return self.outputs(h)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def test_one_step_classification(benchmark):
    """N images cost N network rows, and at most 1.25x the time of the bare network."""
    torch.manual_seed(0)
    images = torch.randn(IMAGES, 1, 8, 8)
    net = ResidualMLP((11, 8, 8), width=256, depth=3, num_times=2).eval()
    module = SymmetricalFlowMatching(net, OneHot(10)).eval()
    module.loss({"x1": images[:10], "cond": torch.arange(10)})
    plain = Classifier(width=411, depth=3).eval()
    assert _parameters(plain) == pytest.approx(_parameters(net), rel=0.03)
    state, ones = torch.randn(IMAGES, 11, 8, 8), torch.ones(IMAGES, 2)
    rows = []
    handle = net.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    module.classify(images)
    handle.remove()
    assert rows == [IMAGES]

    calls = {
        "classify, one step": lambda: module.classify(images),
        "the bare network": lambda: net(state, ones)[:, 1:].mean((2, 3)).softmax(1),
        "plain classifier, as many parameters": lambda: plain(images).softmax(1),
        "classify, 25 steps": lambda: module.classify(images, ODESampler(25)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        ratio = value / median["the bare network"]
        print(f"\n{name:<38} {IMAGES / value:9.0f} images/s  {ratio:6.2f}x", end="")
    print()
    benchmark.extra_info.update(median)
    benchmark.pedantic(calls["classify, one step"], rounds=1)
    assert median["classify, one step"] <= 1.25 * median["the bare network"]
