"""Labels of images and images of labels, by tiny symmetrical runs."""

import json
import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from flowkit.data import Digits, MaskFolder
from flowkit.data.masks import Masks
from flowkit.metrics.labels import classification_metrics, segmentation_metrics
from flowkit.modules import load_run
from flowkit.recipes.consistency import consistency
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.predict import predict
from flowkit.recipes.sample import sample
from flowkit.recipes.train import train
from tests.conftest import CONF
from tests.recipes.conftest import TINY

CLASSES = ["module=symmetrical"]
MASKS = [
    *("module=symmetrical", "data=digits_masks", "codec@module.codec=one_hot_mask"),
    "module.times=symmetric",
]


def _train(folder, *options):
    with initialize_config_dir(CONF, version_base="1.3"):
        train(compose("train", overrides=[*TINY, *options, f"run_dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def class_run(tmp_path_factory):
    """Two times, of digits and their classes, after 20 steps."""
    return _train(tmp_path_factory.mktemp("classes") / "run", *CLASSES)


@pytest.fixture(scope="module")
def mask_run(tmp_path_factory):
    """One time, of digits and their masks, after 20 steps."""
    return _train(tmp_path_factory.mktemp("masks") / "run", *MASKS)


def test_predictions_are_the_modules_own_on_the_whole_test_split(class_run, configure, tmp_path):
    record = predict(configure("predict", f"run={class_run}", f"out={tmp_path}", "batch_size=50"))
    stored = torch.load(tmp_path / "predicted.pt", weights_only=True)
    test = _split(Digits())
    p, uncertainty = load_run(class_run).classify(test["x1"])
    torch.testing.assert_close(stored["probabilities"], p, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stored["uncertainty"], uncertainty, atol=1e-5, rtol=1e-4)
    assert torch.equal(stored["labels"], stored["probabilities"].argmax(1))
    expected = classification_metrics(stored["probabilities"], test["cond"])
    assert record["metrics"] == json.loads(json.dumps(expected))
    assert record["metrics"]["num_samples"] == len(test["x1"]) == 180
    assert (record["sampling"]["nfe"], record["sampling"]["network_rows_per_image"]) == (1, 1)
    assert json.loads((tmp_path / "predicted.json").read_text()) == record
    assert (tmp_path / "predicted.png").is_file()
    with pytest.raises(
        TypeError, match=r"sampler must be an ODESampler .* to run a flow from data"
    ):
        predict(configure("predict", f"run={class_run}", f"out={tmp_path}", "sampler=sde"))
    # left out where they are not wanted, but measured
    options = [f"run={class_run}", f"out={tmp_path / 'few'}", "probabilities=false"]
    few = predict(configure("predict", *options))
    assert "probabilities" not in torch.load(tmp_path / "few/predicted.pt", weights_only=True)
    assert few["metrics"]["auc"] == pytest.approx(record["metrics"]["auc"], rel=1e-4)


def test_the_same_command_gives_the_same_numbers(class_run, configure, tmp_path):
    records = [
        predict(
            configure(
                "predict",
                *(f"run={class_run}", f"out={tmp_path / str(size)}", f"batch_size={size}"),
                *("sampler.grid=3", "draws=2", "seed=5"),
            )
        )
        for size in (180, 180, 7)
    ]
    assert records[0]["metrics"] == records[1]["metrics"]
    for name in ("accuracy", "auc", "brier_score"):
        assert records[2]["metrics"][name] == pytest.approx(records[0]["metrics"][name], abs=1e-5)
    assert records[0]["sampling"]["nfe"] == 6


def _split(data):
    data.setup()
    return data.test[:]


def test_masks_are_predicted_measured_and_shown(mask_run, configure, tmp_path):
    record = predict(configure("predict", f"run={mask_run}", f"out={tmp_path}"))
    stored = torch.load(tmp_path / "predicted.pt", weights_only=True)
    assert set(stored) == {"labels", "confidence"}
    test = _split(Masks(Digits()))
    assert torch.equal(stored["labels"], load_run(mask_run).segment(test["x1"]).mask)
    expected = segmentation_metrics(stored["labels"], test["cond"], 11)
    assert record["metrics"] == {"num_samples": 180, **expected}
    assert (tmp_path / "predicted.png").is_file()
    options = [f"run={mask_run}", f"out={tmp_path / 'all'}", "probabilities=true"]
    predict(configure("predict", *options))
    stored = torch.load(tmp_path / "all" / "predicted.pt", weights_only=True)
    assert stored["probabilities"].shape == (180, 11, 8, 8)


def test_a_folder_of_images_and_masks_is_learnt_and_predicted(configure, tmp_path):
    """Gray images, masks in three colors of which the last is ignored."""
    colors = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 0, 255]])
    labels = torch.randint(3, (60, 8, 8), generator=torch.Generator().manual_seed(0))
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for k, mask in enumerate(labels):
        gray = (100 * mask).byte().numpy()
        Image.fromarray(gray).save(tmp_path / "images" / f"{k}.png")
        Image.fromarray(colors[mask].byte().numpy()).save(tmp_path / "masks" / f"{k}.png")
    options = ["module=symmetrical", "data=mask_folder", f"data.root={tmp_path}", "data.channels=1"]
    options += ["data.image_size=8", "data.test_fraction=0.5", "codec@module.codec=one_hot_mask"]
    options += ["data.colors=[[0,0,0],[255,0,0],[0,0,255]]", "module.codec.num_classes=2"]
    options += ["module.codec.ignore_index=2"]
    run = _train(tmp_path / "run", *options)
    record = predict(configure("predict", f"run={run}", "batch_size=7"))
    stored = torch.load(run / "predicted" / "predicted.pt", weights_only=True)
    data = MaskFolder(tmp_path, 8, 1, colors.tolist(), test_fraction=0.5)
    truth = _split(data)["cond"]
    expected = segmentation_metrics(stored["labels"], truth, 2, ignore_index=2)
    assert record["metrics"] == {"num_samples": len(truth), **expected}
    assert expected["num_pixels"] < truth.numel()
    consistency(configure("consistency", f"run={run}", "num_samples=10", "sampler.grid=2"))


