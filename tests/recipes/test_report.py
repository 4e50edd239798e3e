"""The table of cost and quality."""

import json
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir

from flowkit import grids
from flowkit.metrics import Pixels, as_saved, frechet_distance
from flowkit.modules import FlowModule
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.report import report
from flowkit.recipes.train import train
from flowkit.runs import Run, own_grid, report_plots, saved_grid
from flowkit.runs.training_cost import read_cost
from tests.conftest import CONF
from tests.recipes.conftest import TINY

OPTIONS = ["metric=pixels", "num_samples=40", "solvers=[euler,heun,ab2]", "nfe=[1,4]"]


def test_cells_are_those_of_evaluate_and_are_measured_once(
    tiny_run, configure, tmp_path, monkeypatch, capsys
):
    options = [f"run={tiny_run}", f"out={tmp_path}", *OPTIONS]
    rows = report(configure("report", *options))
    # One evaluation is shown beside two and four; it is no Heun step and no ab2 step.
    cells = [(row["solver"], row["grid"], row["steps"], row["nfe"]) for row in rows]
    counts = {"euler": [(1, 1), (2, 2), (4, 4)], "heun": [(1, 2), (2, 4)]}
    expected = {**counts, "ab2": [(1, 2), (3, 4)]}
    assert cells == [
        (solver, name, *cost)
        for solver, costs in expected.items()
        for name in ("uniform", "shifted")
        for cost in costs
    ]
    sampler = ["sampler=heun", "sampler.grid=2", "metric=pixels", "num_samples=40"]
    record = evaluate(configure("evaluate", f"run={tiny_run}", f"out={tmp_path}/one", *sampler))
    heun = next(row for row in rows if row["solver"] == "heun" and row["nfe"] == 4)
    assert heun["distance"] == pytest.approx(record["metrics"]["frechet_distance"])
    floor = json.loads((tmp_path / "report.json").read_text())["measure"]["floor"]
    data = Run.load(tiny_run).data
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:40]
    train, test = (as_saved(x) for x in (data.train[order]["x1"], data.test[:]["x1"]))
    assert floor == pytest.approx(frechet_distance(Pixels()(train), Pixels()(test)), rel=1e-4)
    table = (tmp_path / "report.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| heun | uniform | 2 | 4 | {heun['distance']:.3f} |" in table
    title = "Fréchet distance (pixels), unreliable | class agreement | precision, unreliable |"
    assert title in table  # of 40 samples
    assert (tmp_path / "report.png").is_file()
    assert not list(tmp_path.glob("parts-*"))

    # A second call measures what has been added, and nothing again.
    solve, solved = FlowModule.solve, []

    def count(self, x0, sampler, *args, **kwargs):
        solved.append(sampler.method)
        return solve(self, x0, sampler, *args, **kwargs)

    monkeypatch.setattr(FlowModule, "solve", count)
    again = report(configure("report", *options, "solvers=[euler,heun,ab2,rk4]"))
    assert again[:-2] == rows
    assert solved == ["rk4"]  # one step is the same on both grids
    report(configure("report", *options, "seed=1"))
    assert len(solved) == 1 + len({row["key"] for row in rows})


def test_a_report_with_other_cells_keeps_the_earlier_one(tiny_run, configure, tmp_path):
    options = [f"run={tiny_run}", f"out={tmp_path}", *OPTIONS[:2], "solvers=[euler]"]
    report(configure("report", *options, "nfe=[4]"))
    report(configure("report", *options, "nfe=[4,8]"))  # more cells: the same report goes on
    assert not (tmp_path / "report-1.json").exists()
    first = {file.suffix: file.read_bytes() for file in tmp_path.glob("report.*")}
    report(configure("report", *options, "nfe=[4]"))
    kept = {file.suffix: file.read_bytes() for file in tmp_path.glob("report-1.*")}
    assert first == kept
    assert first.keys() == {".json", ".md", ".png"}
    report(configure("report", *options, "nfe=[4]", "seed=1"))
    assert len(list(tmp_path.glob("report-2.*"))) == 3


def test_points_are_measured_by_w2_on_grids_of_a_folder(configure, tmp_path):
    run = tmp_path / "run"
    train(configure("train", *TINY, "data=toy", "data.size=500", f"run_dir={run}"))
    grids.save(grids.power(4, 2.0), tmp_path / "grid-4.json")
    node = f"{{_target_: flowkit.runs.saved_grid, _partial_: true, folder: {tmp_path}}}"
    options = [f"run={run}", *OPTIONS[1:], f"+grids.boss={node}", "grids.shifted=null"]
    rows = report(configure("report", *options))
    found = [(row["solver"], row["nfe"]) for row in rows if row["grid"] == "boss"]
    assert found == [("euler", 4)]
    assert {row["grid"] for row in rows} == {"uniform", "boss"}
    assert all(row["distance"] > 0 for row in rows)
    with pytest.raises(ValueError, match=r"solvers must be among euler, ab2, .*, got dopri5"):
        report(configure("report", *options, "solvers=[dopri5]"))


def test_a_feature_mode_is_of_blockwise_runs_alone(tiny_run, configure):
    with pytest.raises(ValueError, match="feature_mode must be null for a run without blocks"):
        report(configure("report", f"run={tiny_run}", "feature_mode=cached"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["nfe=4"], TypeError, r"nfe must be a list of numbers, such as \[4, 8\], got 4"),
        (
            ["solvers=[rk4]", "nfe=[2,3]"],
            ValueError,
            r"nfe must hold a number .* got \[2, 3\] for rk4",
        ),
        (["guidance=abc"], TypeError, "guidance must be a number, .* got 'abc'"),
        (["guidance=[1,abc]"], TypeError, "guidance must be a number, .* got 'abc'"),
        (
            ["guidance=[]"],
            ValueError,
            r"guidance must be null, a number or a list of numbers, got \[\]",
        ),
        (["guidance=[null,2]"], ValueError, r"guidance must be null, .* got \[None, 2\]"),
        (
            ["device=foo"],
            ValueError,
            "device must be a device of this machine, such as cpu, got foo",
        ),
        (["devices=0"], ValueError, "devices must be at least 1, got 0"),
    ],
)
def test_slips_are_named_before_anything_is_drawn(tiny_run, configure, options, error, message):
    with pytest.raises(error, match=message):
        report(configure("report", f"run={tiny_run}", *OPTIONS, *options))


