"""Train on mixtures and separate: pictures, sounds, records, same results again, wrong settings."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from flowkit.audio import read_audio, write_audio
from flowkit.data import CaptionedAudio
from flowkit.modules import load_run
from flowkit.provenance import write_json
from flowkit.recipes.autoencoder import autoencoder
from flowkit.recipes.convert import convert
from flowkit.recipes.push import push
from flowkit.recipes.sample import sample
from flowkit.recipes.separate import separate
from flowkit.recipes.train import train
from flowkit.runs import Run
from tests.audio.conftest import write_clips, write_encoder
from tests.conftest import CONF
from tests.recipes.conftest import TINY, status_of

SMALL = [*TINY[4:-1], "batch_size=4", "trainer.max_steps=4", "trainer.val_check_interval=2"]
SMALL += ["data.frames=20", "data.states.mel.hop=160", "data.eval_mixtures=3"]
SMALL += ["callback.samples.sounds=1", "logger.tensorboard=null"]
NET = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 2}
NET |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "sample_size": [10, 32]}
NET |= {"in_channels": 8, "out_channels": 4}
NET |= {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
SMALL += ["model.net.size=2", *(f"model.net.net.net.{name}={value}" for name, value in NET.items())]


def composed(recipe, *options):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(recipe, overrides=[str(option) for option in options])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with clips, an encoder of texts, and a run of four steps on them."""
    folder = tmp_path_factory.mktemp("sounds")
    for part, write in (("clips", write_clips), ("encoder", write_encoder)):
        (folder / part).mkdir()
        write(folder / part)
    train(composed("train", *options(folder), f"run_dir={folder}/run"))
    time = torch.arange(30000) / 16000
    write_audio(0.4 * torch.sin(2 * torch.pi * 300 * time), folder / "mix.wav")
    return folder


def options(folder):
    found = ["experiment=flowsep_instruments", "data=captioned_audio", *SMALL]
    return [*found, *places_of(folder), f"data.query.path={folder}/encoder"]


def places_of(folder):
    return [f"data.root={folder}/clips", f"data.captions={folder}/clips/captions.csv"]


def test_training_shows_spectrograms_and_sounds(place):
    folder = place / "run/samples"
    assert sorted(p.name for p in folder.glob("*.png")) == ["step-000002.png", "step-000004.png"]
    with Image.open(folder / "step-000004.png") as picture:
        assert picture.width > 600
        assert len(np.unique(np.asarray(picture.convert("L")))) > 100  # more than points on white
    heard = {p.name: read_audio(p) for p in (folder / "step-000004").iterdir()}
    assert set(heard) == {"0-mixture.wav", "0-target.wav", "0-sample.wav"}
    assert all(len(wave) == 19 * 160 for wave in heard.values())
    record = json.loads((place / "run/data.json").read_text())
    assert set(record["preprocessing"]) == {"states", "query"}


@pytest.mark.parametrize("frames", [21, 22])  # not cut into squares, not halved
def test_frames_that_do_not_fit_are_told_by_their_option(place, tmp_path, frames):
    given = [*options(place), f"data.frames={frames}", f"run_dir={tmp_path}/run"]
    words = rf"^data\.frames must be a multiple of 4 for this network, got {frames}; give data\."
    with pytest.raises(ValueError, match=words + r"frames=20 or data\.frames=24$"):
        train(composed("train", *given))
    assert not any((tmp_path / "run").iterdir())


