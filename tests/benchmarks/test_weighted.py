"""What a training step costs with every coupling, by batch size, in one process."""

import statistics
import time

import pytest
import torch

from flowkit.couplings import (
    Division,
    Gibbs,
    Independent,
    MinibatchOT,
    Potentials,
    RowSoftmax,
    Sinkhorn,
)
from flowkit.data import Digits
from flowkit.data.toy import sample
from flowkit.losses import flow_matching_loss
from flowkit.nn import MLP, ResidualMLP

pytestmark = pytest.mark.benchmark

BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)


def couplings() -> dict:
    return {
        "independent": Independent(),
        "Gibbs": Gibbs(2.0),
        "row softmax": Gibbs(2.0, debias=RowSoftmax()),
        "division": Gibbs(2.0, debias=Division(1024)),
        "potentials": Gibbs(2.0, debias=Potentials(1024)),
        "Sinkhorn": Sinkhorn(2.0, "euclidean"),
        "exact OT": MinibatchOT(),
    }


def points(batch: int):
    """8 Gaussians to moons, and the network of the toy tables."""
    return MLP((2,)), sample("8gaussians", batch)[0], sample("moons", batch)[0]


def digits(batch: int):
    """Noise to digits, and the network of the quickstart."""
    data = Digits()
    data.setup()
    x1 = data.train[torch.randint(len(data.train), (batch,))]["x1"]
    return ResidualMLP((1, 8, 8)), torch.randn(x1.shape), x1


def step(network, optimizer, batch, coupling) -> None:
    loss = flow_matching_loss(network, batch, coupling=coupling)["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def weigh(batch, gibbs) -> None:
    """All that weights add to a step: making them, and multiplying squares, energies, gradients."""
    weight = gibbs.pair(batch["x0"], batch["x1"]).log_weight.exp()
    weight = weight.reshape(-1, *(1,) * (batch["x1"].ndim - 1))
    for x in (batch["x0"], batch["x1"], batch["x0"]):
        weight * x


# Time of this thread (the tests run on one), which others on the machine do not lengthen.
def medians(functions: dict, rounds: int) -> dict[str, float]:
    seconds = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            if round_:
                seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("problem", [points, digits])
def test_training_step_by_batch_size(benchmark, problem):
    """On digits, weights cost at most 2 % of a step where exact transport outweighs the network."""
    print(f"\n{problem.__doc__}\n batch", *(f"{name:>12}" for name in couplings()), end="")
    print("  [ms]  weights alone")
    for size in BATCHES:
        torch.manual_seed(0)
        network, x0, x1 = problem(size)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
        batch, found = {"x0": x0, "x1": x1}, couplings()
        if size > 256:
            del found["Sinkhorn"]  # seconds a step
        steps = {
            name: lambda c=c, a=(network, optimizer, batch): step(*a, c)
            for name, c in found.items()
        }
        seconds = medians(steps, rounds=3 if size >= 512 else 9)
        alone = medians(
            {
                "step": steps["independent"],
                "weights": lambda b=batch, g=found["Gibbs"]: weigh(b, g),
            },
            rounds=100 if size <= 512 else 15,
        )
        share = alone["weights"] / alone["step"]
        cells = (f"{1e3 * seconds[n]:12.2f}" if n in seconds else " " * 12 for n in couplings())
        print(f"{size:6d}", *cells, f"{share:20.2%}")
        benchmark.extra_info[str(size)] = {**seconds, "share of weights": share}
        transport = seconds["exact OT"] - seconds["independent"]
        if problem is digits and transport > seconds["independent"]:
            assert share <= 0.02
    benchmark.pedantic(steps["Gibbs"], rounds=1)
