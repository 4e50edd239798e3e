"""The search for a grid on a run, and pairs to straighten with."""

import json
import shutil

import pytest
import torch
from hydra.utils import instantiate

from flowkit import boss as library
from flowkit import grids
from flowkit.data import Digits, Pairs, Toy
from flowkit.data.pairs import read_pairs
from flowkit.modules import Straightening, load_run
from flowkit.modules.callbacks import duration
from flowkit.recipes.boss import boss
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.pairs import pairs
from flowkit.recipes.sample import sample
from flowkit.recipes.train import train
from flowkit.runs import Run
from flowkit.runs.resuming import resumed
from flowkit.sampling import ODESampler, seeded_noise
from tests.recipes.conftest import TINY

SEARCH = [
    "budgets=[2,3]",
    "num_steps=3",
    "fine_steps=12",
    "start=16",
    "limit=32",
    "search_noises=24",
    "extra_noises=40",
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


def test_an_earlier_search_keeps_its_files_in_a_folder(searched, tiny_run, configure, tmp_path):
    """Numbers of steps are in their names, so these get no other numbers."""
    first = {file.name: file.read_bytes() for file in searched[0].iterdir()}
    assert first.keys() == {"grid.json", "grid-2.json", "grid.png", "table.md"}
    shutil.copytree(searched[0], tmp_path / "boss")
    small = [*SEARCH, "budgets=[]", "num_steps=2", "fine_steps=4", "extra_noises=0", "adaptive=[]"]
    for _ in range(2):  # the second call is the same search
        boss(configure("boss", f"run={tiny_run}", f"out={tmp_path}/boss", *small))
        found = {file.name for file in (tmp_path / "boss").iterdir()}
        assert found == {"earlier-1", "grid.json", "grid.png", "table.md"}
        assert len(grids.load(tmp_path / "boss" / "grid.json")) == 3
    earlier = (tmp_path / "boss" / "earlier-1").iterdir()
    assert {file.name: file.read_bytes() for file in earlier} == first


def test_the_grid_is_saved_with_its_provenance(searched, tiny_run):
    out, record = searched
    grid = grids.load(
        out / "grid.json", {"model_hash": Run.load(tiny_run).weights["hash"], "guidance": 2}
    )
    stored = grids.provenance(out / "grid.json")
    assert stored == json.loads(json.dumps(record))
    assert grid.tolist() == stored["grids"][stored["objective"]]
    assert set(stored["scores"]) == {"uniform", "bellman", "endpoint"}
    assert (stored["method"], stored["condition"]) == ("euler", "all in turn")
    assert stored["num_noises"]["costs"] in (16, 32)
    assert stored["num_noises"]["extra"] == 40
    assert stored["test"]["level"] == 0.05
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
    assert 0 < record["reference"]["error_of_the_fine_grid"] < min(made.values())


def test_distances_are_those_of_an_evaluation(searched, tiny_run, configure, tmp_path):
    """Of all grids and of adaptive solves."""
    out, record = searched
    rows = [row for row in record["comparison"] if row["grid"] in ("uniform", "adaptive")][1:]
    samplers = [
        ["sampler=euler", "sampler.grid=3"],
        ["sampler=dopri5", "sampler.rtol=0.1", "sampler.atol=0.1"],
    ]
    options = [f"run={tiny_run}", "guidance=2", "metric=pixels", "num_samples=20"]
    for row, sampler in zip(rows, samplers, strict=True):
        found = evaluate(configure("evaluate", *options, *sampler, f"out={tmp_path}"))
        assert row["frechet_distance"] == pytest.approx(
            found["metrics"]["frechet_distance"], rel=1e-9
        )
        assert row["frechet_nfe"] == found["sampling"]["nfe"]
        assert (row["features"], row["num_samples"]) == ("pixels", 20)
    table = (out / "table.md").read_text()
    assert "| Fréchet distance, unreliable |" in table  # of 20 samples
    assert all(f" {row['frechet_distance']:.2f} |" in table for row in record["comparison"])


def test_points_have_no_distances_between_features(configure, tmp_path):
    train(configure("train", *TINY, "data=toy", "data.size=200", f"run_dir={tmp_path}"))
    with pytest.raises(ValueError, match=r"metric must be null for a run without images, got data"):
        boss(configure("boss", f"run={tmp_path}", *SEARCH, "metric=pixels"))


def test_the_rows_are_announced(tiny_run, configure, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flowkit.recipes.boss._seconds_per_row", lambda cfg, model: 0.5)
    boss(configure("boss", f"run={tiny_run}", f"out={tmp_path}", *SEARCH))
    said = capsys.readouterr().out
    assert said.startswith("network rows, at most:\n  costs (12 x 16 to 32 noises)")
    stated = [int(line.split()[-1].replace(",", "")) for line in said.splitlines()[1:5]]
    each = [library.search_rows(24, budget, fine_steps=12, extra_noises=40) for budget in (2, 3)]
    assert stated == [
        12 * 32,
        sum(e["endpoint"] for e in each),
        sum(e["scores"] for e in each),
        20 * (3 * (2 + 3) + 12 + 100),
    ]
    assert f"\ntime      {duration(sum(stated) / 2)} by 3 evaluations; small batches" in said
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
    with pytest.warns(UserWarning, match=rf"grid in .* should be used with {named}"):
        sample(configure("sample", f"run={tiny_run}", f"out={tmp_path}", *options))


def test_source_samples_of_the_data_are_searched_with(source_run, configure, tmp_path):
    record = boss(configure("boss", f"run={source_run}", f"out={tmp_path}", *SEARCH))
    module, data = load_run(source_run), Toy("8gaussians", "moons", size=200)
    data.setup()
    start = [(1_000_000 + k) % 200 for k in range(20)]
    three = {name: torch.tensor(grid) for name, grid in record["grids"].items()}
    expected = library.score_grids(
        module.velocity, data.test[start]["x0"], three, reference=ODESampler(25, "rk4")
    )
    made = {r["grid"]: r["error"] for r in record["comparison"] if r["steps"] == 3}
    assert made == pytest.approx(expected, rel=1e-4)
    assert record["condition"] == "none"
    assert record["num_noises"]["extra"] == 0  # source samples of data cannot be drawn


@pytest.mark.parametrize("option", ["num_steps=13", "budgets=[2,13]"])
def test_a_budget_out_of_range_is_refused_first(tiny_run, configure, tmp_path, capsys, option):
    options = [*SEARCH, option]
    with pytest.raises(ValueError, match=r"num_steps must lie in \[1, 12\] .* 13 times, got 13"):
        boss(configure("boss", f"run={tiny_run}", f"out={tmp_path}", *options))
    assert capsys.readouterr().out == ""


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
    if grid == "several":  # the teacher stops at the times of all grids
        teacher = torch.cat([grids.uniform(10), wanted[0], grids.uniform(2)]).unique()
    else:
        teacher = 10
    made = [library.segments(module.guided(2.0), x0, teacher, g, cond) for g in wanted]
    _, columns = read_pairs(tmp_path / "p")
    times = set() if grid == "null" else {"t0", "t1"}
    assert set(columns) == {"x0", "x1", "cond"} | times
    assert set(data.train[:]) == {*columns, "taught_by", "encoded_by"}
    assert data.train[:]["taught_by"] == Run.load(tiny_run).weights["hash"]
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
    assert set(batch) == {*columns, "taught_by", "encoded_by"}
    assert len(next(iter(data.val_dataloader()))["x1"]) == min(16, 5 * per_noise)


def test_half_finished_pairs_are_gone_on_with(tiny_run, configure, tmp_path):
    make = [f"run={tiny_run}", f"out={tmp_path}/p", "grid=2", *PAIRS]
    pairs(configure("pairs", *make))
    whole = {f.name: f.read_bytes() for f in (tmp_path / "p").glob("*.safetensors")}
    assert len(whole) == 3
    (tmp_path / "p" / "pairs-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"hold all 3 shards, got no pairs-00001"):
        Pairs(tmp_path / "p").setup()
    kept = (tmp_path / "p" / "pairs-00000.safetensors").stat().st_mtime_ns
    pairs(configure("pairs", *make))
    assert {f.name: f.read_bytes() for f in (tmp_path / "p").glob("*.safetensors")} == whole
    assert (tmp_path / "p" / "pairs-00000.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"hold the same pairs, got .* with another guidance"):
        pairs(configure("pairs", *make, "guidance=3"))


def test_pairs_of_another_rule_of_seeds_are_not_gone_on_with(tiny_run, configure, tmp_path):
    make = [f"run={tiny_run}", f"out={tmp_path}/p", *PAIRS]
    pairs(configure("pairs", *make, "seed=1", "seeding=1"))
    file = tmp_path / "p" / "pairs.json"
    record = json.loads(file.read_text())
    assert record["provenance"].pop("seeding") == 1
    assert record["provenance"]["seeds"] == [1, 51]
    file.write_text(json.dumps(record))  # as it was before there were two rules
    with pytest.raises(ValueError, match=r"hold the same pairs, got .* with another seeds"):
        pairs(configure("pairs", *make, "seed=1"))
    pairs(configure("pairs", *make, "seed=1", "seeding=1"))


def test_pairs_have_no_test_split(tiny_run, configure, tmp_path):
    pairs(configure("pairs", f"run={tiny_run}", f"out={tmp_path}/p", *PAIRS))
    data = Pairs(tmp_path / "p")
    data.setup()
    assert data.summary() == "Pairs: 48 train, 2 val pairs of shape (1, 8, 8), 10 classes"
    with pytest.raises(RuntimeError, match="split must be train or val of pairs, got test"):
        _ = data.test
    assert data.source["_target_"] == "flowkit.data.Digits"


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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("version", 7, "version of .*pairs.json must be 1, got 7"),
        ("format", "x", "format of .*pairs.json must be 'flowkit-pairs', got 'x'"),
        ("rows_per_noise", "two", "rows_per_noise in .*pairs.json must be a int, got 'two'"),
        ("source", None, "source in .*pairs.json must be a dict, got None"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_by_field(
    tiny_run, configure, tmp_path, name, change, message
):
    pairs(configure("pairs", f"run={tiny_run}", f"out={tmp_path}", *PAIRS, "num_noises=4"))
    record = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps({**record, name: change}))
    with pytest.raises(ValueError, match=message):
        Pairs(tmp_path).setup()
    (tmp_path / "pairs.json").write_text("{")
    with pytest.raises(ValueError, match=r"pairs must be described by JSON, got .*pairs.json"):
        Pairs(tmp_path).setup()


def test_two_grids_of_a_number_of_steps_are_refused(tiny_run, configure, tmp_path):
    with pytest.raises(ValueError, match=r"grids of different numbers of steps, got \[4, 4\]"):
        pairs(configure("pairs", f"run={tiny_run}", f"out={tmp_path}", "grid=[4,4]", *PAIRS))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_is_straightened_and_measured(tiny_run, configure, tmp_path, lora_rank):
    """The student is the teacher's network, whatever model says, and needs no other options."""
    root, run = tmp_path / "p", tmp_path / "run"
    pairs(configure("pairs", f"run={tiny_run}", f"out={root}", "grid=[2,3]", *PAIRS))
    options = ["module=straightening", f"module.start={tiny_run}", f"module.lora_rank={lora_rank}"]
    data = ["data=pairs", f"data.root={root}", "model=dit"]
    short = [option for option in TINY if not option.startswith("model.")]
    cfg = configure("train", *short, *options, *data, f"run_dir={run}", "optimizer.lr=3e-4")
    trained = train(cfg)
    # the run stands on its own: neither the teacher nor the pairs are needed to load it
    moved = tmp_path / "elsewhere"
    shutil.move(root, moved)
    module = load_run(run)
    x, t, cond = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 9])
    torch.testing.assert_close(module(x, t, cond), trained(x, t, cond))
    teacher = load_run(tiny_run)
    near, far = module(x, t, cond) - teacher(x, t, cond), teacher(x, t, cond)
    assert 0 < near.norm() < far.norm()
    merged = module.merged()
    assert list(merged.state_dict()) == list(teacher.velocity.state_dict())
    torch.testing.assert_close(merged(x, t, cond), module(x, t, cond), rtol=1e-6, atol=1e-6)
    shutil.move(moved, root)
    # its own grids are warned about neither here nor anywhere, and it is measured by real data
    grid = ["sampler=from_file", f"sampler.grid.file={root}/grid-3.json"]
    options = [f"run={run}", "metric=pixels", "num_samples=20", *grid]
    record = evaluate(configure("evaluate", *options))
    real = Digits()
    real.setup()
    assert record["data"]["test"] == real.fingerprint("test")
    with pytest.warns(UserWarning, match=r"grid-3.json should be used with method 'euler'"):
        evaluate(configure("evaluate", *options, "sampler.method=heun"))


def test_students_teach_students(tiny_run, configure, tmp_path):
    """Of a low-rank student the merged network is taken, and its real data are found."""
    options = ["module=straightening", f"module.start={tiny_run}", "module.grid=2"]
    more = ["module.fine_steps=4", "module.lora_rank=2", "trainer.max_steps=4"]
    train(configure("train", *TINY, *options, *more, f"run_dir={tmp_path}/first"))
    first = load_run(tmp_path / "first")
    pairs(configure("pairs", f"run={tmp_path}/first", f"out={tmp_path}/p", *PAIRS, "guidance=1"))
    second = Straightening(load_run(tiny_run).velocity)
    second.begin(first)
    x, t, cond = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 9])
    torch.testing.assert_close(second(x, t, cond), first(x, t, cond), rtol=1e-5, atol=1e-6)
    options = ["module=straightening", f"module.start={tmp_path}/first", "trainer.max_steps=2"]
    data = ["data=pairs", f"data.root={tmp_path}/p"]
    train(configure("train", *TINY, *options, *data, f"run_dir={tmp_path}/second"))
    options = ["metric=pixels", "num_samples=20", "sampler.grid=2"]
    record = evaluate(configure("evaluate", f"run={tmp_path}/second", *options))
    assert record["data"]["name"] == "Digits"


