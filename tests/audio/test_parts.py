import math
import warnings

import numpy as np
import pytest
import torch

from flowkit.audio import (
    by_windows,
    frame_noise,
    log_mel_error,
    mel_cepstral_distortion,
    mix,
    read_audio,
    resample,
    si_sdr,
    si_sdr_improvement,
    word_error_rate,
    word_error_rate_stderr,
    write_audio,
)
from flowkit.audio.files import head_of, open_audio
from flowkit.audio.metrics import aligned

soundfile = pytest.importorskip("soundfile")
GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(3, 4000, generator=GENERATOR) for _ in range(2))


@pytest.mark.parametrize("snr", [-15.0, 0.0, 14.0])
@pytest.mark.parametrize("level", [0.01, 1.0])
def test_a_mixture_has_its_ratio_before_and_after_scaling(snr, level):
    mixture, target = mix(level * A, B, snr)
    rest = mixture.double() - target.double()
    measured = 10 * torch.log10(target.double().square().sum(1) / rest.square().sum(1))
    assert (measured - snr).abs().max() < 1e-4
    assert max(mixture.abs().max(), target.abs().max()) <= 1
    gain = (target / (level * A)).mean(1, keepdim=True)
    torch.testing.assert_close(target, gain * level * A)
    if level < 0.1 and snr > 0:
        assert torch.equal(target, level * A)  # nothing to scale


def test_each_mixture_has_a_ratio_of_its_own():
    mixture, target = mix(A, B, torch.tensor([-5.0, 0.0, 5.0]))
    rest = mixture - target
    measured = 10 * torch.log10(target.square().sum(1) / rest.square().sum(1))
    torch.testing.assert_close(measured, torch.tensor([-5.0, 0.0, 5.0]), atol=1e-3, rtol=0)


def test_silence_and_other_shapes_do_not_mix():
    silent = A.clone()
    silent[1] = 0
    with pytest.raises(ValueError, match="other must not be silent, got silence in row 1"):
        mix(A, silent, 0.0)
    with pytest.raises(ValueError, match="target must have the shape of other"):
        mix(A, B[:, 1:], 0.0)
    with pytest.raises(ValueError, match="snr_db must be finite"):
        mix(A, B, math.nan)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30, 47])
@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
def test_windows_of_what_stays_give_it_back(length, overlap):
    signal = torch.randn(2, 3, length, generator=GENERATOR)
    torch.testing.assert_close(by_windows(lambda x, _: x, signal, 8, overlap), signal)


def test_windows_fade_linearly_into_each_other():
    """The window from 0 says 0, the next says its start: between the two a straight line."""
    found = by_windows(lambda x, start: x * 0 + start, torch.zeros(1, 1, 13), 8, 3)[0, 0]
    expected = torch.tensor([0, 0, 0, 0, 0, 1.25, 2.5, 3.75, 5, 5, 5, 5, 5])
    torch.testing.assert_close(found, expected)


def test_windows_need_room():
    with pytest.raises(ValueError, match=r"overlap must lie in \[0, 7\], got 8"):
        by_windows(lambda x, _: x, torch.zeros(1, 1, 9), 8, 8)
    with pytest.raises(ValueError, match="function must keep 8 frames, got 7"):
        by_windows(lambda x, _: x[..., 1:], torch.zeros(1, 1, 9), 8, 2)


def test_a_frame_has_its_noise_in_every_window():
    whole = frame_noise(4, 0, 500, seed=3)
    assert torch.equal(frame_noise(4, 123, 50, seed=3), whole[:, 123:173])
    assert abs(whole.mean()) < 0.1
    assert abs(whole.std() - 1) < 0.05
    other = frame_noise(4, 0, 500, seed=4)
    assert abs((other * whole).mean()) < 0.1