def test_a_resumed_run_is_the_uninterrupted_one(place, tmp_path):
    short = [*options(place), "trainer.max_steps=2", f"run_dir={tmp_path}/run"]
    train(composed("train", *short, "~lr_scheduler"))
    whole = [*options(place), f"run_dir={tmp_path}/whole", "~lr_scheduler"]
    train(composed("train", *whole))
    again = [*options(place), f"run_dir={tmp_path}/run", f"resume={tmp_path}/run"]
    train(composed("train", *again, "~lr_scheduler"))
    ours, theirs = (load_run(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_recording_is_separated_and_recorded(place, tmp_path):
    asked = [f"run={place}/run", f"audio={place}/mix.wav", "query=loud violin", "sampler.grid=2"]
    first = separate(composed("separate", *asked, f"out={tmp_path}", "overlap=8"))
    assert first.shape == (30000,)
    written = read_audio(tmp_path / "separated.wav")
    torch.testing.assert_close(written, first, atol=1e-4, rtol=0)
    assert first.abs().max() <= 0.41  # never more than the recording
    record = json.loads((tmp_path / "separated.json").read_text())
    assert record["sampling"]["query"] == "loud violin"
    assert record["sampling"]["audio_seconds"] == 1.875
    assert record["sampling"]["guidance"] == 2
    assert (
        record["query"]
        == json.loads((place / "run/data.json").read_text())["preprocessing"]["query"]
    )
    again = separate(composed("separate", *asked, f"out={tmp_path}", "overlap=8"))
    assert torch.equal(first, again)
    assert not (tmp_path / "separated-1.json").exists()  # only the seconds differ
    other = separate(composed("separate", *asked, f"out={tmp_path}", "seed=1"))
    assert not torch.equal(first, other)
    assert json.loads((tmp_path / "separated-1.json").read_text())["sampling"]["seed"] == 0
    assert torch.equal(read_audio(tmp_path / "separated-1.wav"), written)


def test_test_mixtures_are_measured(place, tmp_path):
    asked = [f"run={place}/run", "sampler.grid=1", f"out={tmp_path}", "num_mixtures=2"]
    waves = separate(composed("separate", *asked, "batch_size=1"))
    record = json.loads((tmp_path / "mixtures.json").read_text())
    assert record["metrics"]["num_mixtures"] == 2
    assert record["metrics"]["si_sdr_improvement_of_truth"] > 10
    assert record["data"]["name"] == "CaptionedAudio"
    for k in range(2):
        answer = read_audio(tmp_path / f"mixtures-answer-{k}.wav")
        torch.testing.assert_close(answer, waves[k], atol=1e-4, rtol=0)
        mixture, target = (
            read_audio(tmp_path / f"mixtures-{name}-{k}.wav") for name in ("mixture", "target")
        )
        assert (mixture - target).abs().max() > 1e-3


def test_samples_of_a_run_that_separates_come_with_advice(place, tmp_path, capsys):
    run = place / "run"
    sample(composed("sample", f"run={run}", "sampler.grid=1", "num_samples=1", f"out={tmp_path}"))
    out = capsys.readouterr().out
    assert f"its command: flowkit separate run={run}\n" in out
    assert out.index("advice ") < out.index("drawing ")


@pytest.mark.filterwarnings("ignore:.*sys.modules:RuntimeWarning")
def test_a_shared_model_separates_and_its_card_says_how(place, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(place / "run", tmp_path / "run")
    stray = {"metrics": {}, "weights": {"hash": Run.load(run).weights["hash"]}}
    write_json(run / "metrics.json", stray)  # of its spectrograms as pictures
    early = push(composed("push", f"run={run}", f"to={tmp_path}/early"))
    assert not (early / "metrics.json").exists()
    separate(composed("separate", f"run={run}", "sampler.grid=1", "num_mixtures=2"))
    folder = push(composed("push", f"run={run}", f"to={tmp_path}/shared"))
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: audio-to-audio" in card
    assert re.findall("^flowkit separate run=shared(.*)$", card, re.MULTILINE) == [
        " data.root=<folder of the data> data.captions=<path> data.query.path=<path>",
        ' audio=mix.wav query="piano" data.query.path=<path>',
    ]
    assert "| | value | interval |\n| --- | --- | --- |\n| SI-SDR improvement (dB) | " in card
    assert "best" not in card  # of one answer to a mixture
    assert "How: 2 test mixtures; " in card
    assert (folder / "samples.png").read_bytes() == (run / "separated/mixtures.png").read_bytes()
    assert str(tmp_path) not in (folder / "config.json").read_text()
    assert str(place) not in (folder / "config.json").read_text()

    asked = [f"audio={place}/mix.wav", "query=loud violin", "sampler.grid=2"]
    separate(composed("separate", f"run={run}", *asked, f"out={tmp_path}/own"))
    shared = ["separate", f"run={folder}", f"out={tmp_path}/other"]
    encoder = f"data.query.path={place}/encoder"
    for given, missing in (
        (asked, "data.query.path"),
        (["num_mixtures=2", encoder], "data.root and data.captions"),
    ):
        assert status_of([*shared, *given], monkeypatch) == 2
        words = f"error: {missing} must be given for a shared model, which holds neither its data"
        assert capsys.readouterr().err.startswith(words)
    assert status_of([*shared, *asked, encoder], monkeypatch) == 0
    assert torch.equal(*(read_audio(tmp_path / f"{x}/separated.wav") for x in ("own", "other")))
    measured = [*places_of(place), encoder, "sampler.grid=1", "num_mixtures=2"]
    assert status_of([*shared, *measured], monkeypatch) == 0
    ours, theirs = (
        json.loads(file.read_text())["metrics"]
        for file in (tmp_path / "other/mixtures.json", folder / "metrics.json")
    )
    assert ours == theirs

    again = push(composed("push", f"run={folder}", f"to={tmp_path}/again"))
    assert (again / "metrics.json").read_bytes() == (folder / "metrics.json").read_bytes()
    assert (again / "samples.png").read_bytes() == (folder / "samples.png").read_bytes()


class Own(CaptionedAudio):
    """Own data of sounds."""


def test_own_data_of_sounds_have_the_card_of_sounds(place, tmp_path):
    run, name = shutil.copytree(place / "run", tmp_path / "run"), f"{__name__}.Own"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("flowkit.data.CaptionedAudio", name))
    folder = push(composed("push", f"run={run}", f"to={tmp_path}/shared", f"trust=[{name}]"))
    assert "pipeline_tag: audio-to-audio" in (folder / "README.md").read_text()


def test_samples_take_the_mixtures_of_the_test_split(place, tmp_path):
    drawn = [f"run={place}/run", "sampler.grid=1", f"out={tmp_path}"]
    samples = sample(composed("sample", *drawn, "num_samples=2"))
    assert samples.shape == (2, 1, 20, 64)
    with Image.open(tmp_path / "samples.png") as picture:  # a row of two, gaps of two
        assert picture.size == (2 * (64 + 2) + 2, 20 + 4)


@pytest.mark.filterwarnings("ignore:.*sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["audio=none.wav", "query=violin"], "audio must be a file, got none.wav"),
        (["audio={place}/mix.wav"], "mix.wav and query=null; name the sound"),
        (["query=violin"], "query must be given with audio, and only then"),
        (["audio={place}/mix.wav", "query=' '"], "query must be a text or null"),
        (["audio={place}/mix.wav", "query="], "query must be a text or null, got an empty text"),
        (["audio={place}/clips/captions.csv", "query=a"], "captions.csv: Format not recognised; c"),
        (["audio={place}/mix.wav", "query=a", "overlap=20"], "overlap must"),
    ],
)
def test_wrong_settings_end_in_one_line(place, asked, message, monkeypatch, capsys):
    words = [word.format(place=place) for word in asked]
    assert status_of(["separate", f"run={place}/run", *words], monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("recipe", ["separate", "convert"])
def test_recordings_are_read_before_the_run(recipe, tmp_path):
    write_audio(torch.ones(16000) / 2, good := tmp_path / "good.wav")
    write_audio(torch.zeros(16000), tmp_path / "silent.wav")
    write_audio(torch.ones(4000) / 2, tmp_path / "short.wav")
    (tmp_path / "text.xyz").write_text("no sound")
    faults = {"none.wav": "must be a file", "silent.wav": "must not be silent"}
    faults |= {"text.xyz": "must be an audio file, .*: Format not recognised; convert it"}
    other = "query=violin" if recipe == "separate" else f"reference={good}"
    cases = [([f"audio={tmp_path}/{name}", other], "audio " + f) for name, f in faults.items()]
    if recipe == "convert":
        faults["short.wav"] = "must have at least 0.5 s"
        write_audio(torch.ones(100) / 2, tiny := tmp_path / "tiny.wav")
        words = r"audio must have at least 0\.1 s, got 0\.00625 s; record more"
        cases.append(([f"audio={tiny}", other], words))
        cases += [
            ([f"audio={good}", f"reference={tmp_path}/{name}"], "reference " + f)
            for name, f in faults.items()
        ]
    act = {"separate": separate, "convert": convert}[recipe]
    for given, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{message}"):
            act(composed(recipe, "run=no/run", *given))


def test_other_runs_and_other_parts_are_refused(place, tiny_run, tmp_path):
    with pytest.raises(TypeError, match="run must be trained on mixtures of sounds"):
        separate(composed("separate", f"run={tiny_run}"))
    other = shutil.copytree(place / "run", tmp_path / "run")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("floor: 0.001", "floor: 0.002"))
    with pytest.raises(ValueError, match=r"data.states must be that of the run's training, hash"):
        separate(composed("separate", f"run={other}", f"audio={place}/mix.wav", "query=a"))
    config.write_text(config.read_text().replace("floor: 0.002", "floor: 0.001"))
    separate(composed("separate", f"run={other}", f"audio={place}/mix.wav", "query=a"))


def test_pictures_of_sounds_need_sounds(tmp_path):
    cfg = composed("train", "callback=sounds", *TINY[:-1], f"run_dir={tmp_path}/run")
    with pytest.raises(TypeError, match=r"callback\.samples must be SampleGrid for data without"):
        train(cfg)


UNET = {
    "block_out_channels": "[8,16]",
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "down_block_types": "[DownBlock2D,CrossAttnDownBlock2D]",
    "up_block_types": "[CrossAttnUpBlock2D,UpBlock2D]",
    "sample_size": "[8,16]",
}


def test_the_published_network_has_188_million_parameters():
    cfg = composed("train", "experiment=flowsep_audiocaps", "data.root=r")
    with torch.device("meta"):
        network = instantiate(cfg.model)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(188, abs=0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_flow_on_latents_of_mels_trains_and_separates(place, tmp_path):
    data = ["data.frames=32", f"data.root={place}/clips", "batch_size=2", "data.eval_mixtures=4"]
    data += [f"data.query.path={place}/encoder", "trainer.max_steps=2", "trainer.accelerator=cpu"]
    data += ["logger.tensorboard=null", "trainer.enable_progress_bar=false"]
    mels = ["data=captioned_audio", "data.states.layout=image", "data.states.center=-4.75"]
    mels += ["data.states.spread=6.75", "vae.width=8", "vae.multipliers=[1,1,1]", *data]
    mels += ["vae.latent_channels=8", "num_scale_images=4", "num_samples=4", "metric=pixels"]
    network = autoencoder(composed("autoencoder", *mels, f"run_dir={tmp_path}/mels"))
    assert network.latent_shape((1, 32, 64)) == (8, 8, 16)
    small = [f"model.net.net.{key}={value}" for key, value in UNET.items()]
    small += ["callback.samples.rows=1", "callback.samples.sounds=0", "callback.ema.decay=0.9"]
    options = ["experiment=flowsep_audiocaps", f"autoencoder.path={tmp_path}/mels", *data, *small]
    module = train(composed("train", *options, f"run_dir={tmp_path}/run"))
    assert module.sample_shape == (8, 8, 16)
    assert module.velocity.net.net.config.in_channels == 16
    asked = [f"run={tmp_path}/run", f"audio={place}/mix.wav", "query=violin", "sampler.grid=1"]
    found = separate(composed("separate", *asked, f"out={tmp_path}/found"))
    assert found.shape == (30000,)
    assert found.abs().max() <= 0.41
    separate(composed("separate", *asked[:1], "num_mixtures=2", "sampler.grid=1"))
