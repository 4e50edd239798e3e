"""Embeddings of voices, words and phones, measures of speech, and vocoders."""

import shutil

import pytest
import torch

from flowkit.audio import (
    GriffinLim,
    HiFiGAN,
    LogMel,
    SpeakerEncoder,
    check_reference,
    griffin_lim,
    hear,
    leveled,
    mel_cepstral_distortion,
    variance_ratio,
)
from flowkit.audio.listening import align, phones_at
from flowkit.provenance import tensor_hash
from tests.audio.conftest import utterance, write_vocoder, write_voice_weights

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return SpeakerEncoder(write_voice_weights(tmp_path_factory.mktemp("voice") / "weights.pt"))


@pytest.mark.parametrize("seconds", [0.3, 1.59, 1.6, 3.7])
def test_embeddings_are_those_of_the_package(seconds, encoder):
    audio_utils = pytest.importorskip("transformers.audio_utils")
    voice_encoder = pytest.importorskip("resemblyzer.voice_encoder")
    wave = utterance(1, 3, seconds)
    wave = wave * (10**-1.5 / wave.square().mean().sqrt())
    filters = audio_utils.mel_filter_bank(201, 40, 0.0, 8000.0, 16000, "slaney", "slaney")

    def spectrogram(values):  # its own is by librosa, which compiles for a minute
        options = {"power": 2.0, "pad_mode": "constant", "mel_filters": filters}
        window = audio_utils.window_function(400, "hann")
        return audio_utils.spectrogram(values, window, 400, 160, **options).astype("float32").T

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(voice_encoder.audio, "wav_to_mel_spectrogram", spectrogram)
        theirs = voice_encoder.VoiceEncoder("cpu", False, encoder.path)
        expected = torch.from_numpy(theirs.embed_utterance(wave.numpy()))
    torch.testing.assert_close(encoder([wave])[0], expected, atol=1e-4, rtol=0)


def test_embeddings_ignore_the_level_and_refuse_silence(encoder):
    wave = utterance(0, 0)
    quiet, loud, other = encoder([0.01 * wave, wave, utterance(1, 0, 2.0)])
    torch.testing.assert_close(quiet, loud, atol=1e-5, rtol=0)
    assert quiet.norm() == pytest.approx(1, abs=1e-5)
    assert (loud - other).norm() > 0.05
    with pytest.raises(ValueError, match="voice must not be silent"):
        encoder([torch.zeros(16000)])


def test_the_hash_and_other_weights(encoder, tmp_path, monkeypatch):
    assert SpeakerEncoder(encoder.path).hash == encoder.hash
    torch.save({"model_state": {"linear.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"speaker\.path must hold weights of resemblyzer"):
        _ = SpeakerEncoder(tmp_path / "other.pt").hash
    with pytest.raises(FileNotFoundError, match=r"speaker\.path must be a file, got none\.pt"):
        _ = SpeakerEncoder("none.pt").hash
    monkeypatch.setattr("flowkit.audio.speakers.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"resemblyzer must be installed.*'\.\[voices\]'"):
        _ = SpeakerEncoder().hash


def test_recordings_have_one_level():
    wave = utterance(0, 0)
    torch.testing.assert_close(leveled(7 * wave), leveled(wave))
    assert leveled(wave).square().mean().sqrt() == pytest.approx(0.05)
    with pytest.raises(ValueError, match="audio must not be silent"):
        leveled(torch.zeros(9))
    check_reference(torch.zeros(8000), 16000)
    with pytest.raises(ValueError, match=r"reference must have at least 0\.5 s, got 0\.49 s"):
        check_reference(torch.zeros(7900), 16000)


def test_a_time_has_the_phone_that_is_said_then():
    segments = [(0, 0.1), (5, 0.25), (7, 0.3)]
    found = phones_at(segments, torch.tensor([0.0, 0.0999, 0.1, 0.24, 0.26, 0.3, 9.0]))
    assert found.tolist() == [0, 0, 5, 5, 7, 0, 0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("flite") is None, reason="no flite")
def test_words_and_phones_of_a_voice_are_recognized():
    pytest.importorskip("pocketsphinx")
    from flowkit.data.voices import speak

    text = "The old dog sleeps near the warm fire."
    said = speak("rms", [text])
    wave = said["wave 0"] / 2**15
    assert hear([wave])[0].split()[:4] == ["the", "old", "dog", "sleeps"]
    times = torch.arange(len(wave) // 160) * 0.01
    true = phones_at([(p, end / 1000) for p, end in said["phones 0"].tolist()], times)
    found = align(wave, text)
    assert (phones_at(found, times) == true).float().mean() > 0.75
    assert align(wave, "the grumblefrotz") is None
    assert align(wave, "...") is None


def test_a_missing_recognizer_names_its_extra(monkeypatch):
    from flowkit.audio import listening

    monkeypatch.setitem(__import__("sys").modules, "pocketsphinx", None)
    listening._decoder.cache_clear()
    with pytest.raises(ImportError, match=r"pocketsphinx must be installed.*'\.\[voices\]'"):
        hear([torch.ones(100)])


# --- measures and vocoders --------------------------------------------------------------------


def test_equal_speech_has_no_distortion_and_the_same_variance():
    log_mel = torch.randn(64, 30, generator=GENERATOR)
    assert mel_cepstral_distortion(log_mel, log_mel) == 0
    assert variance_ratio(log_mel + 4, log_mel) == pytest.approx(1)
    assert variance_ratio(0.5 * log_mel.repeat(1, 2), log_mel) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="target must change over time"):
        variance_ratio(log_mel, torch.ones(64, 3))


def test_vocoders(tmp_path):
    mel = LogMel()
    log_mels = mel(torch.stack([utterance(0, 0, 0.2), utterance(1, 0, 0.2)]))
    expected = griffin_lim(log_mels, mel, iterations=3)
    assert torch.equal(GriffinLim(3)(log_mels, mel), expected)
    net = write_vocoder(tmp_path, mel)
    with torch.no_grad():
        single = net(log_mels[1].mT)
    found = HiFiGAN(tmp_path)(log_mels, mel)
    torch.testing.assert_close(found[1], single, atol=1e-5, rtol=0)
    assert found.shape == (2, log_mels.shape[-1] * 160)
    assert HiFiGAN(tmp_path).hash == tensor_hash(net.state_dict())
    for other, message in (
        (LogMel(floor=1e-6), "log-mels of hash"),
        (LogMel(hop=256), "log-mels of hop 256, got 160"),
        (LogMel(n_mels=60), "log-mels of n_mels 60, got 64"),
    ):
        with pytest.raises(ValueError, match=f"vocoder must be trained on {message}"):
            HiFiGAN(tmp_path)(log_mels, other)
    with pytest.raises(FileNotFoundError, match=r"vocoder\.path must be a folder"):
        HiFiGAN(tmp_path / "none")(log_mels, mel)
