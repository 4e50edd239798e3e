"""Editing and inverting with runs and with pipelines, and comparing edits."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from flowkit.data import Folder
from flowkit.flowopt import FlowOpt
from flowkit.guidance import ClassifierFree
from flowkit.modules import load_run
from flowkit.recipes.compare_edits import compare_edits, edit_table
from flowkit.recipes.edit import edit, read_image, read_region
from flowkit.runs import Run
from flowkit.runs.editing import RunFlow
from flowkit.sampling import ODESampler
from tests.adapters import tiny_pipelines


@pytest.fixture
def digit(tmp_path):
    pixels = torch.arange(64, dtype=torch.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels.numpy()).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


@pytest.fixture
def photo(tmp_path):
    pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture(scope="module", params=["sd3", "flux"])
def pipeline_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make = {"sd3": tiny_pipelines.stable_diffusion_3, "flux": tiny_pipelines.flux}
    make[request.param]().save_pretrained(folder)
    return request.param, folder


def size(file):
    with Image.open(file) as picture:
        return picture.size


# --- runs ---------------------------------------------------------------------------------------


def test_an_edit_leaves_a_strip_a_curve_the_latent_and_a_record(
    tiny_run, digit, configure, tmp_path
):
    out = tmp_path / "out"
    options = ["source=0", "target=8", "num_iters=3", "num_steps=4", "target_guidance=2"]
    found = edit(configure("edit", f"run={tiny_run}", f"image={digit}", f"out={out}", *options))
    record = json.loads((out / "edit.json").read_text())
    assert record["nfe"] == found.nfe == 5 + 4 * 4
    assert record["residuals"] == pytest.approx(found.residuals[:, 0].tolist())
    assert record["settings"]["grid"] == [0, 0.25, 0.5, 0.75, 1]
    assert record["settings"]["step_size"] == 0.1
    assert record["status"] == "iterations"
    assert record["model"]["step"] == 20
    assert size(out / "strip.png") == (5 * 66 + 2, 68)
    assert size(out / "residuals.png")[0] > 100
    stored = torch.load(out / "edit.pt", weights_only=True)
    assert torch.equal(stored["z"], found.z)
    assert stored["images"].shape == (4, 1, 8, 8)
    for k in range(4):
        iterate = read_image(out / "iterates" / f"{k:02}.png", 1)
        torch.testing.assert_close(iterate, found.trace[k].clamp(-1, 1), rtol=0, atol=0.005)


def test_an_edit_is_flowopt_with_guidance_on_the_target_alone(tiny_run, digit, configure, tmp_path):
    options = ["source=3", "target=8", "num_iters=2", "num_steps=5", "step_size=0.2"]
    options += ["backtrack=false", "target_guidance=3", "skip=1", f"out={tmp_path / 'o'}"]
    found = edit(configure("edit", f"run={tiny_run}", f"image={digit}", *options))
    velocity, sampler = load_run(tiny_run).velocity, ODESampler(ODESampler(5).times[1:])
    x1, source, target = read_image(digit, 1), torch.tensor([3]), torch.tensor([8])
    guided = ClassifierFree(velocity, 3.0, 10)
    with torch.no_grad():
        z = sampler.invert(velocity, x1, source, correct=True).x
        for k in range(3):
            x = sampler(guided, z, target)
            torch.testing.assert_close(found.trace[k], x)
            if k < 2:
                z = z - 0.2 * (x - x1)
    torch.testing.assert_close(found.z, z)


def test_without_a_target_it_inverts(tiny_run, digit, configure, tmp_path):
    options = ["source=3", "num_iters=20", "num_steps=5", f"out={tmp_path / 'o'}"]
    found = edit(configure("edit", f"run={tiny_run}", f"image={digit}", *options))
    record = json.loads((tmp_path / "o" / "edit.json").read_text())
    assert record["settings"]["step_size"] == "auto"
    assert found.residuals[-1] < 0.1 * found.residuals[0]
    module = load_run(tiny_run)
    with torch.no_grad():
        again = ODESampler(5)(module.velocity, found.z, torch.tensor([3]))
    torch.testing.assert_close(again, found.x)
    assert set(record["gaussianity"]) == {"norm", "chi2", "autocorrelation"}


def test_a_region_changes_where_it_is_white(tiny_run, digit, configure, tmp_path):
    region = torch.zeros(8, 8, dtype=torch.uint8)
    region[:, 4:] = 255
    Image.fromarray(region.numpy()).save(tmp_path / "region.png")
    options = ["source=3", "target=8", "num_iters=40", "num_steps=5"]
    options += [
        f"region={tmp_path}/region.png",
        "step_size=auto",
        "target_guidance=4",
        f"out={tmp_path / 'o'}",
    ]
    found = edit(configure("edit", f"run={tiny_run}", f"image={digit}", *options))
    change = (found.x - read_image(digit, 1)).abs()[0, 0]
    assert change[:, :4].mean() < 0.2 * change[:, 4:].mean()
    assert json.loads((tmp_path / "o" / "edit.json").read_text())["region"].endswith("region.png")


def test_the_default_folder_names_the_edit(tiny_run, digit, configure, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    with Image.open(digit) as picture:
        picture.convert("L").save(tmp_path / "digit.jpg")
    for image in (digit, tmp_path / "digit.jpg"):
        options = ["source=0", "target=8", "num_iters=0"]
        edit(configure("edit", f"run={run}", f"image={image}", *options))
    for name in ("digit.png", "digit.jpg"):  # each in a folder of its own
        record = json.loads((run / "edits" / f"{name}-0-to-8" / "edit.json").read_text())
        assert record["image"].endswith(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["run=null", "source=3"],
            "run or pipeline must be given, but not both, got None",
        ),
        (["pipeline=p", "source=3"], "run or pipeline must be given, but not both"),
        (["source=12"], r"source must be a class in \[0, 9\], got 12"),
        (["source=cat"], "source must be the number or name of a class of the run, got cat; class"),
        (["source=null"], r"source must be a class in \[0, 9\], got None"),
        (["source=3", "target=10"], r"target must be a class in \[0, 9\], got 10"),
        (["source=3", "image=missing.png"], "image must be a picture file, got missing.png"),
        (["source=3", "skip=10"], r"skip must lie in \[0, 9\], got 10"),
        (["source=3", "step_size=-1"], "step_size must be positive and finite, got -1"),
        (["source=3", "step_size=large"], "step_size must be a number or 'auto', got 'large'"),
    ],
)
def test_what_does_not_fit_a_run(options, message, tiny_run, digit, configure, tmp_path):
    defaults = [f"run={tiny_run}", f"image={digit}", f"out={tmp_path / 'o'}"]
    with pytest.raises(ValueError, match=message):
        edit(configure("edit", *defaults, *options))


def test_a_photo_is_squared_as_training_images_are(tiny_run, configure, tmp_path):
    """A wide photo, turned by its camera, and its region; a folder's data say what is right."""
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for k in range(12):
        photo = Image.fromarray(torch.randint(256, (30, 44, 3), dtype=torch.uint8).numpy())
        photo.save(tmp_path / "photos" / f"{k}.png", exif=exif)
    left = torch.zeros(44, 30, dtype=torch.uint8)  # upright it is 44 high
    left[:, :15] = 255
    Image.fromarray(left.numpy()).save(tmp_path / "left.png")
    data = Folder(tmp_path / "photos", 8, channels=1, val_fraction=0.4, test_fraction=0.4)
    data.setup()
    images = torch.cat([data.split(name)[:]["x1"] for name in ("train", "val", "test")])
    photo = tmp_path / "photos" / "0.png"
    assert sum(torch.equal(read_image(photo, 1, 8)[0], image) for image in images) == 1
    options = [f"run={tiny_run}", f"image={photo}", "source=3", "num_iters=1", "target=8"]
    cfg = configure("edit", *options, f"region={tmp_path}/left.png", f"out={tmp_path}/out")
    region = read_region(cfg, 8, images)[0, 0]
    # The edge is 3 pixels wide on each side, as Lanczos' filter is.
    assert torch.equal(region[:, [0, 7]], torch.tensor([1.0, 0.0]).expand(8, 2))
    assert edit(cfg).x.shape == (1, 1, 8, 8)


