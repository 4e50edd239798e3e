"""What blocks cost, and what feature residuals save, as ratios of times in one process."""

import time
from statistics import median

import pytest
import torch

from flowkit import grids
from flowkit.blockwise import (
    Blockwise,
    BlockwiseDiT,
    blockwise_loss,
    copies,
    part_flops,
    predicted_gain,
)
from flowkit.blockwise.losses import draw_segments
from flowkit.nn import DiT
from flowkit.sampling import ODESampler

SHAPE = (4, 16, 16)  # 64 tokens


def interleaved(functions, rounds=9):
    """Median seconds of each, all taking turns."""
    spent = [[] for _ in functions]
    for k in range(rounds + 1):
        for function, times in zip(functions, spent, strict=True):
            start = time.perf_counter()
            function()
            if k:  # the first round warms up
                times.append(time.perf_counter() - start)
    return [median(times) for times in spent]


def blocks(edges=6, **options):
    """Trunk, stacks and residual in the proportions of the published size, 20 : 5 : 4."""
    sizes = {"width": 128, "heads": 4, "trunk_depth": 10, "stack_depth": 3, "residual_depth": 2}
    return BlockwiseDiT(SHAPE, edges=edges, **{**sizes, **options}).requires_grad_(False).eval()


@pytest.mark.benchmark
@torch.no_grad()
def test_feature_residuals_save_time_beside_flops(benchmark):
    """At least half of what FLOPs predict: modulation of every token is work they do not see."""
    flow = blocks()
    x0 = torch.randn(8, *SHAPE)
    parts = part_flops(flow, x0)
    print("\nsteps a segment   predicted by FLOPs   measured")
    for steps in (1, 2, 4, 8):
        sampler = ODESampler(grids.blockwise(6, steps))

        def solve(mode, sampler=sampler):
            flow.feature_mode = mode
            sampler(flow, x0)

        full, fra = interleaved([lambda: solve("full"), lambda: solve("fra")], rounds=3)
        predicted, measured = predicted_gain(parts, steps), full / fra
        print(f"{steps:15d}   {predicted:18.2f}   {measured:8.2f}")
        assert measured - 1 >= 0.5 * (predicted - 1) - 0.05
    benchmark.pedantic(solve, args=("fra",), rounds=1)


@pytest.mark.benchmark
@torch.no_grad()
def test_blocks_add_next_to_nothing_to_a_solve(benchmark):
    net = DiT((1, 8, 8), width=64, depth=2, heads=2).requires_grad_(False).eval()
    flow, x0, sampler = Blockwise(None, copies(net, 6), 6), torch.randn(4, 1, 8, 8), ODESampler(24)
    plain, bound = interleaved([lambda: sampler(net, x0), lambda: sampler(flow, x0)], rounds=31)
    print(f"\n24 steps of a tiny transformer: {bound / plain:.3f} times as long in six blocks")
    benchmark.pedantic(sampler, args=(flow, x0), rounds=3)
    assert bound / plain < 1.1


@pytest.mark.benchmark
def test_six_stacks_train_nearly_as_fast_as_one(benchmark):
    flows = [blocks(edges, residual_depth=None).requires_grad_(True).train() for edges in (1, 6)]
    batch = {"x1": torch.randn(24, *SHAPE)}

    def step(flow):
        blockwise_loss(flow, draw_segments(flow, batch))[0]["loss"].backward()

    one, six = interleaved([lambda: step(flows[0]), lambda: step(flows[1])], rounds=5)
    print(f"\na training step takes {six / one:.2f} times as long with six stacks as with one")
    benchmark.pedantic(step, args=(flows[1],), rounds=1)
    assert six / one < 1.3
