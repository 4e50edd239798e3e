"""The table of cost and quality."""

import json

import pytest
import torch

from flowkit import grids
from flowkit.metrics import Pixels, as_saved, frechet_distance
from flowkit.modules import FlowModule
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.report import report
from flowkit.recipes.train import train
from flowkit.runs import Run
from tests.recipes.conftest import TINY

OPTIONS = ["metric=pixels", "num_samples=40", "solvers=[euler,heun,ab2]", "nfe=[1,4]"]


def test_cells_are_those_of_evaluate_and_are_measured_once(
    tiny_run, configure, tmp_path, monkeypatch, capsys
):
    options = [f"run={tiny_run}", f"out={tmp_path}", *OPTIONS]
    rows = report(configure("report", *options))
    # With one evaluation there is no Heun step and no ab2 step.
    cells = [(row["solver"], row["grid"], row["steps"], row["nfe"]) for row in rows]
    expected = {"euler": [(1, 1), (4, 4)], "heun": [(2, 4)], "ab2": [(3, 4)]}
    assert cells == [
        (solver, name, *cost)
        for solver, costs in expected.items()
        for name in ("uniform", "shifted")
        for cost in costs
    ]
    sampler = ["sampler=heun", "sampler.grid=2", "metric=pixels", "num_samples=40"]
    record = evaluate(configure("evaluate", f"run={tiny_run}", f"out={tmp_path}/one", *sampler))
    heun = next(row for row in rows if row["solver"] == "heun")
    assert heun["distance"] == pytest.approx(record["metrics"]["frechet_distance"])
    floor = json.loads((tmp_path / "report.json").read_text())["measure"]["floor"]
    data = Run.load(tiny_run).data
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:40]
    train, test = (as_saved(x) for x in (data.train[order]["x1"], data.test[:]["x1"]))
    assert floor == pytest.approx(frechet_distance(Pixels()(train), Pixels()(test)), rel=1e-4)
    table = (tmp_path / "report.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| heun | uniform | 2 | 4 | {heun['distance']:.3f} |" in table
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
            ["solvers=[heun]", "nfe=[1]"],
            ValueError,
            r"nfe must hold a number .* got \[1\] for heun",
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
