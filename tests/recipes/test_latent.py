"""The latent chain without a download: autoencoder, cache, flow, samples, evaluation."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from hydra import compose, initialize_config_dir
from safetensors import safe_open

from flowkit.autoencoders import KLAutoencoder
from flowkit.metrics.pictures import save_picture
from flowkit.modules import load_run
from flowkit.modules.checkpoints import read_config
from flowkit.recipes.autoencoder import autoencoder
from flowkit.recipes.encode import encode
from flowkit.recipes.evaluate import evaluate
from flowkit.recipes.inpaint import inpaint
from flowkit.recipes.report import report
from flowkit.recipes.sample import sample
from flowkit.recipes.semantic import semantic
from flowkit.recipes.train import train
from flowkit.runs.resuming import resumed
from flowkit.runs.splits import stored_data
from flowkit.sampling import seeded_noise
from tests.conftest import CONF
from tests.data.test_edm_latents import files, write
from tests.test_other_autoencoders import KINDS

QUIET = [
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "logger.tensorboard=null",
]
AUTOENCODER = [*QUIET, "vae.width=8", "vae.multipliers=[1,2]", "metric=pixels", "num_samples=20"]
FLOW = [
    *QUIET,
    "module=latent",
    "autoencoder=kl",
    "batch_size=32",
    "trainer.max_steps=20",
    "trainer.val_check_interval=10",
    "callback.ema.decay=0.9",
    "callback.losses=null",
    "callback.samples.rows=1",
    "sampler.grid=2",
]
MLP = ["model.width=32", "model.depth=1"]
DIT = ["model.net.width=16", "model.net.depth=1", "model.net.heads=2"]


def _compose(recipe, *overrides):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(recipe, overrides=list(overrides))


def _autoencoder(folder, *overrides):
    options = ["trainer.max_steps=4", "trainer.val_check_interval=2", f"run_dir={folder}"]
    autoencoder(_compose("autoencoder", *AUTOENCODER, *options, *overrides))
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The folder of a tiny autoencoder of digits."""
    return _autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def cache(network, tmp_path_factory):
    """A cache of digits."""
    root = tmp_path_factory.mktemp("cache") / "digits"
    encode(_compose("encode", f"autoencoder.path={network}", f"out={root}", "shard_size=500"))
    return root


@pytest.fixture(scope="module")
def run(network, cache, tmp_path_factory):
    """A flow trained from the cache for a moment."""
    folder = tmp_path_factory.mktemp("latent") / "run"
    options = [*FLOW, *MLP, "data=latents", f"data.root={cache}", f"autoencoder.path={network}"]
    train(_compose("train", *options, f"run_dir={folder}"))
    return folder


# --- autoencoder ----------------------------------------------------------------------------------


