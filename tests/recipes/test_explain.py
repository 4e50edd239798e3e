"""Why two records differ: the settings, the size of each, and the sentence."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.explain import explain
from flowkit.recipes.sample import sample
from flowkit.runs.effects import EFFECTS, FEATURES
from flowkit.runs.explaining import differences, verdict
from tests.conftest import CONF

PAIRS = {
    "number of samples": ["num_samples=100"],
    "file format": ["jpeg=30"],
    "quantization": ["quantization=truncate"],
    "resize": ["resize=8", "filter=bilinear", "antialias=false"],
    "reference": ["split=train"],
}


@pytest.fixture(scope="module")
def records(tiny_run, tmp_path_factory):
    """Records of one set of samples, each but the first with one other setting."""
    folder = tmp_path_factory.mktemp("records")
    with initialize_config_dir(CONF, version_base="1.3"):
        options = [f"run={tiny_run}", f"out={folder}/drawn", "num_samples=300", "sampler.grid=2"]
        sample(compose("sample", options))
        sample(compose("sample", [*options[:1], f"out={folder}/few", "num_samples=20"]))
        base = [f"samples={folder}/drawn", f"reference={tiny_run}", "metric=pixels"]
        same_size = ["resize=8", "filter=lanczos"]
        for name, options in {"first": [], "resized": same_size, **PAIRS}.items():
            evaluate(compose("evaluate", [*base, *options, f"out={folder}/{name}"]))
    return folder


def explained(records, name, *options):
    first = "resized" if name == "resize" else "first"
    files = f"records=[{records}/{first}/metrics.json,{records}/{name}/metrics.json]"
    with initialize_config_dir(CONF, version_base="1.3"):  # the recipe composes evaluations
        return explain(compose("explain", [files, *options]))


def number(records, name, value="frechet_distance"):
    return json.loads((records / name / "metrics.json").read_text())["metrics"][value]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_that_differs_in_one_way_is_explained_by_it(name, records, tiny_run, capsys):
    from_records = explained(records, name)
    assert from_records[0].name == name
    assert [one.name for one in from_records[1:]] in ([], ["chance"])
    capsys.readouterr()
    place = [f"samples={records}/drawn", f"reference={tiny_run}", "metric=pixels"]
    again = explained(records, name, *place)
    said = capsys.readouterr().out
    assert [one.name for one in again] == [name]  # chance is in what was measured
    gap = number(records, name) - number(records, "resized" if name == "resize" else "first")
    assert again[0].change == pytest.approx((gap, gap), rel=1e-6)
    assert again[0].how == "measured"
    assert f"explained within the interval: the difference is {gap:+.4g}" in said
    assert "\nexplained" in said


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Records of color images of several sizes in class folders, the second through JPEG."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for name in ("discs", "squares"):
        for k in range(20):
            file = folder / name / "ab"[k % 2] / f"{k}.{'jpg' if name == 'discs' else 'png'}"
            file.parent.mkdir(parents=True, exist_ok=True)
            small = torch.randint(256, (4, 4, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(small.numpy()).resize((20 + k, 24 + k)).save(file)
    base = [f"samples={folder}/discs", f"reference={folder}/squares", "metric=pixels"]
    base += ["resize=8", "class_folders=true"]
    with initialize_config_dir(CONF, version_base="1.3"):
        for name, options in {"e1": [], "e2": ["jpeg=50"]}.items():
            evaluate(compose("evaluate", [*base, *options, f"out={folder}/{name}"]))
    return folder


def of_photos(photos, *options):
    with initialize_config_dir(CONF, version_base="1.3"):
        return explain(compose("explain", [f"records=[{photos}/e1,{photos}/e2]", *options]))


def test_samples_are_measured_again_as_the_first_record_says(photos, capsys):
    place = [f"samples={photos}/discs", f"reference={photos}/squares"]
    (found,) = of_photos(photos, *place)
    gap = number(photos, "e2") - number(photos, "e1")
    assert (found.name, found.second, found.how) == ("file format", "jpeg 50", "measured")
    assert found.change == pytest.approx((gap, gap), rel=1e-6)
    assert "\nexplained within the interval: " in capsys.readouterr().out


def test_no_size_is_known_in_other_features(photos, capsys):
    (found,) = of_photos(photos)
    assert (found.change, found.how) == (None, "not known for these features")
    first, *_, said, advice = capsys.readouterr().out.splitlines()
    assert first.endswith(" (both unreliable: of too few images)")
    gap = number(photos, "e2") - number(photos, "e1")
    assert said == (
        f"cannot be told from the records: the difference is {gap:+.4g}, and no size is known for "
        "file format"
    )
    assert advice == f"samples={photos}/discs measures file format"


def test_equal_records_need_no_explanation(records, capsys):
    assert explained(records, "first") == []
    assert "nothing to explain: the numbers are equal" in capsys.readouterr().out


def gaussians(real=2000, count=500, shift=0.0, grid=3, seeds=(0, 500), name="a"):
    """A record of a distance whose bias is ``10 (1/N + 1/M)`` around ``5 + shift``."""
    bias = 10 * (1 / count + 1 / real)
    metrics = {
        "frechet_distance": 5 + shift + bias,
        "frechet_distance_unbiased": 5.0 + shift,
        "frechet_distance_unbiased_interval": [5 + shift - 0.03, 5 + shift + 0.04],
        "num_samples": count,
        "reference": {"num_samples": real, "hash": f"r{real}"},
        "features": {"name": FEATURES[0], "hash": name},
    }
    sampling = {"seeds": seeds, "seeding": 2, "method": "euler", "grid": [0.0] * grid}
    return {"metrics": metrics, "sampling": sampling, "samples": {"hash": f"{count}{shift}{seeds}"}}


def test_the_bias_of_fewer_samples_is_computed():
    a, b = gaussians(), gaussians(count=100)
    count, chance = differences(a, b, "frechet_distance")
    assert count.name == "number of samples"
    assert count.change == pytest.approx((0.08, 0.08))
    assert chance.change == pytest.approx((-math.hypot(0.035, 0.035), math.hypot(0.035, 0.035)))
    assert "explained within" in verdict(a, b, "frechet_distance", [count, chance])
    # without bias the number of samples adds nothing
    assert differences(a, b, "frechet_distance_unbiased")[0].change == (0, 0)


def test_what_is_beyond_chance_is_not_explained():
    a, b = gaussians(), gaussians(shift=0.2, seeds=(500, 1000))
    found = differences(a, b, "frechet_distance")
    assert [one.name for one in found] == ["chance"]
    assert verdict(a, b, "frechet_distance", found).startswith("not explained within the interval")
    near = gaussians(shift=0.04, seeds=(500, 1000))
    found = differences(a, near, "frechet_distance")
    assert verdict(a, near, "frechet_distance", found).startswith("explained within the interval")


def test_another_sampler_has_no_known_size_in_general():
    a, b = gaussians(), gaussians(shift=0.2, grid=77)
    found = differences(a, b, "frechet_distance")
    assert found[0].name == "steps"
    assert (found[0].first, found[0].second, found[0].change) == ("2", "76", None)
    said = verdict(a, b, "frechet_distance", found)
    chance = math.hypot(0.035, 0.035)
    assert said == (
        "not explained by what is known: the difference is +0.2, what is known adds "
        f"{-chance:+.4g} to {chance:+.4g}; no size is known for steps"
    )


def test_equal_pixels_do_not_depend_on_their_sampler():
    a, b = gaussians(), gaussians(grid=77)
    assert differences(a, b, "frechet_distance") == []


def test_numbers_of_two_feature_networks_are_not_compared():
    a, b = gaussians(), gaussians(name="b")
    found = differences(a, b, "frechet_distance")
    assert verdict(a, b, "frechet_distance", found).startswith("not comparable")


def test_what_explain_refuses(records, configure, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    first = f"{records}/first/metrics.json"
    for files, options, said in (
        (
            first,
            [],
            "records must be two run folders or files, got 1; write flowkit explain runs/a",
        ),
        (
            f"{first},{tmp_path}/none.json",
            [],
            "records must be files or folders that exist, got no .*/none.js",
        ),
        (f"{first},{tmp_path}", [], "records must be evaluated, got no .*metrics.json; flowkit ev"),
        (f"{first},{tmp_path}/other.json", [], "records must be written by flowkit evaluate, got"),
        (
            f"{first},{first}",
            ["value=recal"],
            "value must be a number .* got recal; did you mean re",
        ),
        (
            f"{first},{first}",
            [f"samples={records}/few", f"reference={records}/drawn"],
            "samples must be those of the first record, 300 images, got",
        ),
        (
            f"{first},{records}/reference/metrics.json",
            [f"samples={records}/drawn"],
            "reference must be given, since that of the first record is no place: Digits, test spl",
        ),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            explain(configure("explain", f"records=[{files}]", *options))


def test_the_known_ranges_are_those_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    measured = {setting: dict[str, tuple[float, float]]() for setting in EFFECTS}
    for row in re.findall(
        r"^\| ([\w ]+) \| ([\w ]+) \| ([\w ]+) \| (.*) % \| (.*) % \|$", text, re.M
    ):
        setting, value, instead, *changes = row
        ends = sorted(float(change) / 100 for change in changes)
        measured[setting] |= {value: tuple(ends), instead: (0.0, 0.0)}
    assert {s: {v: pytest.approx(r) for v, r in e.items()} for s, e in EFFECTS.items()} == measured


def test_a_known_range_is_of_both_runs():
    a, b = gaussians(), gaussians()
    a["samples"] |= {"file_format": "jpeg", "jpeg_quality": 90}
    b["samples"] = {"hash": "other", "file_format": "jpeg", "jpeg_quality": 75}
    (found,) = differences(a, b, "frechet_distance")
    (low, high), number = EFFECTS["file format"]["jpeg 75"], a["metrics"]["frechet_distance"]
    from_low, from_high = EFFECTS["file format"]["jpeg 90"]
    expected = (1 + low) / (1 + from_high) - 1, (1 + high) / (1 + from_low) - 1
    assert found.change == pytest.approx([number * change for change in expected])
    assert found.how == "known range"
