"""What ``flowkit export`` hands over, and what it refuses; see tests/runs/test_exporting.py."""

import re

import pytest
import torch

from flowkit import grids
from flowkit.modules import load_run
from flowkit.recipes import export as recipe
from flowkit.runs import Run
from tests.recipes.conftest import status_of


@pytest.fixture
def handed(configure, tiny_run, tmp_path, monkeypatch):
    """What the recipe hands over to be written, for options."""
    calls = []

    def write(*arguments):
        calls.append(arguments)
        checks = {"samples": 64, "largest difference": 0.0, "tolerance": 0.001}
        return {"checks": checks, "bytes": 0, "file": "model.pt2"}

    monkeypatch.setattr(recipe, "write", write)

    def hand(*options):
        recipe.export(configure("export", f"run={tiny_run}", f"out={tmp_path}/out", *options))
        return calls.pop()

    return hand


def test_solver_steps_guidance_and_classes_are_the_runs_or_those_asked_for(handed, tmp_path):
    module, folder, form, sampler, guidance, classes, license = handed()
    assert (folder, form, license) == (tmp_path / "out", "torch", None)
    assert (sampler.method, len(sampler.times)) == ("heun", 26)
    assert classes == [*"0123456789"]
    assert guidance is None
    assert module.weights["kind"] == "averaged"
    asked = handed("steps=3", "guidance=2", "license=mit", "format=onnx", "weights=raw")
    assert asked[2] == "onnx"
    assert torch.equal(asked[3].times, grids.uniform(3))
    assert (asked[3].method, asked[4], asked[6]) == ("heun", 2, "mit")
    assert asked[0].weights["kind"] == "raw"
    grids.save([0.0, 0.3, 1.0], tmp_path / "grid.json")
    found = handed("sampler=from_file", f"sampler.grid.file={tmp_path}/grid.json")[3]
    assert (found.method, found.times.tolist()) == ("euler", [0.0, 0.3, 1.0])


def test_the_license_of_a_shared_model_goes_with_it(handed, tiny_run, tmp_path):
    shared = tmp_path / "shared"
    load_run(tiny_run).save_pretrained(shared, license="mine: all")
    assert handed(f"run={shared}")[6] == "mine: all"
    assert handed(f"run={shared}", "license=mit")[6] == "mit"
    load_run(tiny_run).save_pretrained(tmp_path / "none")
    assert handed(f"run={tmp_path}/none")[6] is None


def test_steps_beside_times_and_runs_from_data_are_refused(handed, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="steps must be null for a sampler with times of its own"):
        handed("sampler=shifted", "steps=4")
    monkeypatch.setattr(Run, "brings_starts", True)
    with pytest.raises(ValueError, match="run must start from noise and class labels to be expor"):
        handed()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # a recipe is run that is imported already
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("steps=0", "steps must be int >= 1 or null, got 0"),
        ("format=keras", "format must be torch or onnx or diffusers, got keras"),
        ("format=diffusers", "velocity must be one of UNet2DModel, .* got ResidualMLP; format=tor"),
        ("sampler=dopri5", "sampler must take fixed steps to be exported, .* got dopri5"),
        ("sampler=sde", "sampler must take fixed steps to be exported, .* got SDESampler"),
    ],
)
def test_wrong_options_end_in_one_line(option, said, tiny_run, tmp_path, monkeypatch, capsys):
    words = ["export", f"run={tiny_run}", f"out={tmp_path}/out", option]
    assert status_of(words, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {said}", line), line
    assert not (tmp_path / "out").exists()