def test_what_is_printed_says_of_how_many_images(class_run, configure, tmp_path, capsys):
    record = predict(configure("predict", f"run={class_run}", f"out={tmp_path}"))
    lines = capsys.readouterr().out.splitlines()
    printed = {name.strip(): value.strip() for name, value in (x.split("  ", 1) for x in lines)}
    metrics = record["metrics"]
    assert printed["images"] == "180"
    value, low, high = map(float, re.findall(r"[\d.]+", printed["accuracy"]))
    assert value == pytest.approx(metrics["accuracy"], abs=1e-4)
    assert [low, high] == pytest.approx(metrics["accuracy_interval"], abs=1e-4)


def test_labels_of_other_classes_are_not_compared(class_run, configure, tmp_path, capsys):
    for k in range(40):
        (tmp_path / "images" / "abc"[k % 3]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 6 * k).save(tmp_path / "images" / "abc"[k % 3] / f"{k}.png")
    options = [f"run={class_run}", f"out={tmp_path / 'out'}", "split=train", "data=folder"]
    options += [f"data.root={tmp_path / 'images'}", "data.image_size=8", "data.channels=1"]
    assert set(predict(configure("predict", *options))["metrics"]) == {"num_samples"}
    assert "3 classes, but 10 in the run" in capsys.readouterr().out


def test_labels_of_classes_with_other_names_are_not_compared(
    class_run, configure, capsys, tmp_path
):
    """Ten folders, as many as digits: the number of a folder is no digit."""
    names = ["zero", *"123456789"]
    for k in range(60):
        (tmp_path / "images" / names[k % 10]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 4 * k).save(tmp_path / "images" / names[k % 10] / f"{k}.png")
    options = [f"run={class_run}", f"out={tmp_path / 'out'}", "split=train", "data=folder"]
    options += [f"data.root={tmp_path / 'images'}", "data.image_size=8", "data.channels=1"]
    assert set(predict(configure("predict", *options))["metrics"]) == {"num_samples"}
    assert (
        "not compared: classes 1, 2, 3, 4, 5, 6, 7, 8, 9, zero, but 0, 1,"
        in capsys.readouterr().out
    )
    (tmp_path / "images" / "zero").rename(tmp_path / "images" / "0")
    assert "accuracy" in predict(configure("predict", *options))["metrics"]


@pytest.mark.parametrize("recipe", [predict, consistency])
def test_devices_and_batches_that_cannot_be_are_refused(class_run, configure, recipe):
    name = recipe.__name__
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        recipe(configure(name, f"run={class_run}", "batch_size=0"))
    with pytest.raises(ValueError, match="device must be a device of this machine, such as"):
        recipe(configure(name, f"run={class_run}", "device=x"))


def test_several_symmetric_steps_warn(mask_run, configure, tmp_path):
    options = [f"run={mask_run}", f"out={tmp_path}", "sampler.grid=2"]
    with pytest.warns(UserWarning, match="several steps of symmetric mode may be worse"):
        predict(configure("predict", *options))


def test_images_without_labels_are_predicted_too(class_run, configure, tmp_path):
    for k in range(30):
        Image.new("L", (8, 8), 8 * k).save(tmp_path / f"{k:02}.png")
    options = [f"run={class_run}", f"out={tmp_path / 'out'}", "split=train", "data=folder"]
    options += [f"data.root={tmp_path}", "data.image_size=8", "data.channels=1"]
    record = predict(configure("predict", *options))
    stored = torch.load(tmp_path / "out" / "predicted.pt", weights_only=True)
    assert record["metrics"] == {"num_samples": len(stored["labels"])}
    assert len(stored["labels"]) > 20
    assert not (tmp_path / "out" / "predicted.png").exists()


