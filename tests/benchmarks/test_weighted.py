"""What a training step costs with every coupling, by batch size, in one process.

Milliseconds of one thread (of 2 CPU cores without other work), and the share of weights in a step
with independent pairs. The aim is at most 2 % at any batch where exact transport costs more than
the network: met on digits (1.6 million parameters; from batch 2048), missed in the plane, where
one of 8.7 thousand parameters makes a step hardly more than its calls (from batch 256).

8 Gaussians to moons
 batch  indep.   Gibbs    rows  divis. potent.  Sinkh.   exact  weights
    64    0.85    1.00    1.23    1.69    1.63    8.57    1.38   12.75%
   128    0.79    0.82    1.35    2.01    1.73    6.11    1.65   12.33%
   256    0.90    0.96    2.74    3.87    3.70    13.7    3.12   10.38%
   512    1.27    1.29    8.33    6.95    6.61            9.43    8.29%
  1024    1.82    1.96    28.2    12.2    12.3            34.2    5.90%
  2048    3.36    3.50     106    24.3    24.0             199    5.66%
  4096    6.28    6.23     507    46.9    45.6            1217    4.03%

digits
 batch  indep.   Gibbs    rows  divis. potent.  Sinkh.   exact  weights
    64    13.5    13.6    13.9    14.4    14.4    17.0    14.1    1.94%
   128    21.2    21.0    21.9    22.7    22.6    26.1    21.7    1.42%
   256    35.8    36.0    38.3    38.7    38.3    48.5    37.5    0.95%
   512    68.1    66.8    74.6    72.7    72.2            73.1    0.56%
  1024     128     127     153     140     173             172    0.32%
  2048     264     253     365     289     282             428    0.19%
  4096     503     520    1015     551     543            1768    0.12%
"""

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
from flowkit.data import Digits, sample_toy
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
    return MLP((2,)), sample_toy("8gaussians", batch)[0], sample_toy("moons", batch)[0]


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
