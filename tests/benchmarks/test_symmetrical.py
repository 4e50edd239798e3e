"""Symmetrical flows as classifiers, beside plain classifiers of the same size."""

import math
import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowkit.autoencoders import Identity
from flowkit.metrics.labels import classification_metrics
from flowkit.modules import SymmetricalFlowMatching
from flowkit.nn import ResidualMLP
from flowkit.recipes.train import tell
from flowkit.sampling import ODESampler
from flowkit.symmetrical import OneHot

pytestmark = pytest.mark.benchmark

IMAGES, ROUNDS = 1000, 9


class Classifier(nn.Module):
    """A residual perceptron from pixels to logits: as many parameters as the flow's network."""

    def __init__(self, pixels: int, width: int, depth: int):
        super().__init__()
        self.inputs = nn.Linear(pixels, width)
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


def _classifier_of_the_size_of(net: nn.Module, pixels: int, depth: int = 3) -> Classifier:
    """Its width solves ``4 depth width² + (pixels + 10) width = parameters of net``, nearly."""
    a, b, size = 4 * depth, pixels + 10, _parameters(net)
    plain = Classifier(pixels, round((math.sqrt(b**2 + 4 * a * size) - b) / (2 * a)), depth)
    assert _parameters(plain) == pytest.approx(size, rel=0.03)
    return plain


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
    plain = _classifier_of_the_size_of(net, pixels=64).eval()
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


@pytest.mark.parametrize("experiment", ["symmetrical_digits", "symmetrical_fashion_mnist"])
def test_plain_classifier(benchmark, configure, experiment):
    """What the images and steps of an experiment make of a plain classifier of its network's size.

    To be read beside the experiment's own results; trained with the same optimizer, learning
    rates, averaging and clipping.
    """
    cfg = configure("train", f"experiment={experiment}")
    if "root" in cfg.data and not Path(cfg.data.root).is_dir():
        pytest.skip(f"needs {cfg.data.root}, see the header of the experiment")
    data = instantiate(cfg.data)
    data.setup()
    tell(cfg, data, Identity())
    torch.manual_seed(cfg.seed)
    net = _classifier_of_the_size_of(instantiate(cfg.model), math.prod(data.shape))
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(cfg.callback.ema.decay))
    optimizer = instantiate(cfg.optimizer)(net.parameters())
    schedule = instantiate(cfg.lr_scheduler)(optimizer)
    stream = data.stream()
    began = time.process_time()
    for step in range(cfg.trainer.max_steps):
        batch = stream[step]
        optimizer.zero_grad()
        F.cross_entropy(net(batch["x1"]), batch["cond"]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.trainer.gradient_clip_val)
        optimizer.step()
        schedule.step()
        average.update_parameters(net)
    seconds = time.process_time() - began
    test = data.test[:]
    with torch.no_grad():
        probabilities = average.module.eval()(test["x1"]).softmax(1)
    metrics = classification_metrics(probabilities, test["cond"])
    print(f"\n{experiment}: {_parameters(net):,} parameters, {seconds:.0f} s")
    for name in ("accuracy", "auc", "calibration_error"):
        print(f"{name.replace('_', ' '):<24} {metrics[name]:.4f}")
    print(f"{'area under risk':<24} {metrics['selective']['area_under_risk']:.4f}")
    benchmark.extra_info.update(metrics)
    benchmark.pedantic(net, (test["x1"],), rounds=1)
    assert metrics["num_samples"] == len(test["x1"])
    assert metrics["accuracy"] > 0.85