def test_an_earlier_edit_keeps_its_iterates(tiny_run, digit, configure, tmp_path):
    options = [f"run={tiny_run}", f"image={digit}", "source=3", "num_steps=2", f"out={tmp_path}/o"]
    edit(configure("edit", *options, "num_iters=5"))
    first = {f.name: f.read_bytes() for f in (tmp_path / "o" / "iterates").iterdir()}
    (tmp_path / "o" / "edit.json").unlink()  # as if killed before the record
    edit(configure("edit", *options, "num_iters=2"))
    assert len(list((tmp_path / "o" / "iterates").iterdir())) == 3  # none of the five
    edit(configure("edit", *options, "num_iters=5"))
    kept = {f.name for f in (tmp_path / "o" / "iterates-1").iterdir()}
    assert kept == {"00.png", "01.png", "02.png"}
    assert {f.name: f.read_bytes() for f in (tmp_path / "o" / "iterates").iterdir()} == first


def test_pictures_of_another_size(tiny_run, digit, photo, configure, tmp_path):
    with pytest.raises(ValueError, match=r"region must have the size of the image, \(8, 8\), got"):
        edit(configure("edit", f"run={tiny_run}", f"image={digit}", "source=3", f"region={photo}"))


def test_guidance_of_a_run_that_was_not_trained_for_it(tiny_run):
    run = Run.load(tiny_run)
    run.module.drop_cond = None
    model = RunFlow(run)
    with pytest.raises(ValueError, match="guidance must be null or 1 for a model"):
        model.condition(3, 2.0, "source")
    assert model.condition(3, 1.0, "source")["label"].tolist() == [3]


