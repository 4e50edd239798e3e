"""What the costs of single steps and the dynamic program take."""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn

from flowkit.boss import bellman_grid, step_costs
from flowkit.grids import uniform

STEPS, SHAPE, NOISES = 100, (3, 32, 32), 64


class Network(nn.Sequential):
    def __init__(self):
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1)]
        super().__init__(*layers)

    def forward(self, x, t, cond=None):
        return super().forward(x) * (1 + t[:, None, None, None])


@torch.no_grad()
def storing_all_states(velocity, x0):
    """The definition: all states and velocities, then all pairs."""
    x, states, velocities = x0, [x0], []
    for k in range(STEPS):
        v = velocity(x, torch.full((len(x),), k / STEPS))
        x = x + v / STEPS
        states.append(x)
        velocities.append(v)
    states, velocities = torch.stack(states), torch.stack(velocities)
    costs = torch.full((STEPS + 1, STEPS + 1), torch.inf, dtype=torch.float64)
    for j in range(STEPS):
        lengths = (torch.arange(j + 1, STEPS + 1) - j) / STEPS
        # one start at a time: all pairs at once would take thousands of states
        for k, h in enumerate(lengths.tolist(), j + 1):
            error = states[k] - states[j] - h * velocities[j]
            costs[j, k] = error.square().sum(dtype=torch.float64) / len(x0)
    return costs


CALLS = {"all states": storing_all_states, "Gram": lambda net, x0: step_costs(net, x0, STEPS)}


def peak(name):
    """The most bytes that a call adds to its process, in a process of its own."""

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    torch.set_num_threads(1)
    network, x0 = Network(), torch.randn(NOISES, *SHAPE)
    CALLS[name](network, x0[:1])  # what is loaded at the first use
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    CALLS[name](network, x0)
    return status("VmHWM") - before


def seconds(call):
    start = time.thread_time()
    call()
    return time.thread_time() - start


@pytest.mark.benchmark
def test_costs_take_little_memory_and_no_more_time(benchmark):
    torch.manual_seed(0)
    network, x0 = Network(), torch.randn(NOISES, *SHAPE)
    stored, gram = (call(network, x0) for call in CALLS.values())
    torch.testing.assert_close(gram.clamp(min=1e-3), stored.clamp(min=1e-3), rtol=1e-3, atol=0)
    table = [[seconds(lambda c=c: c(network, x0)) for c in CALLS.values()] for _ in range(3)]
    stored_s, gram_s = (median(column) for column in zip(*table, strict=True))
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        stored_b, gram_b = pool.map(peak, CALLS)
    print(f"\n{STEPS} steps of {NOISES} noises {SHAPE}, network included")
    print(f"  all states {stored_s:6.2f} s {stored_b / 2**20:8.1f} MiB")
    print(f"  Gram       {gram_s:6.2f} s {gram_b / 2**20:8.1f} MiB")
    benchmark.pedantic(CALLS["Gram"], args=(network, x0), rounds=1)
    assert gram_s <= stored_s
    assert 10 * gram_b <= stored_b


@pytest.mark.benchmark
def test_the_dynamic_program(benchmark):
    costs = torch.rand(STEPS + 1, STEPS + 1, dtype=torch.float64)
    result = benchmark.pedantic(
        bellman_grid, args=(costs, uniform(STEPS), 10), rounds=20, warmup_rounds=2
    )
    print(f"\n{STEPS} fine steps, 10 steps: {1e3 * benchmark.stats['median']:.1f} ms")
    assert len(result) == 11
    assert benchmark.stats["median"] < 0.05
