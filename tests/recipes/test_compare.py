"""Tables of couplings: what a cell is, what is kept, and how cells are summed up."""

import csv
import json
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from flowkit.autoencoders import Identity
from flowkit.recipes.compare import compare, write_table
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.train import tell, train
from flowkit.runs.locks import locked
from tests.conftest import CONF

POINTS = [
    "data=toy",
    "data.size=50",
    "model=mlp",
    "batch_size=16",
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "+trainer.limit_val_batches=0",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "callback=raw",
    "logger.csv=null",
    "logger.tensorboard=null",
    "callback.losses=null",
]
EVALUATE = ["sampler=euler", "sampler.grid=3", "num_samples=40"]
ROWS = [
    {"problem": "p", "coupling": "a", "seed": 0, "w2": 1.0, "energy": 5.0},
    {"problem": "p", "coupling": "b", "seed": 0, "w2": 4.0, "energy": 0.0},
    {"problem": "p", "coupling": "a", "seed": 1, "w2": 2.0, "energy": 7.0},
]


@pytest.fixture
def configured():
    """Make configurations while Hydra is initialized, as it is within a command."""
    with initialize_config_dir(CONF, version_base="1.3"):
        yield compose


@pytest.fixture
def table(configured, tmp_path):
    cfg = configured("compare", overrides=[f"out={tmp_path}/out"])
    cfg.couplings = {"I-CFM": ["coupling=independent"], "OT-CFM": ["coupling=minibatch_ot"]}
    cfg.problems = {"to moons": ["data.target=moons"]}
    cfg.seeds, cfg.overrides, cfg.evaluate = [1, 2], POINTS, EVALUATE
    return cfg


def _written(out):
    return {f: f.stat().st_mtime_ns for f in out.rglob("last.ckpt")}


def test_a_damaged_cell_is_named_and_made_again(table):
    table.seeds, table.couplings = [1], {"I-CFM": ["coupling=independent"]}
    (row,) = compare(table)
    (record,) = Path(table.out).rglob("cell.json")
    record.write_text(record.read_text()[:30])
    with pytest.warns(UserWarning, match=r"record must be JSON, got .*cell.json: .*made again"):
        (again,) = compare(table)
    assert {**again, "seconds": 0} == {**row, "seconds": 0}
    assert json.loads(record.read_text())["metrics"]["w2"] == row["w2"]


def test_two_tables_in_one_folder_do_not_empty_each_others_cells(table):
    (out := Path(table.out)).mkdir()
    with locked(out), pytest.raises(FileExistsError, match=r"must be in no other use, got .*out"):
        compare(table)


def test_a_cell_is_what_train_and_evaluate_give_on_their_own(table, configured, tmp_path):
    rows = compare(table)
    by_hand = tmp_path / "by-hand"
    overrides = [*POINTS, "data.target=moons", "coupling=minibatch_ot", "seed=2"]
    train(configured("train", overrides=[*overrides, f"run_dir={by_hand}"]))
    evaluate(configured("evaluate", overrides=[*EVALUATE, f"run={by_hand}"]))
    expected = json.loads((by_hand / "metrics.json").read_text())["metrics"]
    (row,) = (r for r in rows if r["coupling"] == "OT-CFM" and r["seed"] == 2)
    for name in ("w2", "path_energy", "normalized_path_energy"):
        assert row[name] == expected[name]
    assert len({r["w2"] for r in rows}) == 4, "seeds and couplings must make a difference"


def test_finished_cells_are_kept_and_others_made(table, tmp_path):
    table.seeds = [1]
    first = compare(table)
    kept = _written(tmp_path / "out")
    table.seeds = [1, 2]
    second = compare(table)
    now = _written(tmp_path / "out")
    assert len(now) == 4
    assert kept.items() < now.items()
    assert second[:2] == first

    # A cell that was interrupted has no record of its own, and is made again.
    cell = next(iter(kept)).parents[1]
    (cell / "cell.json").unlink()
    assert compare(table)[0]["w2"] == first[0]["w2"]
    again = _written(tmp_path / "out")
    assert [f for f in now if again[f] != now[f]] == [cell / "checkpoints" / "last.ckpt"]


def test_other_overrides_are_another_cell(table, tmp_path):
    table.seeds = [1]
    table.couplings = {"I-CFM": []}
    (before,) = compare(table)
    texts = [(tmp_path / "out" / "table.md").read_text()]
    table.overrides = [*table.overrides, "optimizer.lr=0.1"]
    (after,) = compare(table)
    assert after["w2"] != before["w2"]
    texts.append((tmp_path / "out" / "table.md").read_text())
    (cell,) = (tmp_path / "out").rglob("seed-1-1/cell.json")
    assert json.loads(cell.read_text())["metrics"]["w2"] == before["w2"]

    # Evaluated otherwise, the training stays.
    trained = _written(tmp_path / "out")
    table.evaluate = [*EVALUATE[:-1], "num_samples=30"]
    (fewer,) = compare(table)
    assert (fewer["num_samples"], fewer["seconds"]) == (30, after["seconds"])
    assert _written(tmp_path / "out") == trained
    assert [(tmp_path / "out" / f"table-{n}.md").read_text() for n in (1, 2)] == texts