def test_a_run_without_classes(tiny_run):
    run = Run.load(tiny_run)
    run.config["num_classes"] = None
    model = RunFlow(run)
    assert model.condition(None, 1.0, "source") is None
    with pytest.raises(ValueError, match="target must be null for a run without classes, got 8"):
        model.condition(8, 1.0, "target")


# --- pipelines ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_pipeline_is_edited_with_the_published_settings(
    pipeline_folder, photo, configure, tmp_path
):
    name, folder = pipeline_folder
    options = [f"pipeline={folder}", f"image={photo}", "source=a cat", "target=a dog"]
    found = edit(configure("edit", *options, f"out={tmp_path / 'o'}"))
    record = json.loads((tmp_path / "o" / "edit.json").read_text())
    assert found.nfe == {"sd3": 121, "flux": 131}[name]
    assert record["settings"]["step_size"] == {"sd3": 0.01, "flux": 0.0025}[name]
    assert record["settings"]["backtrack"] is False
    assert record["settings"]["target_guidance"] == 3.5
    assert len(record["settings"]["grid"]) == {"sd3": 13, "flux": 14}[name]
    assert found.trace.shape == (9, 1, 4, 4, 4)
    assert size(tmp_path / "o" / "iterates" / "08.png") == (32, 32)
    assert record["gaussianity"] is None


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_does_not_fit_a_pipeline(pipeline_folder, photo, digit, configure, tmp_path):
    _, folder = pipeline_folder
    with pytest.raises(FileNotFoundError, match="pipeline must be a folder written by save_pre"):
        edit(configure("edit", f"pipeline={tmp_path}", f"image={photo}", "source=a cat"))
    with pytest.raises(ValueError, match="source must be a prompt for a pipeline, got 3"):
        edit(configure("edit", f"pipeline={folder}", f"image={photo}", "source=3"))
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\) with sides div"):
        edit(configure("edit", f"pipeline={folder}", f"image={digit}", "source=a cat"))


