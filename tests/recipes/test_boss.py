"""The search for a grid on a run, and pairs to straighten with."""

import json
import shutil

import pytest
import torch
from hydra.utils import instantiate

from flowkit import boss as library
from flowkit import grids
from flowkit.data import Digits, Toy
from flowkit.data.pairs import Pairs, read_pairs
from flowkit.modules import load_run
from flowkit.recipes.boss import boss
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.pairs import pairs
from flowkit.recipes.sample import sample, weights
from flowkit.recipes.train import train
from flowkit.sampling import ODESampler, seeded_noise
from tests.recipes.conftest import TINY

SEARCH = [
    "budgets=[2,3]",
    "num_steps=3",
    "fine_steps=12",
    "start=16",
    "limit=32",
    "search_noises=24",
    "fresh_noises=20",
    "num_samples=20",
    "adaptive=[0.1]",
]


@pytest.fixture(scope="module")
def searched(tiny_run, tmp_path_factory):
    from hydra import compose, initialize_config_dir

    from tests.conftest import CONF

    out = tmp_path_factory.mktemp("boss")
    options = [f"run={tiny_run}", f"out={out}", *SEARCH, "guidance=2", "metric=pixels"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("boss", overrides=options)
    return out, boss(cfg)


def test_the_grid_is_saved_with_its_provenance(searched, tiny_run):
    out, record = searched
    grid = grids.load(out / "grid.json", {"model_hash": weights(tiny_run)["hash"], "guidance": 2})
    stored = grids.provenance(out / "grid.json")
    assert stored == json.loads(json.dumps(record))
    assert grid.tolist() == stored["grids"][stored["objective"]]
    assert set(stored["scores"]) == {"uniform", "bellman", "endpoint"}
    assert (stored["method"], stored["condition"]) == ("euler", "all in turn")
    assert stored["num_noises"]["costs"] in (16, 32)
    low, high = stored["bellman"]["value_interval"]
    assert 0 < low <= high
    assert (out / "table.md").read_text().count("\n") == 2 + 6 + 1
    assert (out / "grid.png").stat().st_size > 5000


def test_the_comparison_is_of_the_guided_field_on_fresh_noise(searched, tiny_run):
    _, record = searched
    module = load_run(tiny_run)
    x0 = seeded_noise(module.sample_shape, range(1_000_000, 1_000_020))
    made = {f"{r['grid']} {r['steps']}": r["error"] for r in record["comparison"] if r["steps"]}
    three = {name: torch.tensor(grid) for name, grid in record["grids"].items()}
    expected = library.score_grids(
        module.guided(2.0), x0, three, torch.arange(20) % 10, reference=ODESampler(25, "rk4")
    )
    assert {name: made[f"{name} 3"] for name in three} == pytest.approx(expected, rel=1e-4)
    adaptive = record["comparison"][-1]
    assert adaptive["grid"] == "adaptive"
    assert adaptive["nfe"] > 6
    recommended = [row["grid"] for row in record["comparison"] if row["recommended"]]
    assert len(recommended) == 2
    assert recommended[1] == record["objective"]
    assert all("frechet_distance" in row for row in record["comparison"] if row["steps"])
    assert 0 < record["reference"]["error_of_the_fine_grid"] < min(made.values())


def test_the_rows_are_announced(tiny_run, configure, tmp_path, capsys):
    boss(configure("boss", f"run={tiny_run}", f"out={tmp_path}", *SEARCH))
    said = capsys.readouterr().out
    assert said.startswith("network rows, at most:\n  costs (12 x 16 to 32 noises)")
    stated = [int(line.split()[-1].replace(",", "")) for line in said.splitlines()[1:4]]
    each = [library.search_rows(24, budget, fine_steps=12) for budget in (2, 3)]
    assert stated == [12 * 32, sum(e["endpoint"] for e in each), sum(e["scores"] for e in each)]
    assert "| 3 | " in said


def test_the_grid_is_sampled_with(searched, tiny_run, configure, tmp_path):
    out, _ = searched
    drawn = sample(
        configure(
            "sample",
            f"run={tiny_run}",
            f"out={tmp_path}",
            "num_samples=6",
            "guidance=2",
            "sampler=from_file",
            f"sampler.grid.file={out}/grid.json",
        )
    )
    expected = load_run(tiny_run).sample(
        6,
        ODESampler(grids.load(out / "grid.json")),
        cond=torch.arange(6),
        seeds=range(6),
        guidance=2.0,
    )
    torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize(
    ("change", "named"), [("guidance=3", "guidance 2"), ("sampler.method=heun", "method 'euler'")]
)
def test_a_grid_made_for_something_else_is_warned_about(
    searched, tiny_run, configure, tmp_path, change, named
):
    file = f"sampler.grid.file={searched[0]}/grid.json"
    options = ["guidance=2", "sampler=from_file", file, "num_samples=2", change]
    with pytest.warns(UserWarning, match=rf"grid of .* should be used with {named}"):
        sample(configure("sample", f"run={tiny_run}", f"out={tmp_path}", *options))


def test_source_samples_of_the_data_are_searched_with(configure, tmp_path):
    toy = ["data=toy", "data.source=8gaussians", "data.target=moons", "data.size=200"]
    train(configure("train", *TINY, *toy, f"run_dir={tmp_path}"))
    record = boss(configure("boss", f"run={tmp_path}", *SEARCH))
    module, data = load_run(tmp_path), Toy("8gaussians", "moons", size=200)
    data.setup()
    start = [(1_000_000 + k) % 200 for k in range(20)]
    three = {name: torch.tensor(grid) for name, grid in record["grids"].items()}
    expected = library.score_grids(
        module.velocity, data.test[start]["x0"], three, reference=ODESampler(25, "rk4")
    )
    made = {r["grid"]: r["error"] for r in record["comparison"] if r["steps"] == 3}
    assert made == pytest.approx(expected, rel=1e-4)
    assert record["condition"] == "none"


def test_a_budget_out_of_range_is_refused(tiny_run, configure, tmp_path):
    options = [*SEARCH, "num_steps=13"]
    with pytest.raises(ValueError, match=r"num_steps must lie in \[1, 12\] for a grid of 13 times"):
        boss(configure("boss", f"run={tiny_run}", f"out={tmp_path}", *options))


# --- pairs ---------------------------------------------------------------------------------------

PAIRS = ["num_noises=50", "shard_size=20", "batch_size=8", "fine_steps=10", "guidance=2"]


@pytest.mark.parametrize("grid", ["null", "4", "several"])
def test_pairs_are_what_the_teacher_makes(searched, tiny_run, configure, tmp_path, grid):
    file = searched[0] / "grid.json"
    option = f"[{file},2]" if grid == "several" else grid
    pairs(configure("pairs", f"run={tiny_run}", f"out={tmp_path}/p", f"grid={option}", *PAIRS))
    data = Pairs(tmp_path / "p", batch_size=16, val_fraction=0.1)
    data.setup()
    per_noise = {"null": 1, "4": 4, "several": 5}[grid]
    assert len(data.train) == 45 * per_noise
    assert len(data.val) == 5 * per_noise
    assert (data.shape, data.num_classes, data.x0_is_noise) == ((1, 8, 8), 10, True)

    module, cond = load_run(tiny_run), torch.arange(50) % 10
    x0 = seeded_noise((1, 8, 8), range(50))
    wanted = {"null": [1], "4": [4], "several": [grids.load(file), 2]}[grid]
    made = [library.segments(module.guided(2.0), x0, 10, g, cond) for g in wanted]
    _, columns = read_pairs(tmp_path / "p")
    times = set() if grid == "null" else {"t0", "t1"}
    assert set(columns) == set(data.train[:]) == {"x0", "x1", "cond"} | times
    for key, column in columns.items():
        by_noise = torch.cat([part[key].unflatten(0, (50, -1)) for part in made], 1)
        torch.testing.assert_close(column, by_noise.flatten(0, 1), rtol=1e-4, atol=1e-4)
    # the segments of a noise stay together, and follow each other
    if grid == "4":
        first = data.train[:4]
        assert first["t0"].tolist() == [0, 0.25, 0.5, 0.75]
        assert torch.equal(first["x1"][:3], first["x0"][1:])
    # the training stream and the validation loader hold pairs
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == set(columns)
    assert len(next(iter(data.val_dataloader()))["x1"]) == min(16, 5 * per_noise)


def test_half_finished_pairs_are_gone_on_with(tiny_run, configure, tmp_path):
    make = [f"run={tiny_run}", f"out={tmp_path}/p", "grid=2", *PAIRS]
    pairs(configure("pairs", *make))
    whole = {f.name: f.read_bytes() for f in (tmp_path / "p").glob("*.safetensors")}
    assert len(whole) == 3
    (tmp_path / "p" / "pairs-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"hold all 3 shards, got none called pairs-00001"):
        Pairs(tmp_path / "p").setup()
    kept = (tmp_path / "p" / "pairs-00000.safetensors").stat().st_mtime_ns
    pairs(configure("pairs", *make))
    assert {f.name: f.read_bytes() for f in (tmp_path / "p").glob("*.safetensors")} == whole
    assert (tmp_path / "p" / "pairs-00000.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"hold the same pairs, got .* with another guidance"):
        pairs(configure("pairs", *make, "guidance=3"))


def test_pairs_are_not_measured_against(tiny_run, configure, tmp_path):
    pairs(configure("pairs", f"run={tiny_run}", f"out={tmp_path}/p", *PAIRS))
    data = Pairs(tmp_path / "p")
    data.setup()
    assert data.summary() == "Pairs: 48 train, 2 val pairs of shape (1, 8, 8), no real data"
    with pytest.raises(RuntimeError, match=r"real must be the data .* \+data@data.real=digits"):
        data.split("test")


def test_pairs_by_a_grid_of_another_model_warn(searched, tiny_run, configure, tmp_path):
    make = [f"run={tiny_run}", f"out={tmp_path}/p", f"grid={searched[0]}/grid.json", *PAIRS]
    with pytest.warns(UserWarning, match=r"used with guidance 2.*, got 3"):
        pairs(configure("pairs", *make, "guidance=3", "num_noises=4"))


def test_bad_folders_are_refused_by_name(tiny_run, configure, tmp_path):
    with pytest.raises(FileNotFoundError, match="root must be a folder written by `flowkit pairs`"):
        Pairs(tmp_path).setup()
    pairs(configure("pairs", f"run={tiny_run}", f"out={tmp_path}/p", *PAIRS))
    shard = tmp_path / "p" / "pairs-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"shard must be readable, got .*pairs-00002.safetensors"):
        Pairs(tmp_path / "p").setup()
    record = tmp_path / "p" / "pairs.json"
    record.write_text(record.read_text().replace('"version": 1', '"version": 7'))
    with pytest.raises(ValueError, match=r"version of .*pairs.json must be 1, got 7"):
        Pairs(tmp_path / "p").setup()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_is_straightened_and_measured(tiny_run, configure, tmp_path, lora_rank):
    root = tmp_path / "p"
    pairs(configure("pairs", f"run={tiny_run}", f"out={root}", "grid=2", *PAIRS))
    run = tmp_path / "run"
    options = ["module=straightening", f"module.start={tiny_run}", f"module.lora_rank={lora_rank}"]
    data = ["data=pairs", f"data.root={root}", "+data@data.real=digits"]
    cfg = configure("train", *TINY, *options, *data, f"run_dir={run}", "optimizer.lr=3e-4")
    trained = train(cfg)
    # the run stands on its own: neither the teacher nor the pairs are needed to load it
    moved = tmp_path / "elsewhere"
    shutil.move(root, moved)
    module = load_run(run)
    x, t, cond = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 9])
    torch.testing.assert_close(module(x, t, cond), trained(x, t, cond), rtol=0.2, atol=0.2)
    teacher = load_run(tiny_run)
    near, far = module(x, t, cond) - teacher(x, t, cond), teacher(x, t, cond)
    assert 0 < near.norm() < far.norm()
    shutil.move(moved, root)
    record = evaluate(
        configure(
            "evaluate",
            f"run={run}",
            "metric=pixels",
            "num_samples=20",
            "sampler=euler",
            "sampler.grid=2",
        )
    )
    real = Digits()
    real.setup()
    assert record["data"]["test"] == real.fingerprint("test")


def test_a_teacher_teaches_as_training_goes(tiny_run, configure, tmp_path):
    options = ["module=straightening", f"module.start={tiny_run}", "module.grid=[0,0.3,1]"]
    more = ["module.fine_steps=10", "module.guidance=2", "trainer.max_steps=4"]
    train(configure("train", *TINY, *options, *more, f"run_dir={tmp_path}"))
    assert load_run(tmp_path).sample(2, ODESampler([0, 0.3, 1.0]), torch.tensor([1, 2])).std() > 0.1


def test_the_option_pairs_builds(configure):
    cfg = configure("train", "data=pairs", "data.root=x", "+data@data.real=digits")
    data = instantiate(cfg.data)
    assert isinstance(data, Pairs)
    assert isinstance(data.real, Digits)
