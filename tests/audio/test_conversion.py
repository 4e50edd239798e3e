"""Conversion by a run: recordings of any length, references, noise by frame, and measures."""

import math
from types import SimpleNamespace

import pytest
import torch

from flowkit.audio import GriffinLim, LogMel, MelStates, frame_noise, leveled
from flowkit.runs.conversion import Converter, measure
from flowkit.sampling import ODESampler
from tests.data.test_speech import Tones, embed, windows

STATES, SIZE = MelStates(LogMel()), 40


class Module:
    """A flow that answers by a function of the noise and the condition."""

    autoencoder = SimpleNamespace(decode=lambda states: states)

    def __init__(self, answer):
        self.answer, self.conds, self.guidance = answer, [], []

    def solve(self, x0, sampler, cond, guidance):
        self.conds.append(cond)
        self.guidance.append(guidance)
        return SimpleNamespace(x=self.answer(x0, cond))


def converter(answer, states=STATES, vocoder=None, split=None):
    run = SimpleNamespace(module=Module(answer), guidance=1.7)
    data = SimpleNamespace(
        states=states, frames=SIZE, reference=30, speaker=embed, listed=lambda name: split
    )
    return Converter(run, data, ODESampler(1), vocoder or GriffinLim(2))


def melody(seconds):
    time = torch.arange(int(16000 * seconds)) / 16000
    return 0.3 * torch.sin(2 * math.pi * 220 * time * (1 + 0.1 * torch.sin(3 * time)))


@pytest.mark.parametrize("seconds", [0.3, 0.405, 47.0])
@pytest.mark.parametrize("overlap", [0, 13])
def test_the_source_is_a_fixed_point_at_any_length(seconds, overlap):
    wave, one = melody(seconds), converter(lambda x0, cond: cond["frames"])
    one = Converter(one.run, one.data, one.sampler, lambda log_mel, mel: melody(50)[None])
    found, log_mel = one.convert(wave, melody(1.0), 0, overlap)
    torch.testing.assert_close(log_mel, STATES.mel(leveled(wave)[None])[0], atol=1e-4, rtol=0)
    assert torch.equal(found, melody(50)[: len(wave)])
    conds, step = one.run.module.conds, SIZE - overlap
    frames = STATES.mel.frames(len(wave))
    assert len(conds) == 1 + max(0, math.ceil((frames - SIZE) / step))
    last = (len(conds) - 1) * step
    assert conds[-1]["frame_mask"].sum() == frames - last
    assert one.run.module.guidance == [1.7] * len(conds)


def test_the_level_of_source_and_reference_is_no_matter():
    def answer(x0, cond):
        return cond["frames"] + cond["tokens"].mean((1, 2))[:, None, None]

    first = converter(answer).convert(melody(1.0), melody(0.8), 0, 10)[1]
    second = converter(answer).convert(9 * melody(1.0), 0.02 * melody(0.8), 0, 10)[1]
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)


def test_the_noise_belongs_to_the_frames():
    loud = MelStates(LogMel(), center=0.0, spread=1.0)
    one = converter(lambda x0, cond: x0, loud)
    _, log_mel = one.convert(melody(1.0), melody(1.0), 3, 10)
    torch.testing.assert_close(log_mel, frame_noise(64, 0, 101, 3), atol=1e-5, rtol=0)


def test_a_reference_gives_its_embedding_and_its_middle():
    one, reference = converter(lambda x0, cond: x0), melody(1.0)
    voice = one.voice(reference)
    assert torch.equal(voice["vector"], embed([reference]))
    whole = STATES.of_waves(leveled(reference)[None])[0]
    torch.testing.assert_close(voice["tokens"][0], whole[:, 35:65].mT)
    assert voice["token_mask"].all()
    assert one.voice(melody(0.5))["tokens"].shape == (1, 30, 64)
    for short in (0.3, 0.499):
        with pytest.raises(ValueError, match="reference must have at least"):
            one.convert(melody(1.0), melody(short), 0, 10)
    with pytest.raises(ValueError, match="audio must not be silent"):
        one.convert(torch.zeros(9000), melody(1.0), 0, 10)
    for overlap in (-1, SIZE):
        with pytest.raises(ValueError, match="overlap must"):
            one.convert(melody(1.0), melody(1.0), 0, overlap)


class Echo:
    """Vocoder that returns the wave of a known log-mel."""

    def __init__(self, waves):
        self.known = [(STATES.mel(wave[None])[0], wave) for wave in waves]

    def __call__(self, log_mels, mel):
        (wave,) = [
            wave
            for known, wave in self.known
            if known.shape == log_mels[0].shape and (known - log_mels[0]).abs().mean() < 0.01
        ]
        return wave[None]


