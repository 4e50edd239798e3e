"""Windows of speech: whose they are, their references and masks, test pairs, folders and voices."""

import math
import shutil

import pytest
import torch

from flowkit.audio import LogMel, MelStates, Recognition, SpeakerEncoder
from flowkit.audio.listening import PHONES
from flowkit.data import SpeechFolder, SyntheticVoices
from flowkit.data.broken import BrokenFiles
from flowkit.data.sentences import SENTENCES
from flowkit.data.speech import Windows
from flowkit.data.speech_folder import find_recordings, speaker_of, subsets, text_of
from flowkit.data.voices import VOICES, speak
from tests.audio.conftest import utterance, write_speech, write_voice_weights

STATES = MelStates(LogMel())
FLITE = pytest.mark.skipif(shutil.which("flite") is None, reason="no flite")


class Tones:
    """Three speakers of a frequency each say four texts, all longer than half a second."""

    names = ("low", "middle", "high")
    speakers = tuple(k for k in range(3) for _ in range(4))
    texts = tuple(f"text {k}" for _ in range(3) for k in range(4))
    pitches = (437.5, 1750.0, 3500.0)

    def wave(self, number):
        speaker, text = divmod(number, 4)
        samples = (8000, 9600, 9600, 8800)[text]
        time = torch.arange(samples) / 16000
        tone = torch.sin(2 * math.pi * self.pitches[speaker] * time)
        return 0.3 * tone * (1 + 0.5 * torch.sin(2 * math.pi * (2 + text) * time))

    def segments(self, number):
        return [(number % 4, 1.0)]

    def fingerprint(self):
        return "tones"


def embed(waves):
    """The energies at the three frequencies, as vectors of length 1."""
    found = []
    for wave in waves:
        time = torch.arange(len(wave)) / 16000
        angles = 2 * math.pi * time * torch.tensor(Tones.pitches)[:, None]
        own = torch.stack([(wave * torch.cos(angles)).mean(1), (wave * torch.sin(angles)).mean(1)])
        found.append(torch.nn.functional.normalize(own.norm(dim=0), dim=0))
    return torch.stack(found)


def windows(size=40, utterances=None, name="train", frames=58, reference=20):
    return Windows(utterances or Tones(), size, (name, 0), STATES, embed, frames, reference)


def speakers_of(states):
    """Speakers by the loudest band of states ``(B, n_mels, T)``."""
    tones = torch.stack([STATES.of_waves(Tones().wave(4 * k)[None])[0].mean(1) for k in range(3)])
    return states.amax(2).argmax(1)[:, None].eq(tones.argmax(1)).int().argmax(1)


def test_a_window_comes_with_another_utterance_of_its_speaker():
    split = windows(60)
    batch = split[:60]
    cond, speakers = batch["cond"], speakers_of(batch["x1"])
    assert len(speakers.unique()) == 3
    assert torch.equal(cond["frames"], batch["x1"])
    assert torch.equal(cond["vector"].argmax(1), speakers)
    assert torch.equal(speakers_of(cond["tokens"].mT), speakers)
    for k in range(60):
        window, reference, other = split._draw(k)
        own = STATES.of_waves(split.wave(other)[None])[0]
        # the reference is a part of the other utterance, and the window is not
        assert split.utterances.speakers[other] == speakers[k]
        assert cond["vector"][k].equal(embed([split.utterances.wave(other)])[0])
        size = int(window[1].sum())
        if own.shape[1] >= size:
            same = (own.unfold(1, size, 1) - window[0][:, None, :size]).abs().amax((0, 2))
            assert same.min() > 1e-2
        assert reference[1].all()


def test_short_utterances_are_padded_with_silence_under_masks():
    batch = windows(60)[:60]
    mask = batch["cond"]["frame_mask"]
    sizes = mask.sum(1)
    assert set(sizes.tolist()) == {51, 56, 58}  # 8000, 8800 and more samples
    assert torch.equal(batch["mask"], mask[:, None].float())
    padding = batch["x1"].mT[~mask]
    torch.testing.assert_close(padding, torch.full_like(padding, STATES.silence))
    levels = batch["x1"].mT[mask].amax(1)
    assert (levels > STATES.silence + 1).all()
    short = windows(60, reference=60)[:60]["cond"]
    assert set(short["token_mask"].sum(1).tolist()) == {51, 56, 60}