def test_distortion_by_its_definition():
    noise = B - (B * A).sum(1, keepdim=True) / A.square().sum(1, keepdim=True) * A
    noise = noise - noise.mean(1, keepdim=True)
    target = A - A.mean(1, keepdim=True)
    estimate = 0.7 * target + 0.1 * noise + 5.0
    a = estimate - estimate.mean(1, keepdim=True)
    gain = (a * target).sum(1) / target.square().sum(1)
    part = gain[:, None] * target
    expected = 10 * torch.log10(part.square().sum(1) / (a - part).square().sum(1))
    torch.testing.assert_close(si_sdr(estimate, target), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(si_sdr(4 * estimate - 1, target), expected, atol=1e-3, rtol=0)
    gained = si_sdr_improvement(estimate, target, target + noise)
    torch.testing.assert_close(gained, expected - si_sdr(target + noise, target), atol=1e-3, rtol=0)


def test_the_best_alignment_of_all():
    costs = np.random.default_rng(0).random((4, 5))

    def least(i, j):
        if i < 0 or j < 0:
            return math.inf
        if i == j == 0:
            return costs[0, 0]
        return costs[i, j] + min(least(i - 1, j - 1), least(i - 1, j), least(i, j - 1))

    first, second = aligned(costs)
    assert (first[0], second[0], first[-1], second[-1]) == (0, 0, 3, 4)
    assert set(zip(np.diff(first), np.diff(second), strict=True)) <= {(0, 1), (1, 0), (1, 1)}
    assert costs[first, second].sum() == pytest.approx(least(3, 4))


def test_cepstral_distortion_ignores_speed_and_level():
    log_mel = torch.randn(64, 20, generator=GENERATOR)
    slow = log_mel.repeat_interleave(2, 1)
    assert mel_cepstral_distortion(slow + 3.0, log_mel) == pytest.approx(0, abs=1e-5)
    for bands in (40, 64):  # coefficient 2 alone: the same in dB for any number of bands
        basis = torch.cos(math.pi * 2 * (torch.arange(bands) + 0.5) / bands)[:, None]
        expected = 10 * math.sqrt(2) / math.log(10) * 0.5
        steady = log_mel[:bands, :1].expand(bands, 9)
        found = mel_cepstral_distortion(steady + 0.5 * basis, steady)
        assert found == pytest.approx(expected, rel=1e-5)
        decibels = 20 / math.log(10) * 0.5 * basis
        assert found == pytest.approx(decibels.square().mean().sqrt().item(), rel=1e-5)
    with pytest.raises(ValueError, match="estimate and target must be"):
        mel_cepstral_distortion(log_mel, log_mel[:40])


def test_log_mel_error_is_in_decibels():
    a = torch.randn(2, 64, 5, generator=GENERATOR)
    ten_db = math.log(10) / 2  # a factor √10 of magnitude
    torch.testing.assert_close(log_mel_error(a + ten_db, a), torch.full((2,), 10.0))


@pytest.mark.parametrize(
    ("heard", "true", "rate"),
    [
        (["a b c"], ["a b c"], 0.0),
        (["A, b: c!"], ["a b c"], 0.0),
        (["a c"], ["a b c"], 1 / 3),
        (["a x b c"], ["a b c"], 1 / 3),
        ([""], ["a b"], 1.0),
        (["a", "b b"], ["a", "b"], 0.5),
        (["b a"], ["a b"], 1.0),
    ],
)
def test_wrong_words_by_hand(heard, true, rate):
    assert word_error_rate(heard, true) == pytest.approx(rate)


def test_the_error_of_a_word_error_rate_is_that_of_other_texts():
    """The spread of the rates of 3000 samples of 40 texts, with a third of the words wrong."""
    random = np.random.default_rng(0)

    def drawn():
        sizes = random.integers(1, 10, 40)
        ease = random.uniform(0, 2 / 3, 40)  # texts are not alike
        true = [["a"] * size for size in sizes]
        heard = [
            ["b" if random.random() < p else "a" for _ in t]
            for t, p in zip(true, ease, strict=True)
        ]
        return [" ".join(t) for t in heard], [" ".join(t) for t in true]

    samples = [drawn() for _ in range(3000)]
    spread = np.std([word_error_rate(*sample) for sample in samples])
    told = np.mean([word_error_rate_stderr(*sample) for sample in samples])
    assert told == pytest.approx(spread, rel=0.05)
    assert word_error_rate_stderr(["a"], ["b"]) == math.inf


def test_words_must_be_spoken():
    with pytest.raises(ValueError, match="heard must hold 1 texts"):
        word_error_rate([], ["a"])
    with pytest.raises(ValueError, match="number of spoken words"):
        word_error_rate(["a"], [" "])


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "opus"])
def test_files_give_back_what_was_written(ending, tmp_path):
    wave = 0.3 * torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000)
    found = read_audio(write_audio(wave, tmp_path / f"a.{ending}"))
    assert len(found) == 16000
    exact = ending in ("wav", "flac")
    assert si_sdr(found[None], wave[None]).item() > (60 if exact else 15)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_and_channels_become_one_wave(rate, tmp_path):
    time = np.arange(rate) / rate
    both = 0.4 * np.stack([np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 660 * time)], 1)
    soundfile.write(tmp_path / "a.wav", both, rate)
    found = read_audio(tmp_path / "a.wav")
    assert abs(len(found) - 16000) <= 1
    time = torch.arange(len(found)) / 16000
    expected = 0.2 * sum(torch.sin(2 * math.pi * f * time) for f in (440, 660))
    assert si_sdr(found[None, 200:-200], expected[None, 200:-200]).item() > 40