@pytest.mark.parametrize("method", ["straightening", "mean_flow"])
def test_a_resumed_student_needs_the_run_it_started_from_no_more(
    tiny_run, configure, tmp_path, method
):
    start = shutil.copytree(tiny_run, tmp_path / "start")
    options = [*TINY, f"module={method}", f"module.start={start}", "trainer.val_check_interval=2"]
    if method == "straightening":
        pairs(configure("pairs", f"run={start}", f"out={tmp_path}/p", "grid=[2]", *PAIRS))
        options += ["data=pairs", f"data.root={tmp_path}/p"]
    four = "trainer.max_steps=4"
    train(configure("train", *options, four, f"run_dir={tmp_path}/whole"))
    train(configure("train", *options, "trainer.max_steps=2", f"run_dir={tmp_path}/first"))
    second = shutil.copytree(tmp_path / "first", tmp_path / "second")
    shutil.rmtree(start)
    train(resumed(configure("train", f"resume={tmp_path}/first"), [four]))
    train(configure("train", *options, four, f"resume={second}", f"run_dir={second}"))
    whole = load_run(tmp_path / "whole").state_dict()
    for name in ("first", "second"):
        ours = load_run(tmp_path / name).state_dict()
        assert all(torch.equal(ours[key], value) for key, value in whole.items())