def test_a_window_is_a_part_of_the_spectrogram_of_the_whole():
    """Also its first and last frames, which hear samples beyond the window."""
    split = windows()
    whole = STATES.of_waves(split.wave(1)[None])[0]
    firsts = [split._window(1, 30, place)[0] for place in (0.0, 0.4, 0.999)]
    starts = [int(place * (whole.shape[1] - 30 + 1)) for place in (0.0, 0.4, 0.999)]
    assert starts[-1] == whole.shape[1] - 30
    for found, start in zip(firsts, starts, strict=True):
        torch.testing.assert_close(found, whole[:, start : start + 30])


def test_a_window_is_a_function_of_its_number():
    first, second = windows(), windows()
    torch.testing.assert_close(first[[7, 3]]["x1"][1], second[[3]]["x1"][0], atol=0, rtol=0)
    assert not torch.equal(first[[3]]["x1"], windows(name="val")[[3]]["x1"])
    assert first.fingerprint() == second.fingerprint()
    assert first.fingerprint() != windows(frames=59).fingerprint()


def test_pairs_are_of_two_voices_and_know_the_truth():
    split = windows()
    utterances, pairs = split.utterances, split.pairs(50)
    for pair in pairs:
        source, target = (utterances.speakers[k] for k in (pair.source, pair.reference))
        assert source != target == utterances.speakers[pair.truth]
        assert utterances.texts[pair.truth] == utterances.texts[pair.source]
        assert utterances.texts[pair.reference] != utterances.texts[pair.source]
    assert pairs[:9] == split.pairs(9)
    assert len({(p.source, p.reference) for p in pairs}) > 30

    name = utterances.names[1]
    chosen = split.pairs(30, [name])
    assert {utterances.speakers[pair.reference] for pair in chosen} == {1}
    assert {utterances.speakers[pair.source] for pair in chosen} == {*utterances.speakers} - {1}
    assert split.pairs(9, utterances.names) == pairs[:9]
    with pytest.raises(ValueError, match=f"each of targets must be .*{name}.*, got 'nobody'"):
        split.pairs(1, [name, "nobody"])
    with pytest.raises(ValueError, match="number of targets must be at least 1, got 0"):
        split.pairs(1, [])

    class Unknown(Tones):
        texts = (None,) * 12

    assert {pair.truth for pair in windows(utterances=Unknown()).pairs(20)} == {None}

    class One(Tones):
        speakers = (0,) * 12

    with pytest.raises(ValueError, match="number of speakers must be at least 2, got 1"):
        windows(utterances=One()).pairs(1)


# --- folders ----------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    return SpeakerEncoder(write_voice_weights(tmp_path / "weights.pt"))


def folder_data(root, weights, **settings):
    return SpeechFolder(STATES, weights, root, eval_windows=6, **settings)


def test_a_folder_in_the_layout_of_libritts(tmp_path, weights):
    data = folder_data(write_speech(tmp_path / "speech"), weights)
    data.setup()
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        own = data.listed(split).utterances
        assert [own.names[k] for k in own.speakers] == ["84"] * count + ["85"] * count
        assert own.texts == [f"say number {k}" for k in range(count)] * 2
    assert data.hashes() == {"states": STATES.hash, "speaker": weights.hash}
    assert data.record()["files"]["dev-clean/84/7/84_7_000001.wav"][1] == "val"
    test = data.listed("test")
    torch.testing.assert_close(
        test.wave(4) / test.wave(4).std(), (w := utterance(1, 1, 0.8)) / w.std(), atol=1e-3, rtol=0
    )
    assert all(pair.truth is not None for pair in test.pairs(5))


def test_a_speaker_of_one_utterance_cannot_be_its_own_reference(tmp_path, weights):
    root = write_speech(tmp_path / "speech")
    for file in sorted(root.glob("train-clean/85/**/*.wav"))[1:]:
        file.unlink()
    with pytest.raises(ValueError, match=r"2 utterances of each speaker .*, got 1 of 85"):
        folder_data(root, weights).setup()


