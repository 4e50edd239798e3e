"""What a training step costs beside a hand-written one."""

import statistics
import time
from itertools import pairwise

import pytest
import torch
from diffusers import UNet2DModel
from lightning import Trainer
from torch.utils.data import DataLoader

from flowkit.modules import ConditionalFlowMatching, MeanFlowMatching
from flowkit.nn import DiffusersVelocity, DiT, ResidualMLP, unet2d

pytestmark = pytest.mark.benchmark

BATCH, STEPS = 32, 12


def _net(channels_last: bool) -> DiffusersVelocity:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DiffusersVelocity(unet, channels_last=channels_last)


def _optimizer(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


def _by_hand(net, optimizer, x1):
    x0, t = torch.randn_like(x1), torch.rand(len(x1))
    s = t[:, None, None, None]
    loss = (net((1 - s) * x0 + s * x1, t) - (x1 - x0)).square().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _ours(module, optimizer, x1):
    loss = module.loss({"x1": x1})["loss"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _medians(steps: dict, rounds: int = STEPS) -> dict[str, float]:
    seconds = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_training_step(benchmark, tmp_path):
    """Our loss costs at most 1.03x a hand-written step; Lightning's share is printed."""
    x1 = torch.rand(BATCH, 1, 28, 28) * 2 - 1
    nets = {name: _net(True) for name in ("hand", "ours", "plain memory")}
    nets["plain memory"] = _net(False)
    optimizers = {name: _optimizer(net) for name, net in nets.items()}
    module = ConditionalFlowMatching(nets["ours"])
    seconds = _medians(
        {
            "hand-written": lambda: _by_hand(nets["hand"], optimizers["hand"], x1),
            "flowkit": lambda: _ours(module, optimizers["ours"], x1),
            "hand-written, no channels_last": lambda: _by_hand(
                nets["plain memory"], optimizers["plain memory"], x1
            ),
        }
    )
    trainer = Trainer(
        max_steps=STEPS + 2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    stamps: list[float] = []
    lit = ConditionalFlowMatching(_net(True), optimizer=lambda p: torch.optim.AdamW(p, fused=True))
    lit.velocity.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter()))
    trainer.fit(lit, DataLoader([{"x1": x1}] * (STEPS + 2), batch_size=None))
    steps = [b - a for a, b in pairwise(stamps[2:])]
    seconds["flowkit in Lightning's trainer"] = statistics.median(steps)

    hand = seconds["hand-written"]
    for name, value in seconds.items():
        print(f"\n{name:<32} {1e3 * value:8.2f} ms  {value / hand:5.2f}x", end="")
    print()
    benchmark.extra_info.update(seconds)
    benchmark.pedantic(lambda: _ours(module, optimizers["ours"], x1), rounds=1)
    assert seconds["flowkit"] <= 1.03 * hand


NETWORKS = {
    "perceptron": (lambda n: ResidualMLP((1, 8, 8), num_times=n), (128, 1, 8, 8)),
    "DiT": (lambda n: DiT((4, 8, 8), 2, 96, 4, 3, num_times=n), (32, 4, 8, 8)),
    "UNet": (lambda n: unet2d((1, 16, 16), width=32, num_times=n), (16, 1, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_of_a_mean_flow(benchmark, name):
    """Beside a step of a plain flow; half of the batch needs a derivative along the flow."""
    make, shape = NETWORKS[name]
    x1 = torch.randn(shape)
    modules = [ConditionalFlowMatching(make(1)), MeanFlowMatching(make(2))]
    optimizers = [_optimizer(module) for module in modules]
    steps = {
        type(module).__name__: lambda m=module, o=optimizer: _ours(m, o, x1)
        for module, optimizer in zip(modules, optimizers, strict=True)
    }
    plain, mean = _medians(steps).values()
    benchmark.extra_info["ratio"] = mean / plain
    print(f"\n{name}: a step of a mean flow takes {mean / plain:.2f} of a plain one")
    benchmark.pedantic(steps["MeanFlowMatching"], rounds=1)
    assert mean < 2.6 * plain