def test_autoencoder_is_saved_with_its_scale_and_measured(network):
    saved, record = KLAutoencoder.from_pretrained(network), json.loads(_text(network))
    assert record["autoencoder"] == saved.hash
    assert record["latents"]["std"] == pytest.approx(saved.std.flatten().tolist())
    assert 3 < record["metrics"]["psnr"] < 40
    assert record["metrics"]["features"]["name"] == "pixels"
    assert record["metrics"]["floor"]["frechet_distance"] > 0
    assert (network / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    assert AutoencoderKL.from_pretrained(str(network)).config.sample_size == [8, 8]


def _text(folder):
    return (folder / "metrics.json").read_text()


def test_autoencoder_learns(network, tmp_path):
    options = ["trainer.max_steps=60", "trainer.val_check_interval=60", "optimizer.lr=3e-3"]
    _autoencoder(tmp_path, *options)
    before, after = (json.loads(_text(f))["metrics"] for f in (network, tmp_path))
    assert after["psnr"] > before["psnr"] + 2
    assert after["frechet_distance"] < before["frechet_distance"]


def test_autoencoder_goes_on_from_its_checkpoint(network, tmp_path):
    folder = _autoencoder(tmp_path, "trainer.max_steps=6", f"resume={network}")
    (file,) = folder.glob("logs/*/metrics.csv")
    with file.open() as lines:
        steps = [int(row["step"]) for row in csv.DictReader(lines)]
    assert min(steps) >= 4
    assert KLAutoencoder.from_pretrained(folder).hash != KLAutoencoder.from_pretrained(network).hash


def test_a_resumed_autoencoder_is_the_uninterrupted_one(network, tmp_path):
    """The same posterior noise and learning rates, of a schedule that is stretched."""
    whole = _autoencoder(tmp_path / "whole", "trainer.max_steps=6")
    half = _autoencoder(tmp_path / "half", "trainer.max_steps=4", "lr_scheduler.T_max=6")
    rest = _autoencoder(tmp_path / "rest", "trainer.max_steps=6", f"resume={half}")
    assert _state(rest) == _state(whole)
    stretched = _autoencoder(tmp_path / "on", "trainer.max_steps=8", f"resume={network}")
    schedule = torch.load(stretched / "checkpoints/last.ckpt", weights_only=True)["lr_schedulers"]
    assert schedule[0]["T_max"] == 8
    assert schedule[0]["_last_lr"][0] < 1e-9
    with pytest.raises(ValueError, match=r"trainer.max_steps must exceed the steps already made"):
        _autoencoder(tmp_path / "end", "trainer.max_steps=4", f"resume={network}")


@pytest.mark.parametrize("after", ["training", "weights", "network"])
def test_an_autoencoder_killed_after_its_training_is_finished_by_resume(
    network, tmp_path, monkeypatch, after
):
    """Steps that are already made are not made again; the files are those of an unkilled call."""

    def killed(*args):
        raise ConnectionError("the plug was pulled")

    place, name = {
        "training": ("flowkit.recipes.autoencoder.KLAutoencoder", "fit_scale"),
        "weights": ("flowkit.autoencoders.frozen", "copyfile"),
        "network": ("flowkit.recipes.autoencoder", "_measure"),
    }[after]
    with monkeypatch.context() as patched:
        calls = iter([shutil.copyfile]) if after == "weights" else iter([])
        patched.setattr(f"{place}.{name}", lambda *args: next(calls, killed)(*args))
        with pytest.raises(ConnectionError):
            _autoencoder(tmp_path)
    assert (tmp_path / "config.json").exists() == (after == "network")
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.setattr("lightning.Trainer.fit", killed)
    _autoencoder(tmp_path, f"resume={tmp_path}")
    made, expected = (KLAutoencoder.from_pretrained(folder) for folder in (tmp_path, network))
    assert made.hash == expected.hash
    found, wanted = (json.loads(_text(folder)) for folder in (tmp_path, network))
    assert found["metrics"] == wanted["metrics"]
    with pytest.raises(ValueError, match=r"trainer.max_steps must exceed the steps already made"):
        _autoencoder(tmp_path, f"resume={tmp_path}")


def test_what_measures_an_autoencoder_is_found_before_its_training(tmp_path):
    options = ["metric=inception", f"metric.weights={tmp_path}/none"]
    with pytest.raises(ValueError, match="weights must be a file of InceptionV3"):
        _autoencoder(tmp_path / "a", *options)
    assert not (tmp_path / "a").exists()


def _state(folder):
    file = folder / "checkpoints/last.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    return {name: value.tolist() for name, value in state.items()}


def test_autoencoder_is_not_overwritten(network):
    with pytest.raises(FileExistsError, match=r"hydra.run.dir must hold no autoencoder, got"):
        _autoencoder(network)


def test_interrupted_autoencoder_is_not_begun_anew(network, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    last = "checkpoints/last.ckpt"
    (tmp_path / last).write_bytes((network / last).read_bytes())
    with pytest.raises(FileExistsError, match=rf"continue its training by resume={tmp_path}"):
        _autoencoder(tmp_path)


def test_perceptual_term_is_of_the_classifier(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["perceptual=classifier", "data.val_fraction=0.4", "data.test_fraction=0.4"]
    folder = _autoencoder(tmp_path, *options, "trainer.log_every_n_steps=1")
    (file,) = folder.glob("logs/*/metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/loss"]]
    for row in rows:
        l1, kl, perceptual, loss = (
            float(row[f"train/{name}"]) for name in ("l1", "kl", "perceptual", "loss")
        )
        assert perceptual > 0
        assert loss == pytest.approx(l1 + 1e-6 * kl / 64 + perceptual, rel=1e-4)


# --- cache ----------------------------------------------------------------------------------------


def test_cache_is_of_the_data_as_configured(cache, network):
    index = json.loads((cache / "index.json").read_text())
    assert index["source"]["_target_"] == "flowkit.data.Digits"
    assert index["autoencoder"]["hash"] == KLAutoencoder.from_pretrained(network).hash
    assert [s["rows"] for s in index["splits"]["train"]["shards"]] == [500, 500, 437]


@pytest.mark.slow
def test_killed_encoding_goes_on(network, cache, tmp_path):
    """A process that is killed leaves whole shards, and the next one makes the rest."""
    command = [sys.executable, "-m", "flowkit", "encode", f"autoencoder.path={network}"]
    command += [f"out={tmp_path}/cache", "shard_size=500", "batch_size=1"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    first = tmp_path / "cache" / "train-00000.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "cache" / "index.json").exists()
    result = subprocess.run([*command, "batch_size=64"], capture_output=True, text=True, check=True)
    assert "1,437 train, 180 val, 180 test" in result.stdout
    assert first.stat().st_mtime_ns == written
    for file in cache.glob("*.safetensors"):
        ours = tmp_path / "cache" / file.name
        with safe_open(file, "pt") as a, safe_open(ours, "pt") as b:
            assert a.metadata() == b.metadata()
            for name in ("mean", "std"):
                torch.testing.assert_close(a.get_tensor(name), b.get_tensor(name))


def test_flow_is_trained_on_latents_of_edm_and_resumed(tmp_path, capsys):
    """The files are those of the public format; the autoencoder says what they mean."""
    torch.manual_seed(0)
    KINDS["tiny"][0](KINDS["tiny"][1]()).save_pretrained(tmp_path / "vae")
    write(tmp_path / "edm" / "vae-sd", files())
    options = [o for o in FLOW if not o.startswith("autoencoder=")]
    options += [*MLP, "data=edm_latents", f"data.root={tmp_path / 'edm'}", "data.val_fraction=0.2"]
    options += [
        "data.test_fraction=0.2",
        "autoencoder=tiny",
        f"autoencoder.path={tmp_path / 'vae'}",
    ]
    whole = _compose("train", *options, f"run_dir={tmp_path / 'whole'}")
    half = _compose("train", *options, "trainer.max_steps=10", f"run_dir={tmp_path / 'half'}")
    train(whole)
    train(half)
    more = ["trainer.max_steps=20"]
    train(resumed(_compose("train", f"resume={tmp_path / 'half'}", *more), more))
    assert _state(tmp_path / "half") == _state(tmp_path / "whole")
    module = load_run(tmp_path / "whole")
    assert module.sample(2, cond=torch.tensor([0, 2]), seeds=[0, 1]).shape == (2, 3, 6, 4)
    words = r"got latents without their images; draw samples .* reference=.*edm/images"
    with pytest.raises(ValueError, match=words):
        evaluate(_compose("evaluate", f"run={tmp_path / 'whole'}", "num_samples=4"))


# --- flow -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["tiny", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dc", "rae"))],
)
def test_other_autoencoders_encode_train_and_sample(kind, tmp_path):
    """A flow on the cache of another kind of network, which refuses another network."""
    for seed, name in enumerate(("own", "other")):
        torch.manual_seed(seed)
        KINDS[kind][0](KINDS[kind][1]()).save_pretrained(tmp_path / name)
    options = [f"autoencoder={kind}", "autoencoder.image_shape=[1,8,8]"]
    own = [*options, f"autoencoder.path={tmp_path / 'own'}"]
    encode(_compose("encode", *own, f"out={tmp_path / 'cache'}"))
    flow = [o for o in FLOW if not o.startswith("autoencoder=")]
    flow += [*MLP, "data=latents", f"data.root={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    other = [*flow, *options, f"autoencoder.path={tmp_path / 'other'}"]
    with pytest.raises(ValueError, match="autoencoder must be the autoencoder of the cached laten"):
        train(_compose("train", *other))
    train(_compose("train", *flow, *own))
    module = load_run(tmp_path / "run")
    drawn = module.sample(3, cond=torch.arange(3), seeds=range(3))
    assert drawn.shape == (3, 1, 8, 8)
    states = module.solve(seeded_noise(module.sample_shape, range(3)), cond=torch.arange(3)).x
    images = KINDS[kind][0].from_pretrained(tmp_path / "own", (1, 8, 8)).decode(states)
    torch.testing.assert_close(drawn, images)


def test_flow_is_trained_from_the_cache_and_sampled_as_images(run, network, configure, tmp_path):
    module = load_run(run)
    assert module.sample_shape == (4, 4, 4)
    assert module.autoencoder.hash == KLAutoencoder.from_pretrained(network).hash
    drawn = sample(
        configure("sample", f"run={run}", f"out={tmp_path}", "num_samples=5", "guidance=2")
    )
    assert drawn.shape == (5, 1, 8, 8)
    expected = module.sample(5, cond=torch.arange(5), seeds=range(5), guidance=2.0)
    torch.testing.assert_close(drawn, expected)


def test_expectations_are_logged_at_the_start(run):
    (file,) = run.glob("logs/*/metrics.csv")
    with file.open() as lines:
        first = next(csv.DictReader(lines))
    assert float(first["latents/std"]) == pytest.approx(1, abs=0.1)
    assert float(first["latents/zero"]) == pytest.approx(2, abs=0.2)


def test_networks_are_told_the_shape_of_latents_encoded_on_the_fly(network, configure, tmp_path):
    options = [*FLOW, *MLP, f"autoencoder.path={network}", f"run_dir={tmp_path}"]
    module = train(configure("train", *options, "trainer.max_steps=2"))
    assert module.sample_shape == tuple(module.velocity.shape) == (4, 4, 4)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["shape"], config["image_shape"]) == ([4, 4, 4], [1, 8, 8])


def test_published_autoencoders_serve_as_well(configure, tmp_path):
    """A folder as Stable Diffusion's: three colors, a scale, no size, inside a pipeline's."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        sample_size=512,
        scaling_factor=0.18215,
    ).save_pretrained(tmp_path / "pipeline" / "vae")
    published = [f"autoencoder.path={tmp_path}/pipeline", "+autoencoder.subfolder=vae"]
    published += ["autoencoder.image_shape=[1,8,8]"]
    index = encode(configure("encode", *published, f"out={tmp_path}/cache"))
    assert (index["image_shape"], index["latent_shape"]) == ([1, 8, 8], [4, 4, 4])
    options = [*FLOW, *MLP, *published, "data=latents", f"data.root={tmp_path}/cache"]
    train(configure("train", *options, f"run_dir={tmp_path}/run", "trainer.max_steps=2"))
    drawn = sample(configure("sample", f"run={tmp_path}/run", "num_samples=3", "sampler.grid=2"))
    assert drawn.shape == (3, 1, 8, 8)
    assert load_run(tmp_path / "run").autoencoder.hash == index["autoencoder"]["hash"]


def test_evaluation_is_against_images(run, configure, tmp_path):
    options = [f"run={run}", f"out={tmp_path}", "num_samples=40", "metric=pixels", "sampler.grid=2"]
    record = evaluate(configure("evaluate", *options))
    assert record["data"]["name"] == "Digits"
    assert record["metrics"]["reference"]["num_samples"] == 180
    assert record["metrics"]["frechet_distance"] > record["metrics"]["floor"]["frechet_distance"]


def test_checkpoints_hold_no_weight_of_the_autoencoder(run):
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert all(name.startswith("velocity.") for name in state[part])


def test_another_autoencoder_is_refused_by_both_hashes(run, network, cache, tmp_path, configure):
    """On loading, on resuming and on training from the cache."""
    other = _autoencoder(tmp_path / "other", "seed=1")
    ours, theirs = (KLAutoencoder.from_pretrained(f).hash for f in (network, other))
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "unresolved.yaml", "checkpoints/last.ckpt"):
        content = (run / name).read_bytes()
        if name.endswith(".yaml"):
            content = content.replace(str(network).encode(), str(other).encode())
        (copy / name).write_bytes(content)
    message = f"hash {ours}, got {theirs}"
    with pytest.raises(ValueError, match=f"the flow was made with, {message}"):
        load_run(copy)
    flow = [*FLOW, *MLP, "data=latents", f"data.root={cache}", f"autoencoder.path={other}"]
    checkpoint = run / "checkpoints" / "last.ckpt"
    options = [f"run_dir={tmp_path}/a", "trainer.max_steps=30", f"resume={checkpoint}"]
    with pytest.raises(ValueError, match=f"the flow was made with, {message}"):
        train(configure("train", *flow, *options))
    with pytest.raises(ValueError, match=f"the cached latents, {message}"):
        train(configure("train", *flow, f"run_dir={tmp_path}/b"))


def test_resuming_from_a_cache_goes_on_exactly(network, cache, configure, tmp_path):
    options = [*FLOW, *MLP, "data=latents", f"data.root={cache}", f"autoencoder.path={network}"]
    options += ["callback.samples=null", "trainer.max_steps=12"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configure("train", *options, f"run_dir={whole}"))
    half = [*options, f"run_dir={parts}", "trainer.max_steps=7"]
    train(configure("train", *half))
    checkpoint = parts / "checkpoints" / "last.ckpt"
    train(configure("train", *options, f"run_dir={tmp_path}/on", f"resume={checkpoint}"))
    states = [
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for f in (whole, tmp_path / "on")
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_report_measures_every_scale_as_evaluate_does(run, configure, tmp_path):
    options = [f"run={run}", "metric=pixels", "num_samples=20"]
    cells = ["solvers=[heun]", "nfe=[4]", "grids.shifted=null", f"out={tmp_path}"]
    rows = report(configure("report", *options, *cells, "guidance=[0,1.5]"))
    assert [row["guidance"] for row in rows] == [0, 1.5]
    assert [row["network_rows_per_sample"] for row in rows] == [4, 8]
    alone = ["sampler.grid=2", f"out={tmp_path}/alone", "guidance=1.5"]
    metrics = evaluate(configure("evaluate", *options, *alone))["metrics"]
    assert rows[1]["distance"] == pytest.approx(metrics["frechet_distance"])
    for name in ("precision", "recall", "density", "coverage", "class_agreement"):
        assert rows[1][name] == pytest.approx(metrics[name]), name
    real = json.loads((tmp_path / "report.json").read_text())["measure"]["real"]
    assert real["class_agreement"] == metrics["judge"]["test_accuracy"]
    assert "| heun | uniform | 1.5 | 2 | 4 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "guidance.png").read_bytes().startswith(b"\x89PNG")
    again = report(configure("report", *options, *cells, "guidance=[0,1,1.5]"))
    assert [again[0], again[2]] == rows  # with the milliseconds of the first call


# --- conditions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inpainting_run(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inpainting") / "run"
    options = ["module=inpainting", "model=inpainting_dit", "callback=conditions"]
    options += [f"autoencoder.path={network}", f"run_dir={folder}"]
    train(_compose("train", *FLOW, *options, *DIT))
    return folder


def test_inpainting_keeps_known_pixels_exactly(inpainting_run, configure, tmp_path):
    options = [f"run={inpainting_run}", f"out={tmp_path}", "num_images=5", "sampler.grid=2"]
    filled = inpaint(configure("inpaint", *options))
    assert filled.shape == (5, 4, 1, 8, 8)
    metrics = json.loads((tmp_path / "inpainted.json").read_text())["metrics"]
    assert metrics["known_error"] == 0
    assert metrics["own_known_error"] > 0
    assert metrics["spread"] > 0
    # of the same seeds in other batches, with the flow's own pixels where all were known
    own = inpaint(configure("inpaint", *options, "batch_size=2", "paste_back=false"))
    changed = own != filled
    torch.testing.assert_close(own[~changed], filled[~changed])
    assert changed.any()
    assert (inpainting_run / "samples" / "step-000020.png").exists()


def test_inpainting_needs_a_run_that_learned_it(run, configure):
    with pytest.raises(TypeError, match="run must be trained with module=inpainting, got Latent"):
        inpaint(configure("inpaint", f"run={run}"))


def test_holes_of_images_without_labels_are_learned(network, configure, tmp_path):
    options = ["module=inpainting", "model=inpainting_dit", "callback=conditions", *DIT]
    options += [f"autoencoder.path={network}", f"run_dir={tmp_path}/run", "trainer.max_steps=2"]
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(40):
        save_picture(torch.rand(1, 1, 8, 8) * 2 - 1, folder / f"{k}.png")
    options += ["data=folder", f"data.root={folder}", "data.image_size=8", "data.channels=1"]
    assert train(configure("train", *FLOW, *options)).drop_cond is None
    cfg = configure("inpaint", f"run={tmp_path}/run", "num_images=2", "sampler.grid=2")
    assert inpaint(cfg).shape == (2, 4, 1, 8, 8)


def test_maps_become_images(network, configure, tmp_path):
    options = ["data=digits_masks", "model=semantic_dit", "model.num_classes=11", "model.factor=2"]
    options += [f"autoencoder.path={network}", f"run_dir={tmp_path}", "callback=conditions"]
    train(configure("train", *FLOW, *options, *DIT, "module.drop_cond.null=11"))
    cfg = configure("semantic", f"run={tmp_path}", "num_images=30", "sampler.grid=2", "guidance=2")
    record = semantic(cfg)
    metrics = record["metrics"]
    assert 0 <= metrics["iou"] <= 1
    assert 0 < metrics["iou_of_reconstructions"] <= 1
    assert metrics["class_agreement_of_real"] > 0.8
    assert record["sampling"]["network_rows_per_sample"] == 8
    assert (tmp_path / "semantic" / "semantic.png").exists()


def test_maps_can_be_cached(network, configure, tmp_path):
    options = [f"autoencoder.path={network}", f"out={tmp_path}/cache", "data=digits_masks"]
    encode(configure("encode", *options))
    options = ["data=latents", f"data.root={tmp_path}/cache", "model=semantic_dit"]
    options += ["model.num_classes=11", "model.factor=2", "callback=conditions"]
    options += [f"autoencoder.path={network}", f"run_dir={tmp_path}/run", "module.drop_cond=null"]
    train(configure("train", *FLOW, *options, *DIT))
    record = semantic(
        configure("semantic", f"run={tmp_path}/run", "num_images=20", "sampler.grid=2")
    )
    assert record["data"]["name"] == "Digits"


def test_the_images_of_latents_are_those_that_were_encoded(run, cache, tmp_path):
    """The record beside the cache is compared when an evaluation opens the images."""
    assert type(stored_data(read_config(run)["data"], folder=run)).__name__ == "Digits"
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    record = json.loads((copy / "data.json").read_text())
    assert (record["kind"], record["classes"]) == ("Digits", [str(k) for k in range(10)])
    record["splits"]["test"]["fingerprint"] = "0" * 64
    (copy / "data.json").write_text(json.dumps(record))
    node = {"_target_": "flowkit.data.Latents", "root": str(copy)}
    with pytest.raises(ValueError, match="got other content of test; if this is right"):
        stored_data(node)
    assert stored_data(node, changed="accept").changes == "other content of test"


def test_maps_are_asked_for_where_there_are_none(run, configure):
    with pytest.raises(TypeError, match="got LatentFlowMatching on Digits"):
        semantic(configure("semantic", f"run={run}"))


# --- processes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_checkpoints_and_seeds_do_not_know_the_number_of_processes(
    run, network, cache, configure, tmp_path
):
    """One process, then two, then one again; and samples of another process are the same."""
    options = [*FLOW, *MLP, "data=latents", f"data.root={cache}", f"autoencoder.path={network}"]
    both, last = tmp_path / "both", tmp_path / "last"
    two = ["trainer.devices=2", "+trainer.strategy=ddp", "trainer.max_steps=25", "batch_size=16"]
    two += [f"hydra.run.dir={both}", f"resume={run}/checkpoints/last.ckpt"]
    _flowkit("train", *options, *two)
    assert load_run(both).weights["step"] == 25
    one = [f"run_dir={last}", f"resume={both}/checkpoints/last.ckpt", "trainer.max_steps=30"]
    train(configure("train", *options, *one))
    assert load_run(last).weights["step"] == 30

    drawn = [f"run={both}", "labels=[1]", "sampler.grid=3"]
    whole = sample(configure("sample", *drawn, f"out={tmp_path}/a", "num_samples=6"))
    _flowkit("sample", *drawn, f"out={tmp_path}/b", "num_samples=3", "seed=3", "seeding=1")
    other = torch.load(tmp_path / "b" / "samples.pt", weights_only=True)["samples"]
    torch.testing.assert_close(other, whole[3:])


def _flowkit(*arguments):
    command = [sys.executable, "-m", "flowkit", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