def test_a_teacher_is_read_again_for_its_batches_and_changes_no_draw(tiny_run, configure, tmp_path):
    start = shutil.copytree(tiny_run, tmp_path / "start")
    options = [*TINY, "module=straightening", f"module.start={start}", "module.grid=2"]
    options += ["module.fine_steps=4", "trainer.val_check_interval=2"]
    four = "trainer.max_steps=4"
    train(configure("train", *options, four, f"run_dir={tmp_path}/whole"))
    train(configure("train", *options, "trainer.max_steps=2", f"run_dir={tmp_path}/half"))
    again = resumed(configure("train", f"resume={tmp_path}/half"), [four])
    start.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"module\.start must be a run folder, .*start"):
        train(again.copy())
    (tmp_path / "moved").rename(start)
    train(again)
    ours, theirs = (load_run(tmp_path / name).state_dict() for name in ("half", "whole"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_a_teacher_teaches_as_training_goes(tiny_run, configure, tmp_path):
    options = ["module=straightening", f"module.start={tiny_run}", "module.grid=[0,0.3,1]"]
    more = ["module.fine_steps=10", "module.guidance=2", "trainer.max_steps=4"]
    train(configure("train", *TINY, *options, *more, f"run_dir={tmp_path}"))
    assert load_run(tmp_path).sample(2, ODESampler([0, 0.3, 1.0]), torch.tensor([1, 2])).std() > 0.1


@pytest.fixture(scope="module")
def source_run(tmp_path_factory):
    """A flow from eight Gaussians to moons: samples start from the data's own source."""
    from hydra import compose, initialize_config_dir

    from tests.conftest import CONF

    folder = tmp_path_factory.mktemp("source")
    options = ["data=toy", "data.source=8gaussians", "data.target=moons", "data.size=200"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", overrides=[*TINY, *options, f"run_dir={folder}"])
    train(cfg)
    return folder


def test_pairs_start_from_the_source_samples_of_the_data(source_run, configure, tmp_path):
    """And so do the student's samples."""
    options = ["num_noises=40", "shard_size=20", "batch_size=8", "fine_steps=10", "grid=2"]
    pairs(configure("pairs", f"run={source_run}", f"out={tmp_path}/p", *options))
    source = Toy("8gaussians", "moons", size=200)
    source.setup()
    x0 = source.train[:40]["x0"]
    made = library.segments(load_run(source_run).velocity, x0, 10, 2)
    record, columns = read_pairs(tmp_path / "p")
    assert record["x0_is_noise"] is False
    for key in ("x0", "x1", "t0", "t1"):
        torch.testing.assert_close(columns[key], made[key], rtol=1e-4, atol=1e-4)
    student = ["module=straightening", f"module.start={source_run}"]
    data = ["data=pairs", f"data.root={tmp_path}/p"]
    train(configure("train", *TINY, *student, *data, f"run_dir={tmp_path}/run"))
    drawn = sample(configure("sample", f"run={tmp_path}/run", "num_samples=5", "sampler.grid=2"))
    module = load_run(tmp_path / "run")
    expected = module.solve(source.test[:5]["x0"], ODESampler(2, "heun")).x
    torch.testing.assert_close(drawn, expected)


def test_a_teacher_starts_from_the_source_samples_of_the_data(source_run, configure, tmp_path):
    """They are not mistaken for pairs that a teacher made."""
    options = ["module=straightening", f"module.start={source_run}", "module.fine_steps=5"]
    toy = ["data=toy", "data.source=8gaussians", "data.target=moons", "data.size=200"]
    cfg = configure("train", *TINY, *options, *toy, f"run_dir={tmp_path}", "trainer.max_steps=2")
    module = train(cfg)
    source = Toy("8gaussians", "moons", size=200)
    source.setup()
    batch = source.val[:8]
    chords = module.loss(batch, torch.Generator().manual_seed(0))["loss"]
    x1 = ODESampler(5)(load_run(source_run).velocity, batch["x0"])
    made = {"x0": batch["x0"], "x1": x1, "taught_by": "it"}
    expected = module.loss(made, torch.Generator().manual_seed(0))["loss"]
    torch.testing.assert_close(chords, expected)


def test_the_option_pairs_builds(configure):
    assert isinstance(instantiate(configure("train", "data=pairs", "data.root=x").data), Pairs)
