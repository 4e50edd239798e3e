"""The module of weighted flow matching: what it logs and when, ranks, resumption."""

import csv

import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from torch.utils.data import DataLoader

from flowkit.couplings import Gibbs, Independent, Potentials
from flowkit.data import sample_toy
from flowkit.losses import flow_matching_loss
from flowkit.metrics import point_metrics
from flowkit.modules import ConditionalFlowMatching, WeightedFlowMatching, load_run
from flowkit.nn import MLP
from flowkit.provenance import tensor_hash
from flowkit.recipes.epsilon import epsilon
from flowkit.recipes.train import train
from flowkit.runs.resuming import resumed
from flowkit.sampling import ODESampler
from tests.recipes.conftest import TINY

TELEMETRY = {"ess", "log_weight_variance", "interaction", "tilt"}


def batch(seed: int = 0, size: int = 64) -> dict[str, torch.Tensor]:
    return {"x1": torch.randn(size, 2, generator=torch.Generator().manual_seed(seed))}


def test_loss_is_the_weighted_loss_and_its_telemetry():
    network = MLP((2,))
    ours = WeightedFlowMatching(network, epsilon=1.0).loss(
        batch(), torch.Generator().manual_seed(1)
    )
    plain = flow_matching_loss(
        network, batch(), coupling=Gibbs(1.0), generator=torch.Generator().manual_seed(1)
    )
    assert ours["loss"].equal(plain["loss"])
    assert ours.keys() == plain.keys() | TELEMETRY


def test_infinite_epsilon_trains_as_the_plain_module():
    torch.manual_seed(0)
    network = MLP((2,))
    modules = WeightedFlowMatching(network, epsilon=float("inf")), ConditionalFlowMatching(network)
    losses = [m.loss(batch(), torch.Generator().manual_seed(1))["loss"] for m in modules]
    assert losses[0].equal(losses[1])


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("every", [0, 3])
def test_telemetry_is_computed_at_logging_steps_only(tmp_path, monkeypatch, every):
    module = WeightedFlowMatching(MLP((2,)), epsilon=1.0)
    steps = []
    telemetry = module.coupling.telemetry

    def spy(pairs):
        steps.append((module.trainer.training, module.global_step + 1))
        return telemetry(pairs)

    monkeypatch.setattr(module.coupling, "telemetry", spy)
    batches = DataLoader([batch(k) for k in range(8)], batch_size=None)
    trainer = Trainer(
        max_steps=8,
        log_every_n_steps=every,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, batches, DataLoader([batch(9)], batch_size=None))
    trained = [step for training, step in steps if training]
    assert trained == ([3, 6, 8] if every else [])  # the last step is logged, too
    assert len(steps) == len(trained) + 1  # one validation batch
    assert all(f"val/{name}" in trainer.logged_metrics for name in TELEMETRY)


def _rows(run):
    for file in sorted(run.glob("logs/*/metrics.csv")):
        with file.open() as lines:
            yield from csv.DictReader(lines)


@pytest.mark.filterwarnings("ignore:only .* of the variance of Gibbs")
def test_resuming_a_debiased_run_goes_on_exactly(configure, tmp_path):
    """State of the coupling and all: 8 steps, and 5 steps + resume to 8, give equal losses."""
    options = [*TINY, "data=toy", "data.size=500", "module=weighted", "coupling=gibbs_potentials"]
    options += ["coupling.epsilon=1", "coupling.normalize=running", "coupling.debias.size=100"]
    options += ["trainer.log_every_n_steps=1", "trainer.val_check_interval=8"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configure("train", *options, "trainer.max_steps=8", f"run_dir={whole}"))
    train(configure("train", *options, "trainer.max_steps=5", f"run_dir={parts}"))
    train(resumed(configure("train", f"resume={parts}"), ["trainer.max_steps=8"]))
    losses = [[r["train/loss"] for r in _rows(run) if r["train/loss"]] for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    logged = [row["train/ess"] for row in _rows(whole) if row["train/loss"]]
    assert all(0 < float(value) <= 1 for value in logged)
    loaded = load_run(whole)
    assert 0.1 < loaded.coupling.log_z.exp() < 10
    assert len(tensor_hash(loaded.state_dict())) == 64
    assert isinstance(loaded.coupling.debias, Potentials)
    assert (loaded.coupling.epsilon, loaded.coupling.normalize) == (1, "running")
    assert loaded.loss({"x1": torch.randn(16, 2)})["loss"].isfinite()


def test_flowkit_epsilon_prints_a_table_and_saves_the_curve(configure, tmp_path, capsys):
    cfg = configure("epsilon", "data.size=400", "num_samples=300", f"out={tmp_path}", "target=ess")
    choice = epsilon(cfg)
    printed = capsys.readouterr().out
    assert f"epsilon   {choice.epsilon:.4g}" in printed
    assert printed.count("<-") == 1
    assert "chooses partners" in printed
    assert (tmp_path / "epsilon.png").read_bytes().startswith(b"\x89PNG")
    assert epsilon(cfg).epsilon == choice.epsilon


@pytest.mark.parametrize(
    "experiment", ["weighted_toy", "weighted_digits", "weighted_fashion_mnist"]
)
def test_every_cell_of_a_preset_trains_what_it_says(experiment, configure, tmp_path):
    table = configure("compare", f"experiment={experiment}", f"out={tmp_path}")
    for problem in table.problems.values():
        for name, coupling in table.couplings.items():
            overrides = [*table.overrides, *problem, *coupling, f"run_dir={tmp_path}"]
            cell = configure("train", *overrides)
            net, toy = cell.network, "toy" in experiment
            net.shape, net.num_classes = ([2], None) if toy else ([1, 8, 8], 10)
            cell.module.drop_cond = None
            module = instantiate(cell.module)
            x0, x1 = torch.randn(2, 64, *net.shape)
            label = None if toy else torch.arange(64) % 10
            pairs = module.coupling.pair(x0, 3 * x1 + 2, label)
            assert (pairs.log_weight is not None) == ("W-CFM" in name and "row softmax" not in name)
            if "W-CFM" in name:
                assert module.coupling.epsilon == float(name.split()[1])


@pytest.mark.slow
def test_debiasing_works_where_plain_weights_fail():
    """8 Gaussians to moons: closer to the data at the same ε, straighter than independent pairs."""

    def points(n):
        return {"x0": sample_toy("8gaussians", n)[0], "x1": sample_toy("moons", n)[0]}

    found = []
    for coupling in (Independent(), Gibbs(1.0), Gibbs(1.0, debias=Potentials())):
        torch.manual_seed(0)
        network = MLP((2,))
        optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
        annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
        for _ in range(1500):
            optimizer.zero_grad()
            flow_matching_loss(network, points(256), coupling=coupling)["loss"].backward()
            optimizer.step()
            annealing.step()
        torch.manual_seed(1)
        test, sampler = points(1000), ODESampler(30, "heun")
        with torch.no_grad():
            solution = sampler.solve(network, test["x0"], return_path=True)
        found.append(point_metrics(test["x1"], solution.x, solution, sampler.grid))
    independent, plain, debiased = found
    assert debiased["w2"] < 0.75 * plain["w2"]
    assert debiased["normalized_path_energy"] < 0.3 * independent["normalized_path_energy"]
    assert plain["path_energy_below_w2_squared"]