def test_consistency_of_classes_and_pairs(class_run, configure, tmp_path):
    options = [f"run={class_run}", f"out={tmp_path}", "num_samples=40", "sampler.grid=2"]
    record = consistency(configure("consistency", *options, "batch_size=40"))
    module, labels = load_run(class_run), torch.arange(40) % 10
    images = module.generate(labels, _heun(), seeds=range(40))
    own = (module.classify(images).probabilities.argmax(1) == labels).double().mean().item()
    metrics = record["metrics"]
    assert metrics["images_of_labels"]["own_agreement"] == pytest.approx(own, abs=0.026)
    assert metrics["images_of_labels"]["judge"]["test_accuracy"] > 0.95
    pairs = module.sample_pairs(40, _heun(), range(40))
    shares = pairs.labels.bincount(minlength=10) / 40
    assert metrics["pairs"]["shares"] == pytest.approx(shares.tolist(), abs=0.026)
    assert (tmp_path / "pairs.png").is_file()
    again = consistency(configure("consistency", *options, "batch_size=40"))
    assert again["metrics"] == metrics


def _heun():
    from flowkit.sampling import ODESampler

    return ODESampler(2, "heun")


def test_consistency_of_masks(mask_run, configure, tmp_path):
    options = [f"run={mask_run}", f"out={tmp_path}", "num_samples=20", "sampler.grid=2"]
    record = consistency(configure("consistency", *options))
    test = _split(Masks(Digits()))
    masks = test["cond"][:20]
    images = load_run(mask_run).generate(masks, _heun(), seeds=range(20))
    rule = segmentation_metrics((images[:, 0] > -0.25).long(), (masks > 0).long(), 2)["iou"][1]
    found = record["metrics"]["images_of_labels"]
    assert found["rule_foreground_iou"] == pytest.approx(rule, abs=0.01)
    assert 0 <= found["own_mean_iou"] <= found["own_foreground_iou"] <= 1
    assert set(record["metrics"]) == {"images_of_labels"}


@pytest.mark.parametrize("kind", ["class", "mask"])
def test_sample_and_evaluate_work_on_symmetrical_runs(
    kind, class_run, mask_run, configure, tmp_path
):
    run = class_run if kind == "class" else mask_run
    options = [f"run={run}", "num_samples=20", "sampler.grid=2"]
    drawn = sample(configure("sample", *options, f"out={tmp_path}"))
    stored = torch.load(tmp_path / "samples.pt", weights_only=True)
    torch.testing.assert_close(
        load_run(run).generate(stored["cond"], _heun(), seeds=range(20)),
        drawn,
        atol=1e-5,
        rtol=1e-4,
    )
    found = evaluate(configure("evaluate", *options, f"out={tmp_path}", "metric=pixels"))
    assert found["metrics"]["frechet_distance"] > found["metrics"]["floor"]["frechet_distance"]
    assert ("class_agreement" in found["metrics"]) == (kind == "class")


@pytest.mark.parametrize(
    "options",
    [
        ["model=dit", "model.width=24", "model.heads=2", "codec@module.codec=simplex"],
        ["model=codes_mlp", "model.net.net.width=8", "module.times=symmetric"],
        ["model=codes_mlp", "model.net.net.width=8", "codec@module.codec=ordinal"],
        ["model=unet2d", "model.width=8", "module.times=symmetric"],
        [
            *("model=unet2d_two_times", "model.net.net.width=8"),
            *("data=digits_masks", "codec@module.codec=one_hot_mask"),
        ],
    ],
)
def test_models_follow_data_codec_and_times(options, configure, tmp_path):
    tiny = [option for option in TINY if not option.startswith("model.")]
    steps = ["trainer.max_steps=1", "callback=raw"]
    cfg = configure(
        "train", *tiny, "module=symmetrical", *options, *steps, f"run_dir={tmp_path / 'run'}"
    )
    train(cfg)
    module = load_run(tmp_path / "run")
    images = torch.zeros(2, 1, 8, 8)
    assert module.posterior(images).shape[:2] == (2, module.codec.num_classes)
    if module.times == "two-time":
        assert module.sample_pairs(2, _heun()).images.shape == images.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["module.codec=one_hot_mask"], "codec must be .* got 'one_hot_mask'; in a config"),
        (["data=toy"], "cond must be a tensor of labels, got NoneType"),
    ],
)
def test_what_cannot_label_is_refused_before_a_step(options, message, configure, tmp_path):
    with pytest.raises(TypeError, match=message):
        train(configure("train", *TINY, "module=symmetrical", *options, f"run_dir={tmp_path}"))


def test_other_runs_cannot_label(tiny_run, configure):
    with pytest.raises(TypeError, match=r"run must be a run of SymmetricalFlow.* got Conditional"):
        predict(configure("predict", f"run={tiny_run}"))