def test_measures_of_the_truth_and_of_the_source(monkeypatch):
    split = windows(20, Tones(), "test")
    count = len(split.utterances.speakers)
    waves = [split.wave(k) for k in range(count)]
    pairs = split.pairs(6)

    def right(x0, cond):  # the whole source is one window
        tokens, frames = cond["tokens"], cond["frames"]
        for pair in pairs:
            source = STATES.of_waves(waves[pair.source][None])
            size = source.shape[-1]
            mine = one.voice(waves[pair.reference])["tokens"]
            alike = [(frames[..., :size], source), (tokens, mine)]
            if all(torch.allclose(a, b, atol=1e-3) for a, b in alike):
                true = STATES.of_waves(waves[pair.truth][None])
                return torch.nn.functional.pad(true, (0, frames.shape[-1] - size))
        raise AssertionError("unknown pair")

    one = converter(right, vocoder=Echo(waves), split=split)
    one.data.frames = 64
    found, shown = measure(one, 6, 0, 10, words=False)
    assert found["num_pairs"] == len(shown) == 6
    assert found["mcd"] == pytest.approx(0, abs=1e-3)
    assert found["variance_ratio"] == pytest.approx(1, abs=1e-4)
    assert found["classified_as_target"] == 1
    assert found["similarity_to_target"] == pytest.approx(found["similarity_to_target_of_truth"])
    assert found["similarity_to_target"] > 0.9 > found["similarity_to_source"]
    assert found["real_time_factor"] > 0
    assert "wer" not in found

    one = converter(lambda x0, cond: cond["frames"], vocoder=Echo(waves), split=split)
    one.data.frames = 64
    heard = []
    monkeypatch.setattr(
        "flowkit.runs.conversion.hear", lambda waves: heard.extend(waves) or ["text"] * len(waves)
    )
    same, _ = measure(one, 6, 0, 10, words=True)
    assert same["mcd"] == pytest.approx(same["mcd_of_source"], abs=1e-3)
    assert same["mcd"] > 1
    assert same["classified_as_target"] == 0
    assert same["similarity_to_target"] == pytest.approx(same["similarity_to_target_of_source"])
    assert len(heard) == 18
    assert same["wer"] == 0.5  # of "text 3" the word is heard and the number is not
    assert same["wer_stderr"] == 0  # of all texts alike


def test_a_missing_recognizer_is_told_before_the_work(monkeypatch):
    def missing(waves):
        raise ImportError("pocketsphinx must be installed")

    def worked(x0, cond):
        raise AssertionError("converted first")

    monkeypatch.setattr("flowkit.runs.conversion.hear", missing)
    split = windows(20, Tones(), "test")
    one = converter(worked, vocoder=None, split=split)
    with pytest.raises(ImportError, match="pocketsphinx must be installed"):
        measure(one, 2, 0, 10, words=True)


def test_a_vocoder_of_other_waves_is_told_before_the_work(monkeypatch):
    one = converter(None)
    monkeypatch.setattr("flowkit.runs.conversion.data_of", lambda *_: one.data)
    assert Converter.of(one.run, one.sampler, one.vocoder).data is one.data
    assert Converter.of(one.run, one.sampler, lambda *_: torch.zeros(1, 66 * 160 - 1))

    def tried(wave):
        return Converter.of(one.run, one.sampler, lambda *_: wave)

    short, long, slowed = torch.zeros(63 * 160 - 1), torch.zeros(66 * 160), torch.zeros(64 * 256)
    for wave in (torch.zeros(63 * 160), *(x[None] for x in (short, long, slowed))):
        with pytest.raises(ValueError, match=r"vocoder must return waves \(B, S\)"):
            tried(wave)
    with pytest.raises(ValueError, match=r"vocoder must return waves \(B, S\)"):
        tried(torch.zeros(2, 64 * 160))
    with pytest.raises(ValueError, match="vocoder must be finite, got 10240 NaN"):
        tried(torch.full((1, 64 * 160), float("nan")))
    for other in ([0.0], torch.zeros(64 * 160).numpy(), torch.zeros(1, 64 * 160).short()):
        with pytest.raises(TypeError, match="vocoder must be a floating-point tensor, got"):
            tried(other)


def test_a_vocoder_that_is_a_network_makes_waves_without_gradients(monkeypatch):
    gain = torch.nn.Parameter(torch.ones(()))
    asked = []

    def vocoder(log_mel, mel):
        asked.append((gain * log_mel).requires_grad)
        return gain.expand(1, log_mel.shape[-1] * mel.hop)

    plain = converter(lambda x0, cond: cond["frames"])
    monkeypatch.setattr("flowkit.runs.conversion.data_of", lambda *_: plain.data)
    one = Converter.of(plain.run, plain.sampler, vocoder)
    found, _ = one.convert(melody(1.0), melody(0.8), 0, 10)
    assert not found.requires_grad
    assert asked == [False, False]
    assert torch.equal(found, torch.ones(16000))
