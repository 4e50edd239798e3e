"""What a fixed-step solve costs beside a hand-written loop, torchdiffeq and diffusers."""

import time
from statistics import median

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from torchdiffeq import odeint

from flowkit.sampling import ODESampler

STEPS = 200


def by_hand(velocity, x):
    x, t, h = x.clone(), x.new_empty(len(x)), 1 / STEPS
    for k in range(STEPS):
        x.add_(velocity(x, t.fill_(k / STEPS)), alpha=h)
    return x


def by_torchdiffeq(velocity, x):
    times = torch.linspace(0, 1, STEPS + 1)
    return odeint(lambda t, x: velocity(x, t.expand(len(x))), x, times, method="euler")[-1]


def by_diffusers(velocity, x):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / STEPS for k in range(STEPS)])
    for t in scheduler.timesteps:  # its t is 1000 (1 − ours), its velocity points to the noise
        v = velocity(x, (1 - t / 1000).expand(len(x)))
        x = scheduler.step(-v, t, x, return_dict=False)[0]
    return x


OTHERS = {
    "flowkit": ODESampler(STEPS),
    "torchdiffeq": by_torchdiffeq,
    "diffusers": by_diffusers,
}


class MLP(nn.Sequential):
    def __init__(self):
        hidden = [nn.Linear(3, 64), nn.SELU(), nn.Linear(64, 64), nn.SELU(), nn.Linear(64, 64)]
        super().__init__(*hidden, nn.SELU(), nn.Linear(64, 2))

    def forward(self, x, t, cond=None):
        return super().forward(torch.cat([x, t[:, None]], dim=1))


def null(x):
    v = torch.zeros_like(x)
    return lambda x, t, cond=None: v


# Time of this thread (the tests run on one), which others on the machine do not lengthen.
def seconds(loop, velocity, x):
    start = time.thread_time()
    loop(velocity, x)
    return time.thread_time() - start


@pytest.mark.benchmark
@pytest.mark.parametrize("batch", [256, 4096])
@pytest.mark.parametrize(("network", "limit", "rounds"), [("null", 1.2, 150), ("mlp", 1.03, 9)])
@torch.no_grad()
def test_a_solve_costs_little_more_than_its_evaluations(benchmark, network, limit, rounds, batch):
    x = torch.randn(batch, 2)
    velocity = null(x) if network == "null" else MLP()
    for loop in OTHERS.values():
        torch.testing.assert_close(loop(velocity, x), by_hand(velocity, x), rtol=1e-3, atol=1e-3)

    def beside(loop, rounds):
        """Medians of the seconds by hand and by the loop, in turns, and of their ratio."""
        pairs = [[seconds(f, velocity, x) for f in (by_hand, loop)] for _ in range(rounds)]
        columns = [*zip(*pairs, strict=True), [other / hand for hand, other in pairs]]
        return [median(column) for column in columns]

    benchmark.pedantic(by_hand, args=(velocity, x))
    print(f"\n{network}, state ({batch}, 2), {STEPS} Euler steps: us a step")
    ratios = {}
    for name, loop in OTHERS.items():
        hand, other, ratios[name] = beside(loop, rounds if name == "flowkit" else 3)
        hand, other = 1e6 * hand / STEPS, 1e6 * other / STEPS
        print(f"  {name:12} {other:9.2f}, by hand {hand:9.2f}: {ratios[name]:6.2f}x")
    assert ratios["flowkit"] <= limit
