"""What trainings cost: their record, over resumes, and with what they learnt from."""

import json

import pytest
import torch

from flowkit.modules import FlowModule
from flowkit.recipes.pairs import pairs
from flowkit.recipes.train import train
from flowkit.runs import Run, training_cost
from flowkit.runs.training_cost import read_cost, total_cost
from tests.recipes.conftest import TINY

SHORT = [*TINY, "trainer.val_check_interval=5", "callback.samples=null"]


@pytest.fixture
def time(monkeypatch):
    """A clock by which a training step takes 1 s and 2 s of processors, and a validation 100 s."""
    now = [0.0, 0.0]

    def spend(name, seconds, processor):
        method = getattr(FlowModule, name)

        def spending(self, *args):
            now[0], now[1] = now[0] + seconds, now[1] + processor
            return method(self, *args)

        monkeypatch.setattr(FlowModule, name, spending)

    spend("training_step", 1, 2)
    spend("validation_step", 100, 100)
    monkeypatch.setattr(training_cost, "clocks", lambda: tuple(now))
    return now


def spent(folder):
    record = read_cost(folder)
    return record["steps"], record["seconds"], record["processor_seconds"]


def test_training_steps_add_up_over_a_resume(configure, tmp_path, time):
    run = tmp_path / "run"
    train(configure("train", *SHORT, "trainer.max_steps=6", f"run_dir={run}"))
    assert spent(run) == (6, 6, 12)
    checkpoint = run / "checkpoints" / "last.ckpt"
    more = ["trainer.max_steps=10", f"resume={checkpoint}", f"run_dir={tmp_path}/on"]
    train(configure("train", *SHORT, *more))
    assert spent(tmp_path / "on") == (10, 10, 20)
    (machine,) = read_cost(tmp_path / "on")["machines"]
    assert machine["device"] == "cpu"
    assert machine["processes"] == 1

    # A checkpoint without a record: what the steps before have cost is not known.
    state = torch.load(checkpoint, weights_only=True)
    del state["training_cost"]
    torch.save(state, tmp_path / "old.ckpt")
    old = [f"resume={tmp_path}/old.ckpt", f"run_dir={tmp_path}/old", "trainer.max_steps=7"]
    train(configure("train", *SHORT, *old))
    assert read_cost(tmp_path / "old") is None


def test_teachers_and_pairs_count_once(configure, tmp_path, time, monkeypatch):
    flow, reflow, mean = (tmp_path / name for name in ("flow", "reflow", "mean"))
    train(configure("train", *SHORT, "trainer.max_steps=6", f"run_dir={flow}"))
    made = [f"run={flow}", f"out={tmp_path}/pairs", "num_noises=60", "shard_size=20"]
    ticks = iter(range(100))
    monkeypatch.setattr("flowkit.recipes.pairs.clocks", lambda: (next(ticks), 0.0))
    monkeypatch.setattr(training_cost, "clocks", lambda: (next(ticks), 5.0))
    pairs(configure("pairs", *made, "fine_steps=2"))  # a tick for each of three files
    assert spent(tmp_path / "pairs") == (0, 3, 15)
    monkeypatch.setattr(training_cost, "clocks", lambda: tuple(time))

    taught = ["module=straightening", f"module.start={flow}", "data=pairs"]
    taught += [f"data.root={tmp_path}/pairs", "trainer.max_steps=4"]
    train(configure("train", *SHORT, *taught, f"run_dir={reflow}"))
    record = read_cost(reflow)
    assert record["start"]["hash"] == Run.load(flow).weights["hash"]
    assert spent(reflow) == (4, 4, 8)
    assert total_cost(record) == {"seconds": 4 + 6 + 3, "processor_seconds": 8 + 12 + 15}

    # A student of a run whose cost is not known has no cost with its teacher.
    (flow / "training.json").unlink()
    learnt = ["module=mean_flow", f"module.start={flow}", "trainer.max_steps=2"]
    train(configure("train", *SHORT, *learnt, f"run_dir={mean}"))
    assert spent(mean) == (2, 2, 4)
    assert total_cost(read_cost(mean)) is None


@pytest.mark.parametrize("content", [[], {"seconds": 1}, {"seconds": "a", "processor_seconds": 1}])
def test_damaged_records_are_named(content, tmp_path):
    (tmp_path / "training.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"training\.json must hold the cost of a training, got"):
        read_cost(tmp_path)
