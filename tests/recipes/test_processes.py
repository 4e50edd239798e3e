"""Two processes do what one does with the joint batch. They are started once for all tests."""

import os
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.distributed import FileStore, destroy_process_group, init_process_group
from torch.multiprocessing import start_processes
from torch.testing import assert_close
from torch.utils.data import DataLoader

from flowkit.autoencoders import Identity
from flowkit.couplings import MinibatchOT, Sinkhorn
from flowkit.distributed import place
from flowkit.losses import flow_matching_loss
from flowkit.modules import (
    ConditionalFlowMatching,
    ConditionGrid,
    FullySharded,
    LatentFlowMatching,
    MeanFlowMatching,
    condition_grid,
)
from flowkit.modules.sharding import even_validation, shard_if_asked
from flowkit.nn import DiT, ResidualMLP
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.sample import sample
from flowkit.sampling import ODESampler
from tests.conftest import CONF

BATCH, STEPS = 12, 6
QUIET: Any = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}


def stream(step: int) -> dict[str, Tensor]:
    """The joint batch of a step: pairs are given, and which of their pixels count."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, BATCH, 1, 4, 4, generator=generator)
    mask = (torch.rand(BATCH, 1, 4, 4, generator=generator) < 0.7).float()
    return {"x0": x[0], "x1": x[1] + 1, "mask": mask, "cond": torch.arange(BATCH) % 3}


def share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    rank, world = place()
    return {name: value[rank::world] for name, value in batch.items()}


class Steps(LightningDataModule):
    """Each process's share of the joint batches."""

    def train_dataloader(self):
        return DataLoader([share(stream(step)) for step in range(STEPS)], batch_size=None)

    def val_dataloader(self):
        batch = stream(99)
        del batch["mask"]  # in validation, every rank counts its own
        return DataLoader([share(batch)], batch_size=None)


class EvenTimes(NamedTuple):
    """This process's share of evenly spaced times: nothing is drawn."""

    def __call__(self, batch, device=None, generator=None):
        rank, world = place()
        return torch.linspace(0, 1, batch * world)[rank::world]


class TwoTimes(EvenTimes):
    """Ends of steps, and in the next call their starts, halfway to the noise."""

    calls = 0

    def __call__(self, batch, device=None, generator=None):
        TwoTimes.calls += 1
        return super().__call__(batch) * (0.5 if TwoTimes.calls % 2 else 1)


def networks() -> dict:
    torch.manual_seed(3)
    found = {
        "ddp": ResidualMLP((1, 4, 4), width=16, depth=1, num_classes=3),
        "mean": ResidualMLP((1, 4, 4), width=16, depth=1, num_classes=3, num_times=2),
        "fsdp": DiT((1, 4, 4), width=16, depth=2, heads=2, num_classes=3),
    }
    for net in found.values():  # they start with an output of zero
        last = net.outputs.linear if isinstance(net, DiT) else net.outputs
        torch.nn.init.normal_(last.weight, std=0.1)
    return found


def fit(kind, net, strategy, folder) -> dict:
    """Train on shares; gradients are accumulated and clipped."""
    optimizer = partial(torch.optim.SGD, lr=0.1)
    module = (
        MeanFlowMatching(net, flow_share=0.5, times=TwoTimes(), optimizer=optimizer)
        if kind == "mean"
        else ConditionalFlowMatching(net, times=EvenTimes(), optimizer=optimizer)
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=place()[1],
        strategy=strategy,
        max_epochs=1,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        log_every_n_steps=1,
        default_root_dir=folder,
        **QUIET,
    )
    shard_if_asked(module, trainer)
    trainer.fit(module, Steps())
    trainer.save_checkpoint(folder / f"{kind}.ckpt")
    return {name: trainer.callback_metrics[name] for name in ("train/loss", "val/loss")}


def gradients() -> dict[str, Tensor]:
    """Loss and gradients of a masked batch, averaged as DDP does."""
    net, batch = networks()["ddp"], share(stream(0))
    loss = flow_matching_loss(net, batch, times=EvenTimes())["loss"]
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in net.named_parameters()}}


