"""Nothing fails after the work is done: checks come first, caches are optional, files are whole."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image

from flowkit.data import Digits
from flowkit.metrics import ConvClassifier, Pixels, PixelSVC, StoredFeatures, train_classifier
from flowkit.modules import FlowModule
from flowkit.recipes.autoencoder import autoencoder
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.pairs import pairs
from flowkit.recipes.report import report
from flowkit.recipes.sample import sample
from flowkit.recipes.train import train
from flowkit.runs import classifier_features, features
from flowkit.runs.locks import locked
from flowkit.runs.resuming import resumed
from tests.recipes.conftest import TINY


@pytest.fixture(scope="module")
def cats(tmp_path_factory):
    """A folder of images with a single sub-folder, which is one class."""
    root, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (root / "cat").mkdir()
    for k in range(24):
        pixels = draw.integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(root / "cat" / f"{k}.png")
    return root


def test_one_class_is_measured_without_a_judge(cats, configure, tmp_path, capsys):
    options = [*TINY, "data=folder", f"data.root={cats}", "data.image_size=8", "data.channels=1"]
    options += ["data.val_fraction=0.2", "data.test_fraction=0.3", "trainer.max_steps=2"]
    train(configure("train", *options, f"run_dir={tmp_path}"))
    measured = [f"run={tmp_path}", "num_samples=6", "sampler.grid=1"]
    metrics = evaluate(configure("evaluate", *measured))["metrics"]
    assert "class_agreement" not in metrics
    assert metrics["features"]["name"] == "pixels"
    assert "judge     left out, since the training images have one class" in capsys.readouterr().out
    few = ["solvers=[euler]", "nfe=[2]", "grids.shifted=null", "metric=pixels"]
    (row,) = report(configure("report", *measured[:2], *few))
    assert "class_agreement" not in row
    with pytest.raises(ValueError, match="metric must be pixels or inception for data without"):
        evaluate(configure("evaluate", *measured, "metric=classifier"))
    with pytest.raises(ValueError, match=r"labels must hold two classes or more, got \[7\]"):
        PixelSVC(torch.zeros(3, 4), torch.full((3,), 7))


def test_too_few_images_are_refused_before_the_work(tiny_run, configure, tmp_path, monkeypatch):
    monkeypatch.setattr("flowkit.recipes.evaluate.draw_parts", None)
    with pytest.raises(ValueError, match="num_samples must be at least 4, got 3"):
        evaluate(configure("evaluate", f"run={tiny_run}", f"out={tmp_path}", "num_samples=3"))


@pytest.fixture
def digits():
    data = Digits(batch_size=8)
    data.setup()
    return data


def test_without_a_cache_classifier_and_features_are_made_with_one_warning(
    digits, tmp_path, monkeypatch, recwarn
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made there
    monkeypatch.setattr(features, "train_classifier", lambda *_, **__: Pixels())
    images = digits.test[:5]["x1"]
    assert isinstance(classifier_features(digits, seed=0), Pixels)
    stored = StoredFeatures(Pixels(), features.cache_folder())
    assert torch.equal(stored(images), images.flatten(1))
    texts = {str(warning.message) for warning in recwarn}
    assert len(texts) == 1  # Python shows equal texts once
    assert re.search(r"cache must be a writable folder, got .*file/flowkit: Not a dir", texts.pop())


def test_damaged_files_of_the_cache_are_named_and_made_again(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = {"epochs": 1, "num_features": 4, "width": 4}
    quick = lambda *args, **given: features_train(*args, **{**given, **few})  # noqa: E731
    features_train = features.train_classifier
    monkeypatch.setattr(features, "train_classifier", quick)
    images = digits.test[:5]["x1"]

    def both():
        found = classifier_features(digits, seed=0)
        return found.hash, StoredFeatures(found, features.cache_folder())(images)

    first = both()
    files = sorted((tmp_path / "flowkit").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["classifier", "features"]
    for damage in (b"", b"12345678", files[0].read_bytes()[:-9]):
        for file in files:
            file.write_bytes(damage)
        with pytest.warns(UserWarning, match=r"cache must be readable, got .*; made again") as said:
            again = both()
        assert all(any(file.name in str(w.message) for w in said) for file in files)
        assert again[0] == first[0]
        assert torch.equal(again[1], first[1])
    assert both()[0] == first[0]  # whole again: no warning


def test_a_classifier_is_kept_for_its_own_settings_alone(digits, tmp_path, monkeypatch):
    seeds = []

    def trained(images, labels, num_classes, *, seed, epochs, name):
        seeds.append(seed)
        return ConvClassifier((1, 8, 8), num_classes, name=name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(features, "train_classifier", trained)
    for seed in (0, 0, 1, 1):
        classifier_features(digits, seed)
    assert seeds == [0, 1]
    monkeypatch.setitem(train_classifier.__kwdefaults__, "learning_rate", 1e-3)
    classifier_features(digits, 1)
    monkeypatch.setattr("flowkit.metrics.features.SMOOTHING", 0.2)
    for _ in range(2):
        classifier_features(digits, 1)
    assert seeds == [0, 1, 1, 1]


def test_pictures_are_capped_and_tensors_are_not(tiny_run, configure, tmp_path):
    options = [f"run={tiny_run}", f"out={tmp_path}", "sampler.grid=1", "sampler=euler"]
    assert len(sample(configure("sample", *options, "num_samples=230"))) == 230
    with Image.open(tmp_path / "samples.png") as picture:
        # 10 columns and 10 rows of 8 pixels, enlarged 8 times, with gaps of 2, below the classes.
        assert picture.size == (10 * 66 + 2, 12 + 10 * 66 + 2)
    assert len(torch.load(tmp_path / "samples.pt", weights_only=True)["samples"]) == 230


# --- files ------------------------------------------------------------------------------------


def _in_child(work):
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_two_samplings_in_one_folder_work(tiny_run, configure, tmp_path, monkeypatch):
    """The first ends, and removes the parts that the second has made so far."""
    options = [f"run={tiny_run}", "num_samples=6", "batch_size=2", "sampler.grid=1"]
    whole = sample(configure("sample", *options, f"out={tmp_path}/whole"))
    solve, calls = FlowModule.solve, itertools.count()

    def late(self, *args, **kwargs):
        if next(calls) == 1:
            (parts,) = (tmp_path / "both").glob("parts-*")
            shutil.rmtree(parts)
        return solve(self, *args, **kwargs)

    monkeypatch.setattr(FlowModule, "solve", late)
    assert torch.equal(sample(configure("sample", *options, f"out={tmp_path}/both")), whole)


def test_damaged_records_do_not_block_later_calls(tiny_run, configure, tmp_path):
    options = [f"run={tiny_run}", f"out={tmp_path}"]
    draw = partial(sample, configure("sample", *options, "num_samples=2", "sampler.grid=1"))
    draw()
    (tmp_path / "samples.json").write_bytes(b"\xff\x00{")
    draw()
    assert (tmp_path / "samples-1.json").read_bytes() == b"\xff\x00{"
    assert json.loads((tmp_path / "samples.json").read_text())["sampling"]["num_samples"] == 2
    few = ["num_samples=8", "solvers=[euler]", "nfe=[2]", "grids.shifted=null", "metric=pixels"]
    (row,) = report(configure("report", *options, *few))
    (tmp_path / "report.json").write_text('{"rows": [')
    with pytest.warns(UserWarning, match=r"record must be JSON, got .*report.json"):
        (again,) = report(configure("report", *options, *few))
    assert again["distance"] == row["distance"]
    made = [f"run={tiny_run}", f"out={tmp_path}/pairs", "num_noises=2", "fine_steps=1"]
    pairs(configure("pairs", *made))
    for damage in ("{", "[1]"):
        (tmp_path / "pairs" / "pairs.json").write_text(damage)
        with pytest.raises(ValueError, match=r"pairs.json must describe .*; delete the folder to"):
            pairs(configure("pairs", *made))


# --- folders of training ----------------------------------------------------------------------


def test_two_trainings_in_one_folder_are_refused(configure, tmp_path):
    cfg = configure("train", *TINY, "trainer.max_steps=1", f"run_dir={tmp_path}")
    said = rf"got {tmp_path}, where process {os.getpid()} of \S+ is training"
    with locked(tmp_path), pytest.raises(FileExistsError, match=said):
        train(cfg)
    assert not list(tmp_path.iterdir())

    def die():
        with locked(tmp_path):
            os.kill(os.getpid(), 9)

    assert _in_child(die) == -9
    assert (tmp_path / "training.lock").exists()
    train(cfg)  # the lock of a dead process is free
    assert not (tmp_path / "training.lock").exists()


def test_a_lock_lets_one_process_in_at_a_time(tmp_path):
    def work():
        for _ in range(60):
            with suppress(FileExistsError), locked(tmp_path):
                descriptor = os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL)  # of nobody else
                os.close(descriptor)
                (tmp_path / "inside").unlink()

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    work()
    process.join()
    assert process.exitcode == 0


def test_the_checkpoint_of_a_job_in_the_queue_is_a_run(configure, tmp_path):
    (saved := tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of a requeued job")
    options = [*TINY, f"run_dir={tmp_path}", "trainer.val_check_interval=1", "trainer.max_steps=1"]
    with pytest.raises(FileExistsError, match=f"continue this run by resume={tmp_path}"):
        train(configure("train", *options))
    with pytest.raises(FileExistsError, match=f"continue its training by resume={tmp_path}"):
        autoencoder(configure("autoencoder", f"run_dir={tmp_path}", "trainer.accelerator=cpu"))
    assert saved.read_bytes() == b"of a requeued job"


def test_a_checkpoint_file_does_not_take_over_its_run(tiny_run, configure):
    before = (tiny_run / "config.yaml").read_text()
    options = [*TINY, f"resume={tiny_run}/checkpoints/last.ckpt", f"run_dir={tiny_run}"]
    with pytest.raises(FileExistsError, match=f"continue this run by resume={tiny_run}"):
        train(configure("train", *options, "trainer.max_steps=30", "optimizer.lr=1"))
    assert (tiny_run / "config.yaml").read_text() == before


def test_a_damaged_configuration_is_an_error_with_the_fix(tiny_run, configure, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    cfg = configure("train", f"resume={run}")
    for damage in ("", "a: [", "- 1"):
        (run / "unresolved.yaml").write_text(damage)
        with pytest.raises(ValueError, match=r"unresolved.yaml.*; copy config.yaml to unresolved"):
            resumed(cfg, [])
    resolved = (run / "config.yaml").read_text()
    (run / "unresolved.yaml").write_text(resolved.replace(str(tiny_run), str(run)))
    train(resumed(cfg, ["trainer.max_steps=21"]))


@pytest.mark.parametrize("recipe", ["train", "autoencoder"])
def test_a_device_that_does_not_exist_is_found_before_the_data(
    recipe, configure, tmp_path, monkeypatch
):
    monkeypatch.setattr(f"flowkit.recipes.{recipe}.opened", None)
    cfg = configure(recipe, "trainer.accelerator=cuda", f"run_dir={tmp_path}/run")
    with pytest.raises(InstantiationException, match="CUDAAccelerator"):
        {"train": train, "autoencoder": autoencoder}[recipe](cfg)
    assert not (tmp_path / "run").exists()
