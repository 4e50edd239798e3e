"""Evaluation of anybody's samples: formats, references, records, interruption, refusals."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from flowkit.__main__ import check_command
from flowkit.data.pixels import Resize, through_jpeg
from flowkit.metrics import (
    Pixels,
    Statistics,
    frechet_distance,
    frechet_from_moments,
    from_uint8,
    prdc,
    to_uint8,
)
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.sample import sample
from flowkit.recipes.statistics import statistics
from flowkit.runs.judging import digests, hash_of_set

G = torch.Generator().manual_seed(0)
OURS = torch.randint(0, 256, (60, 1, 3, 3), dtype=torch.uint8, generator=G)
THEIRS = torch.randint(40, 256, (50, 1, 3, 3), dtype=torch.uint8, generator=G)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def files(folder, pixels, form="png", **options):
    folder.mkdir(parents=True)
    for k, one in enumerate(pixels):
        Image.fromarray(one[0].numpy()).save(folder / f"{k}.{form}", **options)
    return folder


def npz(file, pixels, **more):
    np.savez(file, arr_0=pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(), **more)
    return file


@pytest.fixture
def judged(configure, tmp_path):
    """Evaluates with the options, in pixels."""

    def judged(*options, out="out", metric="pixels"):
        common = [f"metric={metric}", f"out={tmp_path / out}", "batch_size=16"]
        return evaluate(configure("evaluate", *map(str, options), *common))

    return judged


def test_metrics_are_those_of_the_functions(judged, tmp_path):
    ours, theirs = files(tmp_path / "a", OURS), files(tmp_path / "b", THEIRS)
    record = judged(f"samples={ours}", f"reference={theirs}")
    a, b = (from_uint8(pixels).flatten(1) for pixels in (OURS, THEIRS))
    metrics = record["metrics"]
    assert metrics["frechet_distance"] == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert [metrics[name] for name in ("precision", "recall", "density", "coverage")] == [
        *prdc(b, a)
    ]
    assert (metrics["num_samples"], metrics["num_reference"]) == (60, 50)
    assert "floor" not in metrics
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(
        json.dumps(record)
    )
    assert (tmp_path / "out" / "samples.png").is_file()
    assert not [*(tmp_path / "out").glob("parts-*")]
    assert record["samples"] == {
        "name": str(ours),
        "kind": "folder",
        "file_format": "png",
        "quantization": None,
        "resize": None,
        "shape": [1, 3, 3],
        "num_samples": 60,
        "seed": None,
        "classes": None,
        "hash": hash_of_set(digests(OURS)),
    }


def test_gray_images_have_one_distance_in_all_formats(judged, tmp_path):
    """Npz files and WebP store them as three equal channels, whose distance is three times."""
    forms = {
        "png": files(tmp_path / "png", OURS),
        "npz": npz(tmp_path / "a.npz", OURS),
        "webp": files(tmp_path / "webp", OURS, "webp", lossless=True),
    }
    expected = frechet_distance(*(from_uint8(x).flatten(1) for x in (OURS, THEIRS)))
    theirs = [files(tmp_path / "b", THEIRS), npz(tmp_path / "b.npz", THEIRS)]
    for form, reference in [("png", theirs[1]), ("npz", theirs[0]), ("webp", theirs[1])]:
        record = judged(f"samples={forms[form]}", f"reference={reference}", out=f"{form}-e")
        assert record["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-9)
        assert record["samples"]["hash"] == hash_of_set(digests(OURS))
        assert record["reference"]["hash"] == hash_of_set(digests(THEIRS))
    color = THEIRS.expand(-1, 3, -1, -1).clone()
    color[49, 0, 0, 0] ^= 1
    last = tmp_path / "c.npz"
    np.savez(last, arr_0=color.permute(0, 2, 3, 1).numpy())
    record = judged(f"samples={forms['png']}", f"reference={last}", out="color")
    assert record["samples"]["shape"] == [3, 3, 3]  # one color is enough
    assert record["samples"]["hash"] == hash_of_set(digests(OURS))


class GrayOnly(Pixels):
    def __call__(self, images):
        return torch.nn.functional.conv2d(images, torch.ones(1, 1, 2, 2)).flatten(1)


class ColorOnly(Pixels):
    def __call__(self, images):
        return torch.nn.functional.conv2d(images, torch.ones(1, 3, 2, 2)).flatten(1)


@pytest.mark.parametrize("network", [GrayOnly, ColorOnly])
def test_networks_for_gray_or_color_alone_see_gray_images(network, judged, tmp_path, monkeypatch):
    monkeypatch.setattr("flowkit.runs.pixel_features", lambda data: network())
    channels = 1 if network is GrayOnly else 3
    a, b = (network()(from_uint8(x.expand(-1, channels, -1, -1))) for x in (OURS, THEIRS))
    Statistics(b.double().mean(0), b.double().T.cov()).save(tmp_path / "s.npz")
    for reference in (npz(tmp_path / "b.npz", THEIRS), tmp_path / "s.npz"):
        ours = files(tmp_path / reference.stem, OURS)
        record = judged(f"samples={ours}", f"reference={reference}")
        assert record["metrics"]["frechet_distance"] == pytest.approx(
            frechet_distance(a, b), rel=1e-6
        )


def test_all_formats_of_a_run_give_one_record(tiny_run, configure, judged, tmp_path):
    """The npz as numpy reads it, and PNG files, have the same features bit for bit."""
    found = {}
    for form in ("pt", "npz", "png"):
        options = ["num_samples=40", "sampler.grid=2", f"format={form}", f"out={tmp_path / form}"]
        drawn = sample(configure("sample", f"run={tiny_run}", *options))
        found[form] = judged(f"samples={tmp_path / form}", f"reference={tiny_run}", out=f"{form}-e")
    first = found["pt"]
    for record in found.values():
        assert record["metrics"] == first["metrics"]
        for key in ("hash", "classes", "quantization", "num_samples"):
            assert record["samples"][key] == first["samples"][key]
        assert record["weights"] == first["weights"]
        assert record["sampling"]["seeds"] == [0, 40]
    assert first["samples"]["quantization"] == "round"
    assert first["samples"]["classes"] == {str(k): 0.1 for k in range(10)}
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        last = to_uint8(drawn).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(arrays["arr_0"], last)
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [*range(10)] * 4
    names = sorted(path.name for path in (tmp_path / "png" / "samples").glob("*.png"))
    assert names[:2] == ["000000.png", "000001.png"]
    assert len(names) == 40
    agreement = first["metrics"]["class_agreement_by_class"]
    assert first["metrics"]["class_agreement"] == pytest.approx(sum(agreement.values()) / 10)


def test_a_run_gives_its_samples_and_its_data_as_the_reference(tiny_run, configure, judged):
    options = [f"run={tiny_run}", "num_samples=30", "sampler.grid=2", "format=npz"]
    drawn = sample(configure("sample", *options))
    record = judged(f"samples={tiny_run}")
    assert record["samples"]["hash"] == hash_of_set(digests(to_uint8(drawn)))
    assert record["reference"]["name"] == "Digits, test split"
    assert record["metrics"]["floor"]["num_samples"] == 30
    assert record["data"]["name"] == "Digits"
    by_name = judged(f"samples={tiny_run}", "data@reference=digits", out="other")
    assert by_name["metrics"] == record["metrics"]
    by_training = judged(f"samples={tiny_run}", "split=train", out="train")["metrics"]
    assert "floor" not in by_training
    assert by_training["left_out"]["floor"] == "the reference is the training images"
    with pytest.raises(
        ValueError, match=r"metric must take images of shape \(1, 16, 16\), got conv"
    ):
        judged(f"samples={tiny_run}", "resize=16", metric="classifier")
    resized = judged(f"samples={tiny_run}", "resize=4", out="resized")["metrics"]
    assert "class_agreement" not in resized
    assert resized["left_out"]["class_agreement"] == "the judge sees images of the size of the data"


def test_a_run_and_its_samples_in_a_file_are_measured_alike(tiny_run, configure, judged, tmp_path):
    """The same images: the record of the run agrees with that of the file."""
    options = [f"run={tiny_run}", "sampler.grid=2", f"out={tmp_path / 'a'}", "metric=pixels"]
    by_run = evaluate(configure("evaluate", *options, "num_samples=40"))
    seen = []

    def keep(samples, rule):
        seen.append(to_uint8(samples, rule))
        return seen[-1]

    assert by_run["samples"]["kind"] == "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowkit.data.pixels.to_uint8", keep)
        again = evaluate(configure("evaluate", *options, "num_samples=40", f"out={tmp_path / 'b'}"))
    assert again["metrics"] == by_run["metrics"]
    assert by_run["samples"]["hash"] == hash_of_set(digests(seen[0]))
    files(tmp_path / "c", seen[0])
    record = judged(f"samples={tmp_path / 'c'}", f"reference={tiny_run}")
    assert record["samples"]["hash"] == by_run["samples"]["hash"]
    assert record["reference"]["hash"] == by_run["reference"]["hash"]
    assert record["metrics"]["frechet_distance"] == pytest.approx(
        by_run["metrics"]["frechet_distance"], rel=1e-6
    )


def test_statistics_stand_for_images_and_say_what_they_leave_out(configure, judged, tmp_path):
    ours, theirs = npz(tmp_path / "a.npz", OURS), npz(tmp_path / "b.npz", THEIRS)
    stats = tmp_path / "stats.npz"
    made = statistics(
        configure("statistics", f"reference={theirs}", f"out={stats}", "metric=pixels")
    )
    pixels = from_uint8(THEIRS).flatten(1).double()
    with np.load(stats) as arrays:
        assert arrays["mu"] == pytest.approx(pixels.mean(0).numpy(), abs=1e-12)
        assert arrays["sigma"] == pytest.approx(np.cov(pixels.numpy().T), abs=1e-12)
        assert str(arrays["reference_hash"]) == made.reference_hash
    record = json.loads((tmp_path / "stats.json").read_text())
    assert record["reference"]["num_samples"] == 50
    assert record["features"] == {"name": "pixels", "hash": Pixels.hash}
    by_stats = judged(f"samples={ours}", f"reference={stats}", out="s")
    by_images = judged(f"samples={ours}", f"reference={theirs}", out="i")
    key = "frechet_distance"
    assert by_stats["metrics"][key] == pytest.approx(by_images["metrics"][key], rel=1e-6)
    assert set(by_stats["metrics"]["left_out"]) >= {"precision", "recall", "kernel_distance"}
    assert "precision" not in by_stats["metrics"]
    assert by_stats["reference"]["hash"] == by_images["reference"]["hash"]
    assert by_stats["reference"]["kind"] == "statistics"


def test_statistics_of_other_tools_have_mean_and_covariance_alone(judged, tmp_path):
    ours = npz(tmp_path / "a.npz", OURS)
    b = from_uint8(THEIRS).flatten(1).double().numpy()
    np.savez(tmp_path / "t.npz", mu=b.mean(0), sigma=np.cov(b.T))
    record = judged(f"samples={ours}", f"reference={tmp_path / 't.npz'}")
    a = from_uint8(OURS).flatten(1)  # three equal channels were found to be gray
    expected = frechet_distance(a, torch.from_numpy(b))
    assert record["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert record["reference"]["num_samples"] is None


def test_a_reference_of_adm_has_statistics_of_all_images_and_some_images(judged, tmp_path):
    all_theirs = torch.cat([THEIRS, THEIRS.flip(-1)])
    b = from_uint8(all_theirs.expand(-1, 3, -1, -1)).flatten(1).double().numpy()
    moments = {"mu": b.mean(0), "sigma": np.cov(b.T)}
    reference = npz(tmp_path / "r.npz", THEIRS, **moments)
    metrics = judged(f"samples={npz(tmp_path / 'a.npz', OURS)}", f"reference={reference}")[
        "metrics"
    ]
    a, some = (from_uint8(x.expand(-1, 3, -1, -1)).flatten(1) for x in (OURS, THEIRS))
    expected = frechet_distance(a, torch.from_numpy(b))
    assert metrics["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert metrics["recall"] == prdc(some, a).recall


@pytest.mark.parametrize("resize", [None, 2, 3])
def test_statistics_of_other_features_or_sizes_give_way_to_the_images(judged, tmp_path, resize):
    """As those of Inception do to the images of ADM for any other network."""
    width = 2048 if resize is None else 9
    moments = {"mu": np.zeros(width), "sigma": np.eye(width)}
    reference = npz(tmp_path / "r.npz", THEIRS, **moments)
    options = [f"samples={npz(tmp_path / 'a.npz', OURS)}", f"reference={reference}"]
    record = judged(*options, *([] if resize is None else [f"resize={resize}"]))
    seen = (OURS, THEIRS)
    if resize is not None:
        seen = [torch.stack([Resize(resize)(one) for one in x]) for x in seen]
    a, b = (from_uint8(x).flatten(1) for x in seen)
    expected = frechet_distance(a, b)
    said = [text for text in record["metrics"]["warnings"] if "mu and sigma of" in text]
    if resize == 3:  # which changes nothing: the statistics count
        b = [torch.zeros(9).double(), torch.eye(9).double()]
        expected = frechet_from_moments(a.double().mean(0), a.double().T.cov(), *b)
    assert record["metrics"]["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    reasons = {None: "of 2,048 features, other than those of pixels$", 2: "3x3, before the resize$"}
    assert len(said) == (resize != 3)
    assert all(re.search(reasons[resize], text) for text in said)


def test_the_record_of_statistics_has_no_resize_and_no_shape(judged, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    record = judged(
        f"samples={npz(tmp_path / 'a.npz', OURS)}", f"reference={tmp_path / 's.npz'}", "resize=2"
    )
    assert record["samples"]["resize"]["size"] == 2
    assert record["samples"]["shape"] == [1, 2, 2]
    assert record["reference"]["resize"] is record["reference"]["shape"] is None


def test_a_reference_without_classes_leaves_out_the_accuracy_of_the_judge(
    tiny_run, configure, judged, tmp_path
):
    options = [f"run={tiny_run}", "num_samples=30", "sampler.grid=2"]
    drawn = sample(configure("sample", *options))
    reference = files(tmp_path / "b", to_uint8(drawn).flip(-1))
    metrics = judged(f"samples={tiny_run}", f"reference={reference}", out="a")["metrics"]
    whole = judged(f"samples={tiny_run}", out="b")["metrics"]
    assert metrics["class_agreement"] == whole["class_agreement"]
    assert "test_accuracy" in whole["judge"]
    assert "test_accuracy" not in metrics["judge"]


def test_a_choice_of_samples_is_random_and_the_same_for_a_seed(judged, tmp_path):
    ours, theirs = files(tmp_path / "a", OURS), files(tmp_path / "b", THEIRS)
    options = [f"samples={ours}", f"reference={theirs}", "num_samples=20"]
    seeds = (0, 0, 1)
    records = [judged(*options, f"seed={seed}", out=f"o{k}") for k, seed in enumerate(seeds)]
    assert [record["samples"]["seed"] for record in records] == [0, 0, 1]
    assert records[0]["reference"]["seed"] is None
    first, again, other = (record["samples"]["hash"] for record in records)
    assert first == again != other
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:20]
    assert first == hash_of_set(digests(OURS[chosen]))


def test_jpeg_and_resize_are_done_and_recorded(judged, tmp_path):
    ours, theirs = npz(tmp_path / "a.npz", OURS), npz(tmp_path / "b.npz", THEIRS)
    both = [f"samples={ours}", f"reference={theirs}"]
    record = judged(*both, "jpeg=60")["samples"]
    assert (record["file_format"], record["jpeg_quality"]) == ("jpeg", 60)
    color = OURS.expand(-1, 3, -1, -1)
    assert record["hash"] == hash_of_set(digests(through_jpeg(color, 60)))
    record = judged(*both, "resize=2", "filter=bilinear", "antialias=false")
    resize = Resize(2, "bilinear", antialias=False)
    for name, pixels in (("samples", color), ("reference", THEIRS.expand(-1, 3, -1, -1))):
        assert record[name]["resize"] == resize.record()
        expected = torch.stack([resize(one) for one in pixels])
        assert record[name]["hash"] == hash_of_set(digests(expected))


def test_class_folders_have_the_numbers_of_the_data(tiny_run, judged, tmp_path):
    """Folders 9 and 2 alone: the classes of digits, not the numbers 1 and 0."""
    pixels = torch.zeros(4, 1, 8, 8).byte() + torch.arange(4).byte()[:, None, None, None]
    for label in ("9", "2"):
        files(tmp_path / "a" / label, pixels)
    options = [f"samples={tmp_path / 'a'}", f"reference={tiny_run}", "class_folders=true"]
    assert judged(*options)["samples"]["classes"] == {"2": 0.5, "9": 0.5}
    files(tmp_path / "a" / "cat", pixels)
    with pytest.raises(ValueError, match=r"class_folders must be classes of the data, .*, got cat"):
        judged(*options)


class Counted(Pixels):
    """Pixels that count their images, and may stop."""

    calls: list[int] = []  # noqa: RUF012
    most = None

    def __call__(self, images):
        if len(images) > 1:
            if self.most is not None and len(self.calls) == self.most:
                raise ConnectionError("the plug was pulled")
            self.calls.append(len(images))
        return super().__call__(images)


def test_a_stopped_evaluation_goes_on_and_the_reference_is_seen_once(judged, tmp_path, monkeypatch):
    ours, theirs = files(tmp_path / "a", OURS), files(tmp_path / "b", THEIRS)
    options = [f"samples={ours}", f"reference={theirs}"]
    whole = judged(*options, out="whole")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr("flowkit.runs.pixel_features", lambda data: Counted())
    monkeypatch.setattr("flowkit.runs.judging.PART", 16)
    monkeypatch.setattr(Counted, "calls", [])
    theirs_and_ours, pulled = [16, 16, 16, 2, 16, 16, 16, 12], ConnectionError("the plug")
    for most in (2, 6):  # in the reference, and in the samples
        monkeypatch.setattr(Counted, "most", most)
        with pytest.raises(ConnectionError):
            judged(*options)
        assert Counted.calls == theirs_and_ours[:most]
    monkeypatch.setattr(Counted, "most", None)
    for place in ("given.feature_metrics", "given.as_saved"):  # between the features and the record
        with monkeypatch.context() as patch:
            patch.setattr(f"flowkit.runs.{place}", Mock(side_effect=pulled))
            with pytest.raises(ConnectionError):
                judged(*options)
    assert judged(*options)["metrics"] == whole["metrics"]
    assert Counted.calls == theirs_and_ours  # no batch twice
    assert not [*(tmp_path / "out").glob("parts-*")]
    Counted.calls.clear()
    judged(f"samples={ours}", f"reference={theirs}", "num_samples=32")
    assert Counted.calls == [16, 16]
    (theirs / "0.png").write_bytes((theirs / "1.png").read_bytes())
    Counted.calls.clear()
    judged(f"samples={ours}", f"reference={theirs}", "num_samples=32")
    assert Counted.calls == [16, 16, 16, 2, 16, 16]  # the reference has changed


def test_features_that_are_not_finite_name_their_image(judged, tmp_path, monkeypatch):
    class Holes(Pixels):
        def __call__(self, images):
            found = super().__call__(images).clone()
            found[(images == from_uint8(OURS[37:38])).flatten(1).all(1)] = torch.nan
            return found

    monkeypatch.setattr("flowkit.runs.pixel_features", lambda data: Holes())
    ours, theirs = files(tmp_path / "a", OURS), files(tmp_path / "b", THEIRS)
    with pytest.raises(ValueError, match=r"features of samples must be finite, .* for \S+/37\.png"):
        judged(f"samples={ours}", f"reference={theirs}")


@pytest.mark.parametrize(
    ("own", "kernel"), [("FID", "KID"), ("Fréchet distance", "kernel distance")]
)
def test_every_printed_value_has_its_numbers_of_images(
    judged, tmp_path, monkeypatch, capsys, own, kernel
):
    monkeypatch.setattr(Pixels, "distance_name", own, raising=False)
    theirs = from_uint8(THEIRS).flatten(1).double().numpy()
    moments = {"mu": theirs.mean(0), "sigma": np.cov(theirs.T)}
    reference = npz(tmp_path / "r.npz", THEIRS, **moments)
    ours = npz(tmp_path / "a.npz", OURS)
    metrics = judged(f"samples={ours}", f"reference={reference}")["metrics"]
    lines = [re.split("   *", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = {line[0]: line[1] for line in lines if len(line) == 2}
    ends = ", ".join(f"{x:.3f}" for x in metrics["kernel_distance_interval"])
    assert shown[kernel] == (
        f"{metrics['kernel_distance']:.3f}  [{ends}]  (60 samples, 50 reference images)"
    )
    assert shown[f"{own} (pixels)"].endswith("(60 samples, statistics)")
    assert shown["recall"].endswith("(60 samples, 50 reference images)")


# --- refused before the work ------------------------------------------------------------------


def test_wrong_pairs_and_options_are_refused(tiny_run, judged, tmp_path):
    ours, theirs = npz(tmp_path / "a.npz", OURS), npz(tmp_path / "b.npz", THEIRS)
    wide = npz(tmp_path / "w.npz", torch.zeros(9, 1, 100, 100).byte())
    eight = npz(tmp_path / "e.npz", torch.zeros(9, 1, 8, 8).byte())
    npz(tmp_path / "two.npz", OURS[:2])
    (tmp_path / "f.npz").write_bytes(b"x")
    (tmp_path / "f.zip").write_bytes(b"x")
    b = from_uint8(THEIRS).flatten(1).double()
    Statistics(b.mean(0), b.T.cov(), features_name="other").save(tmp_path / "o.npz")
    np.savez(tmp_path / "m.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "n.npz", mu=np.zeros(5))
    both = [f"samples={ours}", f"reference={theirs}"]
    cases = {
        "one of run and samples must be given, .* got neither": [],
        "one of run and samples must be given, .* got both": [f"run={tiny_run}", *both],
        "reference must be given, .* got null": both[:1],
        "reference must be absent with run=": [f"run={tiny_run}", both[1]],
        "guidance must be absent with samples=.* got 2": [*both, "guidance=2"],
        "split must be absent for a reference that is no data .* got train": [*both, "split=train"],
        "filter and antialias must be absent without resize=": [*both, "filter=box"],
        "sampler must be absent with samples=, .* method=euler": [*both, "sampler=euler"],
        "sampler must be absent with samples=, where it is unused, got grid=8$": [
            *both, "sampler.grid=8"],
        "quantization must be round for samples that are bytes": [*both, "quantization=floor"],
        r"num_samples must lie in \[4, 60\], got 61": [*both, "num_samples=61"],
        "the number of images in samples=.*two.npz must be at least 4, got 2": [
            f"samples={tmp_path / 'two.npz'}", both[1]],
        "the number of images in reference=.*two.npz must be at least 4, got 2": [
            both[0], f"reference={tmp_path / 'two.npz'}"],
        "num_samples with extrapolate=true and 9 features must be at least .*, got 8": [
            *both, "extrapolate=true", "num_samples=8"],
        "samples must have the size of the reference, 3x3, got 8x8; resize=3": [
            f"samples={eight}", both[1]],
        "metric must have at most 8,192 features .* got 10,000 of pixels": [
            f"samples={wide}", f"reference={wide}"],
        "statistics must be of the feature network of name pixels, got other": [
            both[0], f"reference={tmp_path / 'o.npz'}"],
        "statistics must be of the 9 features of the network, got 5": [
            both[0], f"reference={tmp_path / 'm.npz'}"],
        "reference must hold images in arr_0, or statistics in mu and sigma, got mu": [
            both[0], f"reference={tmp_path / 'n.npz'}"],
        "samples must hold images, got statistics only": [
            f"samples={tmp_path / 'm.npz'}", both[1]],
        "samples must be a file or folder that exists, .* did you mean digits": [
            "samples=digit", both[1]],
        "reference must be a file or folder that exists, .* got org/name": [
            both[0], "reference=org/name"],
        "f.npz must be an npz file": [f"samples={tmp_path / 'f.npz'}", both[1]],
        "samples must be a folder of images, .* unpack it": [
            f"samples={tmp_path / 'f.zip'}", both[1]],
    }  # fmt: skip
    for message, options in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            judged(*options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [None, "none.pth"])
def test_inception_without_weights_names_the_published_file(judged, tmp_path, weights):
    ours = npz(tmp_path / "a.npz", OURS)
    options = [f"samples={ours}", f"reference={ours}", "metric=inception"]
    options += [] if weights is None else [f"metric.weights={tmp_path / weights}"]
    check_command("evaluate", options)
    with pytest.raises(Exception, match=r"weights-inception-2015.*95,628,359 bytes.* https://"):
        judged(*options, metric="inception")


def test_a_run_without_drawn_samples_names_the_command(tiny_run, judged, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((tiny_run / "config.yaml").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"samples must hold drawn .*: flowkit sample run="):
        judged(f"samples={tmp_path / 'run'}")


def test_formats_that_cannot_hold_the_samples_are_refused(tiny_run, configure, tmp_path):
    options = [f"run={tiny_run}", f"out={tmp_path}", "sampler.grid=1"]
    with pytest.raises(ValueError, match="quantization must be round for format=pt"):
        sample(configure("sample", *options, "quantization=truncate"))
    own = tmp_path / "samples" / "mine.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(ValueError, match="out must hold no folder samples that flowkit sample"):
        sample(configure("sample", *options, "format=png"))
    assert own.read_text() == "mine"


def test_an_earlier_format_is_kept_beside_the_newest(tiny_run, configure, tmp_path):
    options = [f"run={tiny_run}", f"out={tmp_path}", "sampler.grid=1", "num_samples=3"]
    for form in ("pt", "png", "npz", "npz"):
        sample(configure("sample", *options, f"format={form}"))
    names = sorted(path.name for path in Path(tmp_path).iterdir())
    assert names == [
        *("samples-1.json", "samples-1.png", "samples-1.pt", "samples-2", "samples-2.json"),
        *("samples-2.png", "samples.json", "samples.npz", "samples.png"),
    ]


def test_a_rule_of_quantization_reaches_the_files(tiny_run, configure, tmp_path):
    options = [f"run={tiny_run}", "sampler.grid=1", "num_samples=8", "format=npz"]
    drawn = sample(configure("sample", *options, f"out={tmp_path}", "quantization=truncate"))
    with np.load(tmp_path / "samples.npz") as arrays:
        expected = to_uint8(drawn, "truncate")
        assert np.array_equal(arrays["arr_0"][..., 0], expected[:, 0].numpy())
        assert not torch.equal(expected, to_uint8(drawn))


def test_statistics_need_one_source_and_an_npz_file(configure, tmp_path):
    for message, options in {
        "one of data and reference must be given, .* got neither": ["out=a.npz"],
        "one of data and reference must be given, .* got both": [
            "out=a.npz", "data=digits", "reference=x"],
        "out must be a file with the suffix .npz, got a.pt": ["out=a.pt", "data=digits"],
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            statistics(configure("statistics", *options))


def test_statistics_of_data_are_those_of_the_split(configure, digits_train, tmp_path):
    out = tmp_path / "d.npz"
    found = statistics(
        configure("statistics", "data=digits", "split=train", "metric=pixels", f"out={out}")
    )
    assert found.count == len(digits_train)
    assert torch.allclose(found.mean, from_uint8(digits_train).flatten(1).double().mean(0))


@pytest.fixture
def digits_train():
    from flowkit.data import Digits

    data = Digits()
    data.setup()
    return to_uint8(data.train[:]["x1"])