@pytest.mark.slow
def test_the_command(tiny_run, digit, tmp_path):
    command = [sys.executable, "-m", "flowkit", "edit", f"run={tiny_run}", f"image={digit}"]
    result = subprocess.run(
        [*command, "source=3", "target=8", f"out={tmp_path / 'o'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "status    all 12 iterations made, 141 evaluations" in result.stdout
    assert (tmp_path / "o" / "strip.png").is_file()


# --- comparisons --------------------------------------------------------------------------------


def test_comparisons_count_what_they_spend(tiny_run, configure, tmp_path):
    options = ["source=3", "target=8", "num_inverted=4", "num_edited=5", "solves=[2,8]"]
    options += ["num_steps=4", "target_guidance=2", f"out={tmp_path}", "rows=2"]
    record = compare_edits(configure("compare_edits", f"run={tiny_run}", *options))
    nfe = {(row["series"], row["nfe"]) for row in record["inversions"]}
    assert ("fixed point", 33) in nfe
    assert ("FlowOpt, automatic", 33) in nfe
    assert ("FlowOpt, automatic", 9) not in nfe, "too few evaluations to measure a step with"
    error = {(row["series"], row["nfe"]): row["rmse"] for row in record["inversions"]}
    assert error["corrected (Uni-Inv)", 33] < error["reversed Euler", 33]
    assert error["fixed point", 9] == pytest.approx(error["FlowOpt, fixed 0.01", 9], rel=1e-5)
    strengths = [row["strength"] for row in record["edits"] if row["series"] == "partial noising"]
    assert strengths == [1, 0.75, 0.5, 0.25]
    costs = [row["nfe"] for row in record["edits"] if row["series"] == "FlowOpt, automatic"]
    assert costs == [5 + 4 * 4 + 4 * (k + 1) for k in range(9)]
    skipped = [row["nfe"] for row in record["edits"] if row["series"].endswith("3 steps skipped")]
    assert skipped == [2 + (k + 1) for k in range(15)]
    for name in ("inversions.png", "edits.png", "strip.png", "inversions.md", "edits.md"):
        assert (tmp_path / name).is_file()


def test_half_of_the_comparison(tiny_run, configure, tmp_path):
    options = ["source=3", "target=8", "num_inverted=0", "num_edited=0", f"out={tmp_path}"]
    record = compare_edits(configure("compare_edits", f"run={tiny_run}", *options))
    assert record["inversions"] == record["edits"] == []
    with pytest.raises(ValueError, match=r"target must be a class in \[0, 9\], got 10"):
        compare_edits(configure("compare_edits", f"run={tiny_run}", "source=3", "target=10"))


def test_the_table_holds_the_least_distance_of_sufficient_scores():
    rows = [
        {"series": "a", "distance": d, "score": s} for d, s in ((0.4, 1.0), (0.3, 0.9), (0.1, 0.2))
    ]
    table = edit_table([*rows, {"series": "b", "distance": 0.2, "score": 0.6}], [0.5, 0.9])
    assert "| a | 0.300 | 0.300 |" in table
    assert "| b | 0.200 |  |" in table


def test_flowopt_on_a_batch_of_a_run(tiny_run):
    """Guidance in the condition serves batches, too."""
    model = RunFlow(Run.load(tiny_run))
    x1 = torch.rand(3, 1, 8, 8) * 2 - 1
    flowopt = FlowOpt(ODESampler(3), 0.2, 1)
    together = flowopt(model, x1, *(model.condition(k, 2.0, "c", 3) for k in (3, 8)))
    alone = flowopt(model, x1[:1], *(model.condition(k, 2.0, "c") for k in (3, 8)))
    torch.testing.assert_close(together.x[:1], alone.x, rtol=1e-4, atol=1e-5)