def test_a_folder_in_the_layout_of_vctk(tmp_path, weights):
    soundfile = pytest.importorskip("soundfile")
    root = tmp_path / "vctk"
    for speaker, name in enumerate(("p225", "p226")):
        (root / "wav48" / name).mkdir(parents=True)
        (root / "txt" / name).mkdir(parents=True)
        for k in range(20):
            wave = utterance(speaker, k, 0.7, 48000).numpy()
            for mic in ("mic1", "mic2"):
                soundfile.write(root / f"wav48/{name}/{name}_{k:03d}_{mic}.flac", wave, 48000)
            (root / f"txt/{name}/{name}_{k:03d}.txt").write_text(f"words {k}")
    short = utterance(0, 0, 0.4, 48000).numpy()
    soundfile.write(root / "wav48/p225/p225_099_mic1.flac", short, 48000)
    files = find_recordings(root)
    assert len(files) == 41
    assert not any("mic2" in name for name in files)
    data = folder_data(root, weights, val_fraction=0.2, test_fraction=0.2)
    data.setup()
    assert "1 recordings below 0.5 s left out" in data.summary()
    assert sum(len(data.listed(split).utterances.texts) for split in ("train", "val", "test")) == 40
    own = data.listed("train").utterances
    for k, file in enumerate(own.files):
        assert own.texts[k] == f"words {int(file[-13:-10])}"
        assert own.names[own.speakers[k]] == file.split("/")[1]
    assert abs(len(own.wave(0)) - 0.7 * 16000) <= 1


def test_recordings_of_other_rates_and_channels_and_broken_ones(tmp_path, weights):
    soundfile = pytest.importorskip("soundfile")
    root = write_speech(tmp_path / "speech")
    place = root / "train-clean/84/7"
    wave = utterance(0, 9, 1.0, 44100)
    soundfile.write(place / "84_7_000097.wav", torch.stack([wave, 0.5 * wave], 1).numpy(), 44100)
    soundfile.write(place / "84_7_000098.wav", utterance(0, 9, 1.0, 8000).numpy(), 8000)
    data = folder_data(root, weights)
    data.setup()
    own = data.listed("train")
    stereo, low = (
        own.wave(own.utterances.files.index(f"train-clean/84/7/84_7_0000{k}.wav")) for k in (97, 98)
    )
    error = (stereo[800:-800] - low[800:-800]).square().mean() / low.square().mean()
    assert error < 0.02  # the same tone at either rate, of one level
    for values, message in (
        (torch.zeros(9000), "audio must not be silent, got only zeros in .*84_7_000099.wav"),
        (torch.full((9000,), math.nan), "audio must be finite, got NaN .*84_7_000099.wav"),
    ):
        soundfile.write(place / "84_7_000099.wav", values.numpy(), 16000, subtype="FLOAT")
        broken = folder_data(root, weights)
        broken.setup()
        row = broken.listed("train").utterances.files.index("train-clean/84/7/84_7_000099.wav")
        with pytest.raises(ValueError, match=message):
            broken.listed("train").wave(row)
    (place / "84_7_000099.wav").write_text("no sound")
    soundfile.write(place / "84_7_000096.wav", torch.zeros(0).numpy(), 16000)
    named = r"000096\.wav \(no samples\); .*000099\.wav \(Format not recognised\); remove"
    with pytest.raises(
        BrokenFiles, match=r"audio files must be readable, got 2 broken: .*" + named
    ):
        folder_data(root, weights).setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="root must hold recordings"):
        folder_data(tmp_path / "empty", weights).setup()


def test_speakers_texts_and_subsets_by_name(tmp_path):
    assert speaker_of("LibriSpeech/dev/84-121/84-121-0001.flac") == "84-121"
    assert speaker_of("a.wav") == ""
    (tmp_path / "b.lab").write_text("  two\nlines ")
    assert text_of(tmp_path, "b.wav") == "two lines"
    assert text_of(tmp_path, "c.wav") is None
    assert subsets(["dev-clean/1/1_1.wav"]) is None


def test_a_recognizer_needs_texts_or_a_file(tmp_path, weights, monkeypatch):
    root = write_speech(tmp_path / "speech")
    for file in root.rglob("*.txt"):
        file.unlink()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = folder_data(root, weights)
    data.setup()
    with pytest.raises(ValueError, match=r"data must have texts .*data\.recognition\.path"):
        _ = data.recognizer


def test_a_recognizer_learns_the_phones_of_the_frames(tmp_path, weights, monkeypatch):
    """Of tones whose text is their phone, at the level of all speech."""

    class Data(SpeechFolder):
        def utterances(self):
            return {split: Tones() for split in ("train", "val", "test")}

    seen = []
    monkeypatch.setattr(
        Recognition, "recognizer", lambda self, speech, states: seen.append((speech, states))
    )
    data = Data(STATES, weights, tmp_path)
    data.setup()
    _ = data.recognizer
    (speech, states) = seen[0]
    assert states == STATES.hash
    tones = Tones()
    expected = {k: STATES.of_waves(data.train.wave(k)[None])[0] for k in range(12)}
    for own, phones in zip(*speech.utterances, strict=True):
        (number,) = [k for k, x in expected.items() if x.shape == own.shape and torch.equal(x, own)]
        assert phones.unique().tolist() == [tones.segments(number)[0][0]]
        assert len(phones) == own.shape[1]


