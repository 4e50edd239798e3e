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


class ResidualMLP(nn.Module):
    """Two hidden layers of 256, so small that a solver's own work shows."""

    def __init__(self, dim):
        super().__init__()
        self.first, self.second = nn.Linear(dim + 1, 256), nn.Linear(256, 256)
        self.last = nn.Linear(256, dim)

    def forward(self, x, t, cond=None):
        h = nn.functional.silu(self.first(torch.cat([x, t[:, None]], dim=1)))
        return self.last(h + nn.functional.silu(self.second(h)))


@pytest.mark.benchmark
@pytest.mark.parametrize("dim", [2, 64])
@pytest.mark.parametrize("batch", [64, 256])
@torch.no_grad()
def test_an_adaptive_solve_costs_little_more_than_its_evaluations(benchmark, batch, dim):
    """Beside the network alone, called as often on one state, and torchdiffeq's dopri5."""
    torch.manual_seed(0)
    net, x, t = ResidualMLP(dim), torch.randn(batch, dim), torch.full((batch,), 0.5)
    sampler, times = ODESampler(1, "dopri5"), torch.tensor([0.0, 1.0]).double()
    calls = sampler.solve(net, x).nfe
    loops = {
        "flowkit": sampler,
        "torchdiffeq": lambda velocity, x: odeint(
            lambda t, x: velocity(x, t.to(x).expand(len(x))),
            x,
            times,
            rtol=1e-5,
            atol=1e-5,
            method="dopri5",
            options={"step_t": times[1:]},
        )[-1],
    }
    torch.testing.assert_close(*(loop(net, x) for loop in loops.values()), rtol=1e-5, atol=1e-5)

    def alone(velocity, x):
        for _ in range(calls):
            velocity(x, t)

    benchmark.pedantic(sampler, args=(net, x))
    print(f"\ndopri5, state ({batch}, {dim}), {calls} evaluations: time over the network's alone")
    ratios = {}
    for name, loop in loops.items():
        pairs = [[seconds(f, net, x) for f in (alone, loop)] for _ in range(41)]
        ratios[name] = median(total / network for network, total in pairs)
        print(f"  {name:12} {ratios[name]:6.2f}x")
    assert ratios["flowkit"] <= 1.35