def pairings() -> dict[str, Tensor]:
    batch, found = share(stream(0)), {}
    for joint in (False, True):
        for weight in (None, float("inf")):
            coupling = MinibatchOT(cond_weight=weight, across_ranks=joint)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pairs = coupling.pair(batch["x0"], batch["x1"], batch["cond"])
                with torch.no_grad():  # as in validation
                    alone = coupling.pair(batch["x0"], batch["x1"], batch["cond"])
            assert pairs.x1 is batch["x1"]
            found[f"{joint} {weight}"], found[f"{joint} {weight} validation"] = pairs.x0, alone.x0
    sharp = Sinkhorn(1e-3, max_iters=20_000, across_ranks=True)
    found["sinkhorn"] = sharp.pair(batch["x0"], batch["x1"]).x0
    return found


def recipes(run, folder) -> dict:
    """Samples in two sizes of batches, and an evaluation."""
    world, found = place()[1], {}
    common = [f"run={run}", f"out={folder}", "sampler.grid=3", f"devices={world}", "guidance=2"]
    with initialize_config_dir(CONF, version_base="1.3"):
        for size in (4, 9):
            options = [*common, "num_samples=26", f"batch_size={size}"]
            found[f"samples {size}"] = sample(compose("sample", options))
        options = [*common, "num_samples=40", "batch_size=16", "metric=pixels"]
        found["record"] = evaluate(compose("evaluate", options))
    found["left"] = [file.name for file in folder.glob("parts-*")]
    return found


class Maps(nn.Module):
    """A network that is conditioned by maps: the larger a map, the faster it moves."""

    def __init__(self):
        super().__init__()
        self.net = networks()["fsdp"]

    def forward(self, x, t, cond=None):
        v = self.net(x + cond[:, None] - 1, t, torch.zeros(len(x), dtype=torch.long))
        return cond.amax() * v


def picture(folder) -> Tensor:
    """The picture of conditions of a sharded network, by an adaptive solver. Rows differ."""
    rank, world = place()
    generator, drawn = torch.Generator().manual_seed(rank), []
    batch = {"x1": torch.randn(2 + rank, 1, 4, 4, generator=generator)}
    maps = torch.randint(3, (2 + rank, 4, 4), generator=generator)
    batch["cond"] = (1 + 30 * rank) * maps  # larger ones need more steps

    class Kept(ConditionGrid):
        def on_validation_batch_start(self, trainer, pl_module, *args):
            original = condition_grid.save_picture
            condition_grid.save_picture = lambda images, *_: drawn.append(images)
            try:
                super().on_validation_batch_start(trainer, pl_module, *args)
            finally:
                condition_grid.save_picture = original

    module = LatentFlowMatching(Maps(), Identity())
    module.sample_shape = (1, 4, 4)
    sampler = ODESampler(1, "dopri5", rtol=1e-3, atol=1e-3)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy="auto" if world == 1 else FullySharded(),
        callbacks=[Kept(folder, sampler, rows=2, samples=2)],
        default_root_dir=folder,
        **QUIET,
    )
    shard_if_asked(module, trainer)
    trainer.validate(module, DataLoader([batch], batch_size=None), verbose=False)
    return torch.stack(drawn) if drawn else torch.empty(0)


def everything(folder, run) -> dict:
    nets = networks()
    several = ("ddp", "ddp", FullySharded())
    strategies = several if place()[1] > 1 else ("auto",) * 3
    return {
        "fits": {
            kind: fit(kind, net, how, folder)
            for (kind, net), how in zip(nets.items(), strategies, strict=True)
        },
        "picture": picture(folder),
        "gradients": gradients(),
        "pairs": pairings(),
        "recipes": recipes(run, folder),
    }


