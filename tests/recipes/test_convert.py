"""Train on speech and convert: pictures, sounds, records, same results again, wrong settings."""

import json
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from flowkit.audio import LogMel, PhoneRecognizer, VoiceVelocity, read_audio, write_audio
from flowkit.data import Digits
from flowkit.modules import Regression, load_run
from flowkit.provenance import tensor_hash
from flowkit.recipes.convert import convert
from flowkit.recipes.push import push
from flowkit.recipes.train import train
from flowkit.runs.learning import teach
from tests.audio.conftest import of_place, utterance, write_place, write_vocoder
from tests.conftest import CONF
from tests.recipes.conftest import TINY, status_of

SMALL = [*TINY[4:-1], "batch_size=4", "trainer.max_steps=4", "trainer.val_check_interval=2"]
SMALL += ["model.net.width=16", "model.net.depth=1", "model.net.heads=2", "model.net.frames=8"]
SMALL += ["logger.tensorboard=null", "data.eval_windows=3", "callback.samples.sounds=1"]
SMALL += ["data.frames=50"]
SMALL += ["data.reference=20", "data.num_workers=0"]
FAST = "vocoder.iterations=1"


def composed(recipe, *options):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(recipe, overrides=[str(option) for option in options])


def options(folder, experiment="takin_voices", phones="phones"):
    return [f"experiment={experiment}", "data=speech", *SMALL, *of_place(folder, phones)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with speech, and a run of four steps on it."""
    folder = write_place(tmp_path_factory.mktemp("speech"))
    train(composed("train", *options(folder), f"run_dir={folder}/run"))
    return folder


def test_training_shows_reference_source_and_sample(place):
    folder = place / "run/samples"
    assert sorted(p.name for p in folder.glob("*.png")) == ["step-000002.png", "step-000004.png"]
    heard = {p.name: read_audio(p) for p in (folder / "step-000004").iterdir()}
    assert set(heard) == {"0-reference.wav", "0-source.wav", "0-sample.wav"}
    assert {len(wave) for wave in heard.values()} == {19 * 160, 49 * 160}
    record = json.loads((place / "run/data.json").read_text())
    assert set(record["preprocessing"]) == {"states", "speaker"}


@pytest.mark.filterwarnings("ignore:.*sys.modules:RuntimeWarning")
def test_a_shared_model_takes_the_encoder_of_voices(place, tmp_path, monkeypatch, capsys):
    folder = push(composed("push", f"run={place}/run", f"to={tmp_path}/shared"))
    text = (folder / "config.json").read_text()
    assert str(place) not in text
    assert "recognition" not in json.loads(text)["data"]  # of the training alone
    asked = [f"audio={place}/source.wav", f"reference={place}/voice.wav", FAST, "sampler.grid=1"]
    convert(composed("convert", f"run={place}/run", *asked, f"out={tmp_path}/own"))
    shared = ["convert", f"run={folder}", *asked, f"out={tmp_path}/other"]
    assert status_of(shared, monkeypatch) == 2
    assert "data.speaker.path must be given for a shared model" in capsys.readouterr().err
    assert status_of([*shared, f"data.speaker.path={place}/weights.pt"], monkeypatch) == 0
    assert torch.equal(*(read_audio(tmp_path / f"{x}/converted.wav") for x in ("own", "other")))


@pytest.mark.slow
def test_the_run_stands_alone_and_its_recognizer_is_the_given_one(place, tmp_path):
    """Without the file of the recognizer, and without the speech."""
    given = PhoneRecognizer.load(place / "phones.safetensors")
    run = shutil.copytree(place / "run", tmp_path / "run")
    config = run / "config.yaml"
    text = config.read_text().replace(f"{place}/phones", "gone/phones")
    config.write_text(text.replace(f"{place}/speech", "gone/speech"))
    velocity = load_run(run).velocity
    assert isinstance(velocity, VoiceVelocity)
    for name, value in given.state_dict().items():
        assert torch.equal(velocity.content.state_dict()[name], value)
    asked = [f"audio={place}/source.wav", f"reference={place}/voice.wav", "sampler.grid=1", FAST]
    found = convert(composed("convert", f"run={run}", *asked, f"out={tmp_path}/found"))
    own = convert(composed("convert", f"run={place}/run", *asked, f"out={tmp_path}/own"))
    assert torch.equal(found, own)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(place, tmp_path):
    short = [*options(place), "trainer.max_steps=2", f"run_dir={tmp_path}/run"]
    train(composed("train", *short, "~lr_scheduler"))
    again = [*options(place), f"run_dir={tmp_path}/run", f"resume={tmp_path}/run"]
    train(composed("train", *again, "~lr_scheduler"))
    train(composed("train", *options(place), f"run_dir={tmp_path}/whole", "~lr_scheduler"))
    ours, theirs = (load_run(tmp_path / name).state_dict() for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_recording_is_converted_and_recorded(place, tmp_path):
    asked = [f"run={place}/run", f"audio={place}/source.wav", f"reference={place}/voice.wav"]
    asked += ["sampler.grid=2", "overlap=8", f"out={tmp_path}", FAST]
    first = convert(composed("convert", *asked))
    assert first.shape == (19200,)
    written = read_audio(tmp_path / "converted.wav")
    torch.testing.assert_close(written, first / first.abs().max().clamp_min(1), atol=1e-4, rtol=0)
    record = json.loads((tmp_path / "converted.json").read_text())
    assert record["sampling"]["guidance"] == 1.7
    assert record["sampling"]["audio_seconds"] == 1.2
    assert record["sampling"]["vocoder"]["_target_"] == "flowkit.audio.GriffinLim"
    known = json.loads((place / "run/data.json").read_text())["preprocessing"]
    assert {name: record[name] for name in known} == known
    assert record["recognizer"] == PhoneRecognizer.load(place / "phones.safetensors").hash
    assert torch.equal(convert(composed("convert", *asked)), first)
    assert not (tmp_path / "converted-1.json").exists()  # only the seconds differ
    other = convert(composed("convert", *asked, "guidance=1"))
    assert not torch.equal(first, other)
    assert torch.equal(read_audio(tmp_path / "converted-1.wav"), written)
    voice = convert(composed("convert", *asked[:2], f"reference={place}/source.wav", *asked[3:]))
    assert not torch.equal(first, voice)
    assert (tmp_path / "converted-2.json").exists()  # of guidance=1, in the voice of before


def test_the_weights_of_a_vocoder_are_recorded(place, tmp_path):
    net = write_vocoder(tmp_path / "vocoder", LogMel())
    asked = [f"run={place}/run", f"audio={place}/source.wav", f"reference={place}/voice.wav"]
    asked += ["sampler.grid=1", "vocoder=hifigan", f"vocoder.path={tmp_path}/vocoder"]
    convert(composed("convert", *asked, f"out={tmp_path}/out"))
    record = json.loads((tmp_path / "out/converted.json").read_text())
    assert record["vocoder"] == tensor_hash(net.state_dict())


@pytest.mark.slow
def test_test_pairs_are_measured(place, tmp_path):
    asked = [f"run={place}/run", "sampler.grid=1", f"out={tmp_path}", "num_pairs=2", "words=false"]
    asked.append(FAST)
    waves = convert(composed("convert", *asked))
    record = json.loads((tmp_path / "pairs.json").read_text())
    assert record["metrics"]["num_pairs"] == len(waves) == 2
    assert record["metrics"]["mcd"] > 0
    assert -1 <= record["metrics"]["similarity_to_target"] <= 1
    assert record["data"]["name"] == "SpeechFolder"
    for k in range(2):
        answer = read_audio(tmp_path / f"pairs-answer-{k}.wav")
        scaled = waves[k] / waves[k].abs().max().clamp_min(1)
        torch.testing.assert_close(answer, scaled, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["audio=none.wav", "reference={place}/voice.wav"], "audio must be a file, got none.wav"),
        (["audio={place}/source.wav"], "reference must be given with audio, and only then"),
        (["reference={place}/voice.wav"], "reference must be given with audio, and only then"),
        (["audio={place}/source.wav", "reference={place}/short.wav"], "reference must have at"),
        (
            ["audio={place}/weights.pt", "reference={place}/voice.wav"],
            "audio must be an audio file",
        ),
        (["audio={place}/source.wav", "reference={place}/voice.wav", "overlap=50"], "overlap must"),
        (["vocoder=hifigan", "vocoder.path={place}", "num_pairs=1"], "vocoder.path must hold a"),
        (["targets=[nobody]", "words=false"], "each of targets must be"),
    ],
)
def test_wrong_settings_end_in_one_line(place, asked, message, monkeypatch, capsys):
    write_audio(utterance(0, 0, 0.3), place / "short.wav")
    words = [word.format(place=place) for word in asked]
    assert status_of(["convert", f"run={place}/run", *words], monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_other_runs_and_other_parts_are_refused(place, tiny_run, tmp_path):
    with pytest.raises(TypeError, match="run must be trained on speech"):
        convert(composed("convert", f"run={tiny_run}"))
    other = shutil.copytree(place / "run", tmp_path / "run")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("floor: 1.0e-05", "floor: 1.0e-06"))
    with pytest.raises(ValueError, match=r"data.states must be that of the run's training, hash"):
        convert(composed("convert", f"run={other}"))
    with pytest.raises(ValueError, match="data must be speech for a voice, got Digits"):
        teach(load_run(place / "run").velocity, Digits())


@pytest.mark.slow
def test_a_regression_of_the_same_network_is_trained(place, tmp_path):
    given = [*options(place), "module=regression", "~module.drop_cond", "guidance=null"]
    module = train(composed("train", *given, f"run_dir={tmp_path}/run"))
    assert isinstance(module, Regression)
    asked = [f"run={tmp_path}/run", "num_pairs=1", "words=false", FAST]
    first = convert(composed("convert", *asked))[0]
    assert torch.equal(first, convert(composed("convert", *asked, "seed=1"))[0])  # without noise


@pytest.mark.slow
def test_the_large_experiment_trains_a_step_on_its_layout(place, tmp_path):
    given = [*options(place, "takin_libritts", "phones80"), f"run_dir={tmp_path}/run"]
    module = train(composed("train", *given, "trainer.max_steps=1"))
    assert module.sample_shape == (80, 50)


def test_parameters_of_the_large_experiment():
    cfg = composed("train", "experiment=takin_libritts", "data.root=r")
    cfg.network.shape, cfg.network.frames = [80, 256], 80
    cfg.network.vector, cfg.network.tokens = 256, 80
    with torch.device("meta"):
        network = instantiate(cfg.model)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(75.9, abs=0.1)