# --- voices -----------------------------------------------------------------------------------


def test_sentences_are_many_short_and_different():
    assert len(set(SENTENCES)) == len(SENTENCES) == 479
    assert max(len(text.split()) for text in SENTENCES) <= 10


@FLITE
def test_voices_read_the_same_new_sentences(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = {"voices": ["kal16", "rms"], "sentences": 5, "unseen": ["rms"]}
    data = SyntheticVoices(STATES, weights, **settings)
    data.setup()
    parts = data.parts
    assert sorted(k for part in parts.values() for k in part) == list(range(5))
    train, test = (data.listed(split).utterances for split in ("train", "test"))
    assert train.texts == [SENTENCES[k] for k in parts["train"]]
    assert set(train.speakers) == {0}
    assert test.texts == [SENTENCES[k] for k in parts["test"]] * 2
    assert sorted(set(test.speakers)) == [0, 1]
    segments = test.segments(len(parts["test"]))
    assert PHONES[segments[0][0]] == "sil"
    assert segments[-1][1] == pytest.approx(len(test.waves[-1]) / 16000, abs=0.1)
    wave = test.wave(len(parts["test"]))
    silent = wave[: int(16000 * (segments[0][1] - 0.03))].square().mean()
    assert silent < 0.01 * wave.square().mean()
    monkeypatch.setattr("flowkit.data.voices.speak", None)  # the second time they are only read
    again = SyntheticVoices(STATES, weights, **settings)
    again.setup()
    assert again.fingerprint("train") == data.fingerprint("train")
    again.listed("train").utterances.phones[0][0, 1] += 1  # of the end of a phone, in ms
    assert again.listed("train").utterances.fingerprint() != train.fingerprint()
    other = SyntheticVoices(STATES, weights, **{**settings, "unseen": []})
    other.setup()
    assert set(other.listed("train").utterances.speakers) == {0, 1}


@FLITE
@pytest.mark.parametrize("voice", VOICES)
def test_phones_are_where_they_sound(voice):
    """High bands are loudest within the sibilants, at most 30 ms away."""
    sibilants = torch.tensor([PHONES.index(phone) for phone in ("s", "z", "sh", "ch")])
    said = speak(voice, SENTENCES[:12])
    products = torch.zeros(25)
    for k in range(12):
        wave, (phones, ends) = said[f"wave {k}"], said[f"phones {k}"].T
        assert (ends.diff() >= 0).all()
        assert 0.98 * len(wave) / 16 <= ends[-1] <= len(wave) / 16 + 1
        x = STATES.of_waves(wave[None] / 2**15)[0]
        high = x[48:].mean(0) - x[:20].mean(0)
        times = 10 * torch.arange(x.shape[-1])
        for shift in range(-12, 13):
            rows = torch.searchsorted(ends.contiguous(), times - 10 * shift)
            inside = torch.isin(phones[rows.clamp(max=len(ends) - 1)], sibilants)
            products[shift + 12] += ((high - high.mean()) * inside).sum()
    assert abs(products.argmax() - 12) <= 3


@FLITE
def test_another_voice_is_not_taken_for_a_missing_one():
    with pytest.raises(RuntimeError, match="flite must have the voice nobody, got Voices"):
        speak("nobody", ["Hello."])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"voices": ["rms"]}, "voices must be at least 2 different names"),
        ({"voices": ["rms", "rms"]}, "voices must be at least 2 different names"),
        ({"unseen": ["me"]}, r"unseen must be among the voices .* got \['me'\]"),
        ({"voices": ["rms", "slt"], "unseen": ["rms", "slt"]}, "unseen must leave a voice"),
        ({"sentences": 3}, r"sentences must lie in \[4, \d+\], got 3"),
        ({"frames": 7}, "frames must be at least 8"),
        ({"reference": 7}, "reference must be at least 8"),
        ({"states": MelStates(LogMel(), layout="image")}, "states.layout must be sequence"),
        ({"states": MelStates(LogMel(22050))}, r"states\.mel\.rate must be 16000"),
    ],
)
def test_wrong_settings_are_refused(settings, message, weights):
    with pytest.raises(ValueError, match=message):
        SyntheticVoices(**{"states": STATES, "speaker": weights, **settings})


def test_a_missing_synthesizer_is_named(monkeypatch):
    monkeypatch.setattr("flowkit.data.voices.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="flite must be installed, got none; apt-get"):
        speak("rms", ["Hello."])
