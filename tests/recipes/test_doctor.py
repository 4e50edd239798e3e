"""``flowkit doctor``: the page, the record, the user's own network, and what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from flowkit.couplings import Gibbs, MinibatchOT
from flowkit.recipes.doctor import doctor
from flowkit.recipes.pairs import pairs
from flowkit.recipes.train import train
from flowkit.runs.diagnosing import paired
from tests.conftest import CONF
from tests.recipes.conftest import TINY, status_of

OWN = """
import torch
from flowkit.exact import MixtureFlow
def two():
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    return MixtureFlow(torch.ones(2), means, torch.full((2,), 0.5))
def reversed():
    flow = two()
    return lambda x, t, cond: flow(x, 1 - t)
def fails(): raise KeyError("weights")
def number(): return 3
def of_text(): return lambda x, t, cond: x + "a"
"""

# The command runs a module that this file has imported.
AGAIN = pytest.mark.filterwarnings("ignore:.*found in sys.modules")


def composed(recipe, *options):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(recipe, overrides=[*options])


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a user's networks and their data, as the working folder."""
    (tmp_path / "ownnets.py").write_text(OWN)
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(2, (600,), generator=generator)[:, None] * 2.0 - 1
    points = torch.cat([side, torch.zeros(600, 1)], 1)
    points += 0.5 * torch.randn(600, 2, generator=generator)
    np.save(tmp_path / "points.npy", points.numpy())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_run_of_twenty_steps_is_half_trained(tiny_run, tmp_path, capsys):
    found = doctor(composed("doctor", f"run={tiny_run}", f"out={tmp_path}"))
    said = capsys.readouterr().out.splitlines()
    assert found[0].name == "training"
    assert not found[0].ok
    assert said[0].startswith("look here  training ")
    assert said[1].split("-> ")[1] == found[0].advice
    figures = [
        row.index(finding.figure) for row, finding in zip(said[::2], found[:1], strict=False)
    ]
    assert figures == [said[2].index(found[1].figure)]  # the columns are aligned
    record = json.loads((tmp_path / "doctor.json").read_text())
    assert [one["name"] for one in record["findings"]] == [one.name for one in found]
    assert record["weights"]["step"] == 20
    cost = record["cost"]
    assert said[-2].startswith(f"network   {cost['calls']:,} calls, {cost['rows']:,} rows, ")
    names = {one.name: one for one in found}
    assert names["progress"].figure == "step 20 of 20"
    assert "averaged weights" in names


@pytest.mark.slow
def test_the_digits_that_come_with_flowkit_have_no_alarm(tmp_path):
    found = doctor(composed("doctor", "run=flowkit:digits", f"out={tmp_path}"))
    assert [one for one in found if not one.ok] == []


def test_a_stopped_training_is_told_first(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 20", "max_steps: 400"))
    found = doctor(composed("doctor", f"run={run}", "num_samples=40"))
    assert (found[0].name, found[0].figure) == ("progress", "step 20 of 400")
    assert found[1].advice == "may follow from progress: mend that first"


def test_a_small_test_split_is_told_before_the_work(tiny_run, tmp_path, monkeypatch):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    record = json.loads((run / "data.json").read_text())
    record["splits"]["test"]["samples"] = 6
    (run / "data.json").write_text(json.dumps(record))
    monkeypatch.setattr("flowkit.recipes.doctor.Run.load", None)  # it is not called
    said = (
        "the test split must hold at least 32 samples for flowkit doctor, got 6; give data=<data> "
        "with more samples, or train with a larger data.test_fraction"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        doctor(composed("doctor", f"run={run}", f"out={tmp_path}/out"))
    np.save(tmp_path / "points.npy", np.eye(40, 2, dtype=np.float32))
    few = ["velocity=torch.nn.Identity", "data=arrays", f"data.x1={tmp_path}/points.npy"]
    with pytest.raises(ValueError, match=r"the test split must hold at least 32 .*, got \d+;"):
        doctor(composed("doctor", *few, f"out={tmp_path}/out"))


@AGAIN
@pytest.mark.parametrize("name", ["two", "reversed"])
def test_a_network_of_the_user(name, own, monkeypatch, capsys):
    words = [f"velocity=ownnets.{name}", "data=arrays", "data.x1=points.npy", "out=o"]
    assert status_of(["doctor", *words], monkeypatch) == 0
    record = json.loads((own / "o" / "doctor.json").read_text())
    alarms = [one["name"] for one in record["findings"] if not one["ok"]]
    assert alarms == {"two": [], "reversed": ["time direction"]}[name]
    assert record["cost"]["calls"] > 100


@AGAIN
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of run and velocity must be given"),
        (["velocity=ownnets.two"], "data must be given with velocity="),
        (["velocity=ownnets.none", "data=toy"], "velocity must name a function"),
        (["velocity=ownnets.fails", "data=toy"], "got ownnets.fails: KeyError: 'weights'"),
        (["velocity=ownnets.number", "data=toy"], r"must return velocity\(x, t, cond\), got int"),
        (["velocity=ownnets.of_text", "data=toy"], "velocity must be callable as"),
        (["velocity=ownnets.two", "data=toy", "guidance=2"], "guidance must be absent with velo"),
        (["run={run}", "conditions=false"], "conditions must be absent with run="),
        (["run={run}", "path=cosine"], "path must be absent with run="),
        (["run={run}", "num_samples=9"], "num_samples must be"),
    ],
)
def test_wrong_options_end_in_one_line(words, message, own, tiny_run, monkeypatch, capsys):
    words = [word.format(run=tiny_run) for word in words]
    assert status_of(["doctor", *words, "out=o"], monkeypatch) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert re.search(message, told), told
    assert not (own / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "segments"])
def test_reflow_is_judged_by_its_pairs_and_segments_are_refused(name, tiny_run, tmp_path):
    made, run = tmp_path / "pairs", tmp_path / "run"
    grid = ["grid=[2]"] if name == "segments" else []
    few = ["num_noises=800", "fine_steps=2"]
    pairs(composed("pairs", f"run={tiny_run}", f"out={made}", *few, *grid))
    own = ["module=straightening", "data=pairs", f"data.root={made}", f"module.start={tiny_run}"]
    options = [*TINY[2:-1], "trainer.max_steps=2", "callback.samples=null"]
    options.append("trainer.val_check_interval=2")
    train(composed("train", *own, *options, f"run_dir={run}"))
    if name == "segments":
        with pytest.raises(TypeError, match="run must have learnt the velocity at all times"):
            doctor(composed("doctor", f"run={run}"))
    else:
        assert len(doctor(composed("doctor", f"run={run}"))) > 10
        assert json.loads((run / "doctor" / "doctor.json").read_text())["num_samples"] == 40


def test_pairs_are_those_of_the_training():
    x1 = torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    draw = {"generator": torch.Generator().manual_seed(0)}
    x0, ordered, _, _ = paired({"x1": x1}, MinibatchOT(), 64, **draw)
    assert ordered[x0[:, 0].argsort()].equal(x1.sort(0).values)  # optimal in one dimension
    assert sorted(x0.flatten().tolist()) != x0.flatten().tolist()
    near = Gibbs(0.05)
    x0, x1, _, _ = paired({"x1": x1, "x0": x0.flip(0)}, near, 64, **draw)
    assert (x0 - x1).abs().mean() < 0.5  # pairs far apart have no weight