def test_a_cell_keeps_its_numbers_whatever_is_evaluated_in_it(table, configured, tmp_path):
    table.seeds, table.couplings = [1], {"I-CFM": []}
    rows = compare(table)
    (record,) = (tmp_path / "out").rglob("cell.json")
    stored = json.loads(record.read_text())["metrics"]
    assert stored.items() <= rows[0].items()
    assert all(type(value) in (int, float) for value in stored.values())
    evaluate(configured("evaluate", overrides=[f"run={record.parent}", "num_samples=20"]))
    assert compare(table) == rows


def test_table_holds_mean_and_deviation_over_seeds(tmp_path):
    write_table(ROWS, tmp_path)
    with (tmp_path / "table.csv").open() as file:
        a, b = csv.DictReader(file)
    assert (a["coupling"], a["seeds"], float(a["w2_mean"])) == ("a", "2", 1.5)
    assert float(a["w2_std"]) == pytest.approx(math.sqrt(0.5))
    assert (b["seeds"], float(b["w2_mean"]), b["w2_std"]) == ("1", 4.0, "")
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "| problem | coupling | seeds | w2 | energy |",
        "| --- | --- | ---: | ---: | ---: |",
        "| p | a | 2 | 1.500 ± 0.707 | 6.000 ± 1.414 |",
        "| p | b | 1 | 4.000 | 0.000 |",
    ]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_choose_the_columns(tmp_path):
    write_table(ROWS, tmp_path, ["energy"])
    assert (tmp_path / "table.md").read_text().startswith("| problem | coupling | seeds | energy |")
    with pytest.raises(ValueError, match="metrics must be among w2, energy, got speed"):
        write_table(ROWS, tmp_path, ["energy", "speed"])


def test_numbers_of_some_cells_only_leave_the_others_empty(tmp_path):
    image: dict = {"problem": "q", "coupling": "a", "seed": 0, "distance": 2.0}
    image["unreliable"] = ["distance", "recall"]
    write_table([*ROWS, image], tmp_path, ["w2", "distance"])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| problem | coupling | seeds | w2 | distance, unreliable |"
    assert lines[2:] == [
        "| p | a | 2 | 1.500 ± 0.707 |  |",
        "| p | b | 1 | 4.000 |  |",
        "| q | a | 1 |  | 2.000 |",
    ]
    with (tmp_path / "table.csv").open() as file:
        assert [row["distance_mean"] for row in csv.DictReader(file)] == ["", "", "2.0"]


@pytest.mark.filterwarnings("ignore:MinibatchOT ignores cond")
@pytest.mark.parametrize("experiment", ["toy_table", "toy_table_conditional"])
def test_every_cell_of_a_preset_trains_what_it_says(experiment, configured, tmp_path):
    cfg = configured("compare", overrides=[f"experiment={experiment}", f"out={tmp_path}"])
    for problem in cfg.problems.values():
        for coupling in cfg.couplings.values():
            overrides = [*cfg.overrides, *problem, *coupling, f"run_dir={tmp_path}"]
            cell = configured("train", overrides=overrides)
            data = instantiate(cell.data)
            data.setup()
            tell(cell, data, Identity())
            cell.module.drop_cond = None
            module = instantiate(cell.module)
            batch = data.stream()[0]
            assert ("cond" in batch) == (experiment == "toy_table_conditional")
            # No network knows better than the mean yet.
            assert 0 < module.loss(batch)["loss"] < 100


def test_cells_whose_names_differ_in_signs_have_folders_of_their_own(table, monkeypatch):
    made = {}

    def run_cell(folder, train_with, evaluate_with):
        made[folder] = train_with
        return {"w2": float(len(made))}

    monkeypatch.setattr("flowkit.recipes.compare.run_cell", run_cell)
    table.couplings = {"OT 1": ["coupling=minibatch_ot"], "OT-1": ["coupling=independent"]}
    table.seeds = [0]
    rows = compare(table)
    assert [(row["coupling"], row["w2"]) for row in rows] == [("OT 1", 1.0), ("OT-1", 2.0)]
    trained = [options[-2] for options in made.values()]
    assert trained == ["coupling=minibatch_ot", "coupling=independent"]
