import math

import numpy as np
import pytest
import torch

from flowkit.audio import LogMel, griffin_lim, mixture_phase, si_sdr
from flowkit.audio.mel import slaney_filters

MEL = LogMel()


def tone(frequency, seconds=0.5, rate=16000):
    return 0.5 * torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * rate)) / rate)[None]


@pytest.mark.parametrize("settings", [(16000, 1024, 64, 0.0, 8000.0), (24000, 512, 40, 60, 7600)])
def test_filters_are_those_of_the_published_scale(settings):
    from transformers.audio_utils import mel_filter_bank

    rate, n_fft, n_mels, fmin, fmax = settings
    expected = mel_filter_bank(
        n_fft // 2 + 1, n_mels, fmin, fmax, rate, norm="slaney", mel_scale="slaney"
    ).T
    np.testing.assert_allclose(slaney_filters(*settings).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("frequency", [180.0, 440.0, 1000.0, 3300.0, 7000.0])
def test_a_tone_peaks_in_its_band(frequency):
    log_mel = MEL(tone(frequency))[0, :, 10:-10].mean(1)
    edges = slaney_filters(16000, 1024, 64, 0, 8000)
    band = int(edges[:, round(frequency / 16000 * 1024)].argmax())
    assert int(log_mel.argmax()) == band


def test_numbers_of_a_frame_by_hand():
    wave = tone(523.0)
    window = np.hanning(1025)[:-1]
    frame = 7
    part = wave[0].numpy()[frame * 160 - 512 : frame * 160 + 512]
    magnitude = np.abs(np.fft.rfft(window * part))
    filters = slaney_filters(16000, 1024, 64, 0, 8000).numpy()
    expected = np.maximum(filters @ magnitude, 1e-5)
    found = MEL(wave.double())[0, :, frame].exp().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.max())


def test_silence_is_the_floor_and_any_length_has_its_frames():
    assert torch.equal(MEL(torch.zeros(2, 800)), torch.full((2, 64, 6), math.log(1e-5)))
    for samples in (1, 159, 160, 4800, 16001):
        assert MEL(torch.ones(1, samples)).shape[-1] == MEL.frames(samples) == 1 + samples // 160


def test_each_setting_changes_the_hash():
    others = [
        {"rate": 22050},
        {"n_fft": 2048},
        {"hop": 200},
        {"n_mels": 60},
        {"fmin": 20.0},
        {"fmax": 7900.0},
        {"floor": 1e-6},
    ]
    hashes = {LogMel(**other).hash for other in others} | {MEL.hash}
    assert len(hashes) == 8
    assert LogMel().hash == MEL.hash
    assert "filters" not in MEL.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fmax": 9000.0}, r"fmax must lie in \[0, 8000.0\], got 9000"),
        ({"fmin": 8001.0}, "fmin must lie in"),
        ({"floor": 0.0}, "floor must be positive"),
        ({"hop": 0}, "hop must be at least 1"),
        ({"n_mels": 900}, "n_mels must leave a bin to each band, got 900 bands with n_fft=1024"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LogMel(**settings)


@pytest.mark.parametrize(
    "wave", [torch.zeros(10), torch.zeros(1, 0), torch.tensor([[math.nan] * 9])]
)
def test_wrong_waves_are_refused(wave):
    with pytest.raises(ValueError, match="wave must be"):
        MEL(wave)


def chord(frequencies, seed):
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(16000) / 16000
    wave = sum(torch.sin(2 * math.pi * f * time) * torch.exp(-2 * time) for f in frequencies)
    return 0.1 * wave[None] + 1e-4 * torch.randn(1, 16000, generator=generator)


def test_the_whole_mixture_is_a_mask_of_one():
    mixture = chord([300, 410], 0)
    torch.testing.assert_close(
        mixture_phase(MEL(mixture), mixture, MEL), mixture, atol=1e-5, rtol=0
    )
    silent = mixture_phase(MEL(torch.zeros_like(mixture)), mixture, MEL)
    assert silent.abs().max() < 1e-2 * mixture.abs().max()
    louder = mixture_phase(MEL(3 * mixture), mixture, MEL)  # never more than the mixture
    torch.testing.assert_close(louder, mixture, atol=1e-5, rtol=0)


def test_the_true_log_mel_separates_notes_that_are_apart():
    target, other = chord([262, 523, 786], 0), chord([1800, 2700, 5400], 1)
    mixture = target + other
    found = mixture_phase(MEL(target), mixture, MEL)
    assert si_sdr(found, target).item() > si_sdr(mixture, target).item() + 15


def test_a_mask_covers_bins_outside_of_the_bands():
    mel = LogMel(fmin=300.0, fmax=6000.0)
    mixture = chord([100, 3000, 7500], 0)
    found = mixture_phase(mel(mixture), mixture, mel)
    torch.testing.assert_close(found, mixture, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="log_mel must be"):
        mixture_phase(mel(mixture)[..., 1:], mixture, mel)


def test_griffin_lim_returns_a_wave_of_the_same_spectrogram():
    wave = chord([262, 523, 786, 1400], 0)
    log_mel = MEL(wave)
    first = griffin_lim(log_mel, MEL, 16000, iterations=1)
    found = griffin_lim(log_mel, MEL, 16000, iterations=48)

    def error(other):
        return (MEL(other).exp() - log_mel.exp()).norm() / log_mel.exp().norm()

    assert error(found) < 0.08 < 0.5 * error(first)
    plain = griffin_lim(log_mel, MEL, 16000, iterations=48, momentum=0)
    assert error(found) < error(plain)
    assert found.shape == (1, 16000)
    assert griffin_lim(log_mel, MEL).shape == (1, 100 * 160)
    assert torch.equal(griffin_lim(log_mel, MEL, 16000, iterations=1), first)