# --- several runs ---------------------------------------------------------------------------------

FEW = [*OPTIONS[:2], "solvers=[euler,heun]", "nfe=[1,4]", "grids.shifted=null"]


def _compose(recipe, *overrides):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(recipe, overrides=list(overrides))


@pytest.fixture(scope="module")
def tiny_run(tiny_run, tmp_path_factory):
    """The tiny run without the grids that tests of other files may have searched for it."""
    folder = tmp_path_factory.mktemp("report") / "run"
    return shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("boss", "report"))


@pytest.fixture(scope="module")
def mean_run(tiny_run, tmp_path_factory):
    """A mean flow that learns from the tiny run under guidance 1.5."""
    folder = tmp_path_factory.mktemp("mean") / "run"
    learnt = ["module=mean_flow", f"module.start={tiny_run}", "module.guidance_scale=1.5"]
    train(_compose("train", *TINY, *learnt, "trainer.max_steps=6", f"run_dir={folder}"))
    return folder


def numbers(rows):
    """The rows without the name of their run and the time."""
    return [{k: v for k, v in row.items() if k not in ("name", "milliseconds")} for row in rows]


def test_several_runs_have_the_numbers_of_their_own_reports(
    tiny_run, mean_run, configure, tmp_path, monkeypatch
):
    both = [f"run=[{tiny_run},{mean_run}]", f"out={tmp_path}/both", *FEW]
    shown = []
    monkeypatch.setattr(report_plots, "save_figure", lambda figure, file: shown.append(figure))
    rows = report(configure("report", *both, "names=[flow,mean flow]"))
    flow = report(configure("report", f"run={tiny_run}", f"out={tmp_path}/flow", *FEW))
    mean = report(configure("report", f"run={mean_run}", f"out={tmp_path}/mean", *FEW))
    assert numbers(rows) == numbers([*flow, *mean])
    # Other solvers than Euler would not use the means.
    assert [(row["solver"], row["nfe"]) for row in mean] == [("euler", n) for n in (1, 2, 4)]
    step = ["sampler=euler", "sampler.grid=1", "num_samples=40", "metric=pixels"]
    alone = evaluate(configure("evaluate", f"run={mean_run}", f"out={tmp_path}/one", *step))
    assert mean[0]["distance"] == pytest.approx(alone["metrics"]["frechet_distance"])

    # The table: distances by evaluations, rows, and the cost of training without and with teacher.
    table = (tmp_path / "both" / "report.md").read_text()
    (line,) = [line for line in table.splitlines() if line.startswith("| mean flow | euler | un")][
        :1
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    own, teacher = read_cost(mean_run), read_cost(tiny_run)
    assert cells[3] == "1.5, learnt"
    assert cells[4:7] == [f"{r['distance']:.4g} ({r['class_agreement']:.2f})" for r in mean]
    assert cells[7] == "1, 2, 4"
    assert cells[8] == f"{own['seconds']:.4g} ({own['processor_seconds']:.4g})"
    assert cells[9].startswith(f"{own['seconds'] + teacher['seconds']:.4g} (")

    # The plot: a line per curve in each panel, and the floor.
    floor = json.loads((tmp_path / "both" / "report.json").read_text())["measure"]["floor"]
    for axes, key in zip(shown[0].axes, ("nfe", "network_rows_per_sample"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        drawn = lines["mean flow"].get_xydata().tolist()
        assert drawn == [[row[key], row["distance"]] for row in mean]
        assert len({line.get_color() for line in axes.lines}) == len(lines) == 4
        assert lines["floor: training samples"].get_ydata()[0] == floor
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")

    # Other names and another run beside them measure nothing again.
    monkeypatch.setattr(FlowModule, "solve", None)
    again = report(configure("report", *both, "names=[a,b]"))
    assert numbers(again) == numbers(rows)


def test_wrong_mixes_of_runs_are_refused(tiny_run, mean_run, configure, tmp_path):
    other = tmp_path / "other"
    short = ["trainer.max_steps=1", f"run_dir={other}"]
    train(_compose("train", *TINY, "data.split_seed=1", *short))
    both = f"run=[{tiny_run},{mean_run}]"
    mixes = {
        f"run=[{tiny_run},{other}]": f"run must hold runs of the same data, got {tiny_run} and "
        f"{other}, which differ in train split and test split",
        both: "names must be 2 different names, got .* give names",
        f"{both} names=[a]": r"names must be 2 different names, got \['a'\]",
        f"{both} names=[a,b] guidance=2": "guidance must be null or 1 for a network that has "
        "learnt guidance 1.5, got 2",
        f"{both} names=[a,b] solvers=[heun]": "solvers must hold euler for the mean velocities of "
        f"{mean_run}, got heun",
    }
    for mix, message in mixes.items():
        with pytest.raises(ValueError, match=message) as error:
            report(configure("report", *FEW, f"out={tmp_path}", *mix.split()))
        assert "\n" not in str(error.value)


def test_each_run_has_its_own_grids(tiny_run, mean_run, configure, tmp_path):
    flow = tmp_path / "flow"
    shutil.copytree(tiny_run, flow)
    (flow / "boss").mkdir()
    grids.save(grids.power(4, 2.0), flow / "boss" / "grid-4.json")
    runs = [f"run=[{flow},{mean_run}]", "names=[flow,mean]", f"out={tmp_path}/report", *FEW]
    rows = report(configure("report", *runs, "solvers=[euler]"))
    found = [(row["name"], row["nfe"]) for row in rows if row["grid"] == "own"]
    assert found == [("flow", 4)]
    own = json.loads(next(row["key"] for row in rows if row["grid"] == "own"))
    assert own["grid"] == grids.power(4, 2.0).tolist()
    assert list(report_plots.lines_of(rows, "solver", "grid")) == [
        "flow, uniform",
        "flow, own",
        "mean",
    ]


@pytest.mark.parametrize("kind", ["pairs", "times"])
def test_a_straightened_run_owns_the_grid_of_its_segments(kind, tmp_path):
    grid = grids.power(4, 2.0)
    grids.save(grid, tmp_path / "grid-4.json")
    data = {"_target_": "flowkit.data.Pairs", "root": str(tmp_path)} if kind == "pairs" else {}
    module = {"grid": grid.tolist() if kind == "times" else None}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data, "module": module}))
    assert torch.equal(own_grid(4, str(tmp_path)), grid)
    assert own_grid(3, str(tmp_path)) is None


def test_the_main_grid_of_a_search_is_found_by_its_number_of_steps(tmp_path):
    grids.save(grids.power(8, 2.0), tmp_path / "grid.json")
    grids.save(grids.power(4, 3.0), tmp_path / "grid-4.json")
    assert torch.equal(saved_grid(8, str(tmp_path)), grids.power(8, 2.0))
    assert torch.equal(saved_grid(4, str(tmp_path)), grids.power(4, 3.0))
    assert saved_grid(2, str(tmp_path)) is None