def _process(rank: int, folder, run) -> None:
    # As torchrun starts processes.
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    init_process_group("gloo", store=FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    torch.save(everything(folder, run), folder / f"{rank}.pt")
    destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_run):
    """What two processes found, and what one finds."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    start_processes(_process, (two, tiny_run), nprocs=2, start_method="spawn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = everything(one, tiny_run)
    return [torch.load(two / f"{rank}.pt") for rank in (0, 1)], alone, (two, one)


pytestmark = pytest.mark.slow


def test_loss_and_gradients_are_those_of_the_joint_batch(found):
    (first, second), alone, _ = found
    for name, expected in alone["gradients"].items():
        mean = (first["gradients"][name] + second["gradients"][name]) / 2
        assert_close(mean, expected, rtol=1e-5, atol=1e-7)
    assert first["gradients"]["loss"] != second["gradients"]["loss"]


@pytest.mark.parametrize("kind", ["ddp", "mean", "fsdp"])
def test_training_and_validation_are_those_of_the_joint_batch(found, kind):
    """Three steps of two accumulated batches, with clipping; whole networks, and sharded ones."""
    ranks, alone, (two, one) = found
    ours = torch.load(two / f"{kind}.ckpt", weights_only=True)
    expected = torch.load(one / f"{kind}.ckpt", weights_only=True)
    start = networks()[kind].state_dict()
    assert ours["global_step"] == expected["global_step"] == STEPS // 2
    for name, value in expected["state_dict"].items():
        assert_close(ours["state_dict"][name], value, rtol=1e-5, atol=1e-6)
        assert "label" in name or not value.equal(
            start[name.removeprefix("velocity.").removeprefix("net.")]
        )
    for name, value in alone["fits"][kind].items():
        for rank in ranks:
            assert_close(rank["fits"][kind][name], value, rtol=1e-5, atol=1e-6)


def test_all_ranks_draw_the_picture_of_conditions_of_the_first(found):
    """Drawn by the first rank alone, the sharded network would wait for the other without end."""
    (first, second), alone, _ = found
    assert second["picture"].numel() == 0
    assert first["picture"].shape == (1, 8, 1, 4, 4)
    assert_close(first["picture"], alone["picture"], rtol=1e-4, atol=1e-5)


def test_transport_is_of_each_rank_or_of_the_joint_batch(found):
    ranks, alone, _ = found
    joint = {name: torch.empty(BATCH, 1, 4, 4) for name in ranks[0]["pairs"]}
    for rank, result in enumerate(ranks):
        for name, x0 in result["pairs"].items():
            joint[name][rank::2] = x0
    for weight in ("None", "inf"):
        assert joint[f"True {weight}"].equal(alone["pairs"][f"False {weight}"])
        assert joint[f"False {weight}"].equal(joint[f"True {weight} validation"])
        assert not joint[f"False {weight}"].equal(alone["pairs"][f"False {weight}"])
    assert joint["sinkhorn"].equal(alone["pairs"]["False None"])


def test_samples_depend_on_seeds_alone(found):
    (first, second), alone, _ = found
    ours, expected = first["recipes"], alone["recipes"]
    for size in (4, 9):
        assert ours[f"samples {size}"].shape == (26, 1, 8, 8)
        assert ours[f"samples {size}"].equal(expected[f"samples {size}"])
        assert second["recipes"][f"samples {size}"].numel() == 0
    assert_close(ours["samples 4"], ours["samples 9"], rtol=1e-4, atol=1e-5)


def test_evaluation_is_that_of_one_process(found):
    (first, second), alone, _ = found
    ours, expected = first["recipes"]["record"], alone["recipes"]["record"]
    assert ours["metrics"] == expected["metrics"]
    assert ours["metrics"]["frechet_distance"] > 0
    assert (ours["sampling"].pop("world_size"), expected["sampling"].pop("world_size")) == (2, 1)
    for record in (ours, expected):
        record["sampling"].pop("seconds")
    assert ours == expected
    assert second["recipes"]["record"] == {}
    assert first["recipes"]["left"] == alone["recipes"]["left"] == []


@pytest.mark.parametrize(("limit", "even"), [(1.0, 1), (5, 1), (0, 0)])
def test_sharded_ranks_validate_on_equally_many_batches(limit, even):
    """Of 181 rows in batches of 90 the first of two ranks has two, the other one."""
    trainer = SimpleNamespace(strategy=FullySharded(), world_size=2, limit_val_batches=limit)
    even_validation(trainer, 181, 90)
    assert trainer.limit_val_batches == even
