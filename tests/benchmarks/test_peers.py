"""Training and sampling steps side by side with other toolkits, in one process (extra `bench`).

Times are those of this thread, which others on the machine do not lengthen, in turns; ratios are
medians of ratios of neighbors. Every contestant computes the same thing, which is checked.
"""

import time
import warnings
from statistics import median

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from torchdiffeq import odeint

from flowkit.couplings import Independent, MinibatchOT, cost_matrix
from flowkit.losses import flow_matching_loss
from flowkit.sampling import ODESampler

pytestmark = pytest.mark.benchmark


class MLP(nn.Sequential):
    """A network for points that is so small that everything around it shows."""

    def __init__(self, dim, width=128):
        super().__init__(
            nn.Linear(dim + 1, width), nn.SELU(), nn.Linear(width, width), nn.SELU(),
            nn.Linear(width, dim),
        )  # fmt: skip

    def forward(self, x, t, cond=None):
        return super().forward(torch.cat([x, t.expand(len(x))[:, None]], dim=1))


def compare(benchmark, title, contestants, rounds, limit=None):
    """Print microseconds and the ratio to flowkit of every contestant; flowkit comes first."""
    for run in contestants.values():
        for _ in range(3):
            run()
    spent = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.thread_time()
            run()
            spent[name].append(time.thread_time() - start)
    ours, best = spent["flowkit"], 0.0
    print(f"\n{title}")
    for name, seconds in spent.items():
        ratio = median(mine / other for mine, other in zip(ours, seconds, strict=True))
        print(f"  {name:24} {1e6 * median(seconds):10.0f} us, flowkit takes {ratio:5.2f}x of it")
        benchmark.extra_info[name] = ratio
        best = max(best, ratio)
    benchmark.pedantic(contestants["flowkit"], rounds=1)
    if limit is not None:
        assert best <= limit


@pytest.mark.parametrize("coupling", ["independent", "exact transport"])
@pytest.mark.parametrize("dim", [2, 784])
def test_training_step(benchmark, coupling, dim):
    """Pairs, path, loss, gradients and AdamW of 256 points."""
    cfm = pytest.importorskip("torchcfm.conditional_flow_matching", exc_type=ImportError)
    path = pytest.importorskip("flow_matching.path", exc_type=ImportError)
    transport = coupling != "independent"
    theirs = cfm.ConditionalFlowMatcher(0.0)
    if transport:
        theirs = cfm.ExactOptimalTransportConditionalFlowMatcher(0.0)
    straight, x1 = path.CondOTProbPath(), torch.randn(256, dim).tanh()

    def by_torchcfm(net):
        t, x_t, u = theirs.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return (net(x_t, t) - u).square().mean()

    def by_flow_matching(net):
        sample = straight.sample(t=torch.rand(len(x1)), x_0=torch.randn_like(x1), x_1=x1)
        return (net(sample.x_t, sample.t) - sample.dx_t).square().mean()

    pairing = MinibatchOT() if transport else Independent()
    losses = {
        "flowkit": lambda net: flow_matching_loss(net, {"x1": x1}, coupling=pairing)["loss"],
        "torchcfm": by_torchcfm,
    }
    if not transport:
        losses["flow_matching"] = by_flow_matching

    def step(loss):
        torch.manual_seed(0)
        net = MLP(dim)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

        def run():
            optimizer.zero_grad(set_to_none=True)
            value = loss(net)
            value.backward()
            optimizer.step()
            return value.item()

        return run

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        means = {
            name: sum(loss(MLP(dim)).item() for _ in range(20)) / 20
            for name, loss in losses.items()
        }
        assert max(means.values()) < 1.1 * min(means.values())
        title = f"training step, {coupling}, state (256, {dim})"
        steps = {name: step(loss) for name, loss in losses.items()}
        compare(benchmark, title, steps, rounds=15 if transport else 60, limit=1.1)


STEPS = 50


@torch.no_grad()
@pytest.mark.parametrize("dim", [2, 784])
def test_sampling(benchmark, dim):
    """50 Euler steps of 256 points."""
    solver = pytest.importorskip("flow_matching.solver", exc_type=ImportError)
    torch.manual_seed(0)
    net, x0 = MLP(dim), torch.randn(256, dim)
    times = torch.linspace(0, 1, STEPS + 1)
    sampler, facebook = ODESampler(STEPS), solver.ODESolver(net)

    def by_diffusers():
        scheduler, x = FlowMatchEulerDiscreteScheduler(), x0
        scheduler.set_timesteps(sigmas=[1 - k / STEPS for k in range(STEPS)])
        for t in scheduler.timesteps:  # its t is 1000 (1 − ours), its velocity points to the noise
            x = scheduler.step(-net(x, 1 - t / 1000), t, x, return_dict=False)[0]
        return x

    contestants = {
        "flowkit": lambda: sampler(net, x0),
        "torchdiffeq": lambda: odeint(lambda t, x: net(x, t), x0, times, method="euler")[-1],
        "flow_matching": lambda: facebook.sample(x0, step_size=1 / STEPS),
        "diffusers' Euler loop": by_diffusers,
    }
    for run in contestants.values():
        torch.testing.assert_close(run(), sampler(net, x0), rtol=1e-3, atol=1e-3)
    title = f"{STEPS} Euler steps, state (256, {dim})"
    compare(benchmark, title, contestants, rounds=15, limit=1.1)


@pytest.mark.parametrize(("batch", "dim"), [(256, 784), (1024, 784)])
def test_cost_matrix(benchmark, batch, dim):
    """Squared distances of all pairs; torchcfm's are torch.cdist's, squared."""
    a, b = torch.randn(2, batch, dim)
    contestants = {
        "flowkit": lambda: cost_matrix(a, b, "sqeuclidean"),
        "torchcfm (torch.cdist²)": lambda: torch.cdist(a, b) ** 2,
    }
    torch.testing.assert_close(*(run() for run in contestants.values()), rtol=1e-3, atol=1e-2)
    compare(benchmark, f"cost matrix ({batch}, {batch}) of {dim} dimensions", contestants, 30)