def test_frequencies_above_the_new_half_rate_are_gone():
    high = torch.sin(2 * math.pi * 11000 * torch.arange(44100) / 44100)
    assert resample(high, 44100, 16000)[500:-500].abs().max() < 1e-2


def test_loud_waves_are_scaled_not_clipped(tmp_path):
    wave = torch.sin(torch.arange(8000) / 9.0) * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_audio(write_audio(wave, tmp_path / "a.wav"))
    assert si_sdr(found[None], wave[None]).item() > 60


@pytest.mark.parametrize(
    ("values", "rate", "message"),
    [
        (np.zeros(0), 16000, r"audio must be an audio file, .* got .*a\.wav: no samples; convert"),
        (np.zeros(9000), 16000, "audio must not be silent"),
        (np.full(9000, np.nan), 16000, "audio must be finite"),
        (np.ones(9000) / 2, 4000, "got .*: 4000 samples per second, fewer than 8000"),
    ],
)
def test_files_that_are_no_sound_are_named(values, rate, message, tmp_path):
    soundfile.write(tmp_path / "a.wav", values, rate, subtype="FLOAT")
    with pytest.raises(ValueError, match=message):
        read_audio(tmp_path / "a.wav")


def test_other_files_are_named_with_the_formats(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no sound at all")
    with pytest.raises(
        ValueError, match=r"audio must be .* WAV, .*, got .*a\.wav: Format not r.*; con"
    ):
        read_audio(tmp_path / "a.wav")
    whole = write_audio(torch.rand(9000), tmp_path / "whole.flac").read_bytes()
    (tmp_path / "part.flac").write_bytes(whole[:2000])  # its head is whole
    assert head_of(tmp_path / "part.flac") == (9000 / 16000, "")
    with pytest.raises(
        ValueError, match=r"^voice must be an audio file, .*part\.flac: [A-Z].*; con"
    ):
        open_audio(tmp_path / "part.flac", "voice")
    stream = bytearray(whole)
    stream[21] &= 0xF0  # the number of samples has 36 bits; 0 means unknown
    stream[22:26] = bytes(4)
    (tmp_path / "stream.flac").write_bytes(stream)
    with pytest.raises(
        ValueError, match=r"stream\.flac: its head does not say how long it is; con"
    ):
        read_audio(tmp_path / "stream.flac")
    (tmp_path / "a.raw").write_bytes(bytes(100))  # soundfile asks for its rate
    with pytest.raises(ValueError, match=r"audio must be .*a\.raw: \w.*; convert"):
        read_audio(tmp_path / "a.raw")
    with pytest.raises(FileNotFoundError, match="audio must be a file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(ValueError, match=r"file must end in \.wav, \.flac"):
        write_audio(torch.ones(9), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="wave must be finite"):
        write_audio(torch.full((9,), math.nan), tmp_path / "a.wav")
    assert not (tmp_path / "a.mp4").exists()


def test_clipped_recordings_give_a_warning(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.clip(3 * np.sin(np.arange(9000) / 9), -1, 1), 16000)
    with pytest.warns(
        UserWarning, match=r"audio should lie within -1 and 1, got \d+\.\d % of"
    ) as w:
        read_audio(tmp_path / "a.wav")
    assert w[0].filename == __file__
