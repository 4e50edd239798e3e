"""Parts for sound: spectrograms, mixtures, long signals, files and measures.

Waves are ``(B, T)`` in [-1, 1] at 16 kHz, mono; spectrograms are ``(B, n_mels, frames)``.
"""

from flowkit.audio.content import PhoneRecognizer, Recognition
from flowkit.audio.files import read_audio, resample, write_audio
from flowkit.audio.listening import hear
from flowkit.audio.mel import LogMel, griffin_lim, mixture_phase
from flowkit.audio.metrics import (
    log_mel_error,
    mel_cepstral_distortion,
    si_sdr,
    si_sdr_improvement,
    variance_ratio,
    word_error_rate,
    word_error_rate_stderr,
)
from flowkit.audio.mixing import mix
from flowkit.audio.pictures import save_spectrograms
from flowkit.audio.queries import TextEncoder
from flowkit.audio.speakers import SpeakerEncoder
from flowkit.audio.states import MelStates
from flowkit.audio.vocoders import GriffinLim, HiFiGAN
from flowkit.audio.voices import VoiceVelocity, check_reference, leveled
from flowkit.audio.windows import by_windows, frame_noise

__all__ = [
    "GriffinLim",
    "HiFiGAN",
    "LogMel",
    "MelStates",
    "PhoneRecognizer",
    "Recognition",
    "SpeakerEncoder",
    "TextEncoder",
    "VoiceVelocity",
    "by_windows",
    "check_reference",
    "frame_noise",
    "griffin_lim",
    "hear",
    "leveled",
    "log_mel_error",
    "mel_cepstral_distortion",
    "mix",
    "mixture_phase",
    "read_audio",
    "resample",
    "save_spectrograms",
    "si_sdr",
    "si_sdr_improvement",
    "variance_ratio",
    "word_error_rate",
    "word_error_rate_stderr",
    "write_audio",
]
