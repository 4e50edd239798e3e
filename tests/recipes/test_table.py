"""The table over several evaluations: its numbers, and what it marks as incomparable."""

import json

import pytest
from hydra import compose, initialize_config_dir

from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.table import table
from flowkit.runs.metrics_table import table as in_markdown
from tests.conftest import CONF

SMALL = ["num_samples=20", "metric=pixels", "sampler=heun", "sampler.grid=2"]


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """Folders with records of one run, each but the first with one other option."""
    root = tmp_path_factory.mktemp("evaluated")
    others = {"first": [], "guided": ["guidance=2"], "more": ["num_samples=30"]}
    with initialize_config_dir(CONF, version_base="1.3"):
        for name, given in others.items():
            options = [f"run={tiny_run}", f"out={root / name}", *SMALL, *given]
            evaluate(compose("evaluate", options))
    return root


def tabulated(configure, *places, **options):
    given = [f"{key}={value}" for key, value in options.items()]
    return table(configure("table", f"runs=[{','.join(map(str, places))}]", *given))


@pytest.mark.parametrize(
    ("value", "ends", "shown"),
    [
        (5697.386, [2071.53, 14281.36], "5697 [2072, 14281]"),
        (80.7204, None, "80.72"),
        (0.031, [0.02, 0.104], "0.03100 [0.02000, 0.10400]"),
        (0.0, [0.0, 0.2775], "0.0000 [0.0000, 0.2775]"),
        (3, None, "3"),
        (2.5e-6, None, "2.5e-06"),
        (float("nan"), None, "nan"),
    ],
)
def test_a_number_and_its_interval_have_equal_decimals(value, ends, shown):
    metric = {"value": value, "interval": ends, "unreliable": False}
    row = {"name": "a", "metrics": {"recall": metric}, "num_samples": None, "weights": None}
    row |= dict.fromkeys(("sampler", "steps", "nfe", "guidance"))
    assert f"| {shown} |" in in_markdown([{**row, "differs": []}])


def test_numbers_are_those_of_the_records_and_other_settings_are_marked(
    evaluated, configure, tmp_path, capsys
):
    """Another guidance is no other measure; another number of samples is."""
    folders = [evaluated / name for name in ("first", "guided", "more")]
    capsys.readouterr()
    rows = tabulated(configure, *folders, out=tmp_path)
    records = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    for row, record in zip(rows, records, strict=True):
        found = row["metrics"]["kernel_distance"]
        assert found["value"] == record["metrics"]["kernel_distance"]
        assert found["interval"] == record["metrics"]["kernel_distance_interval"]
        assert row["metrics"]["recall"]["unreliable"]
        assert row["weights"]["hash"] == record["weights"]["hash"]
    assert [row["guidance"] for row in rows] == [None, 2, None]
    assert [row["nfe"] for row in rows] == [4, 4, 4]
    assert [row["differs"] for row in rows] == [[], [], ["number of samples"]]
    assert json.loads((tmp_path / "table.json").read_text()) == {"rows": rows}
    said = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out.startswith(said)
    lines = said.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["first", "guided", "more ≠"]
    assert "≠ more cannot be compared with first: other number of samples" in lines
    low, high = records[1]["metrics"]["class_agreement_interval"]
    shown = f"{records[1]['metrics']['class_agreement']:.4f} [{low:.4f}, {high:.4f}]"
    assert f"| {shown} |" in lines[3]


def test_another_reference_is_marked_and_numbers_can_be_chosen(
    evaluated, configure, tmp_path, capsys
):
    record = json.loads((evaluated / "first" / "metrics.json").read_text())
    record["reference"]["hash"] = record["data"]["test"] = "0" * 64
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "metrics.json").write_text(json.dumps(record))
    rows = tabulated(configure, evaluated / "first", tmp_path / "first", metrics="[recall]")
    assert [row["name"] for row in rows] == [str(evaluated / "first"), str(tmp_path / "first")]
    assert [row["differs"] for row in rows] == [[], ["reference", "test data"]]
    assert [list(row["metrics"]) for row in rows] == [["recall"]] * 2
    assert "| run | recall | samples |" in capsys.readouterr().out


def test_places_without_records_are_refused(evaluated, configure, tmp_path):
    (tmp_path / "a").mkdir()
    said = f"runs must be evaluated, got no {tmp_path}/metrics.json, {tmp_path}/a/metrics.json; "
    said += f"flowkit evaluate run={tmp_path}; flowkit evaluate run={tmp_path}/a$"
    with pytest.raises(FileNotFoundError, match=said):
        tabulated(configure, evaluated / "first", tmp_path, tmp_path / "a")
    said = f"runs must be files or folders that exist, got no {tmp_path}/b, {tmp_path}/c$"
    with pytest.raises(FileNotFoundError, match=said):
        tabulated(configure, tmp_path / "b", evaluated / "first", tmp_path / "a", tmp_path / "c")
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match="runs must have records of flowkit evaluate, got"):
        tabulated(configure, tmp_path)
    with pytest.raises(ValueError, match="metrics must be numbers of a run, got recal; did you"):
        tabulated(configure, evaluated / "first", metrics="[recal]")
    with pytest.raises(ValueError, match="the number of runs must be at least 1, got 0"):
        tabulated(configure)
