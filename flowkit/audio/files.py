"""Audio files: any format of libsndfile, any rate and number of channels, as one mono wave."""

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.extras import install
from flowkit.provenance import write_atomically

LOWEST = 8000  # Hz; below, speech and instruments are not recognized
UNKNOWN = 2**62  # samples; libsndfile says 2**63 - 1 for a stream of unknown length
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".opus": "OGG"}


class Recording(NamedTuple):
    """A recording with the rate of its file."""

    wave: Tensor
    """One wave ``(T,)`` in [-1, 1], the mean of the channels."""
    rate: int
    """Samples per second."""

    def at(self, rate: int) -> Tensor:
        """Return the wave at another rate, see `resample`."""
        return resample(self.wave, self.rate, rate)


class Head(NamedTuple):
    """Length of a recording and its fault, by the head of its file."""

    seconds: float
    """Length of the recording."""
    fault: str
    """Why the recording cannot be used, or an empty text."""


def read_audio(file: str | Path, rate: int = 16000) -> Tensor:
    """Read an audio file as one wave ``(T,)`` in [-1, 1] of a given rate.

    Channels are averaged. Another rate is resampled by a polyphase filter, which keeps what lies
    below half of both rates.

    Args:
        file: The file, of any format that libsndfile reads, such as WAV, FLAC, OGG or MP3.
        rate: Samples per second of the result.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no audio file, is empty or silent, holds NaN, or has fewer than
            8000 samples per second.
        ImportError: If soundfile, of the extra ``audio``, is missing.
    """
    return open_audio(file).at(rate)


def open_audio(file: str | Path, name: str = "audio") -> Recording:
    """Read an audio file as it is; see `read_audio`.

    Args:
        file: The file.
        name: Name of the argument in errors.
    """
    soundfile, file = _soundfile(), Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{name} must be a file, got {file}")
    fault, values, rate = head_of(file).fault, None, 0
    if not fault:
        try:
            values, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            fault = _why(error)
    if values is None:
        raise ValueError(
            f"{name} must be an audio file, such as WAV, FLAC, OGG or MP3, got {file}: {fault}; "
            "convert it or record it again"
        )
    wave = torch.from_numpy(values).mean(1)
    if not bool(torch.isfinite(wave).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity in {file}")
    if not bool(wave.any()):
        raise ValueError(f"{name} must not be silent, got only zeros in {file}")
    limit = wave.abs() >= 1 - 2**-14  # three samples in turn at the limit are no peak
    clipped = float((limit[2:] & limit[1:-1] & limit[:-2]).float().mean()) if len(wave) > 2 else 0
    if clipped > 1e-3:
        warnings.warn(
            f"{name} should lie within -1 and 1, got {100 * clipped:.1f} % of {file} at the limit; "
            "record it at a lower level",
            stacklevel=3,  # who calls `read_audio`
        )
    return Recording(wave, rate)


def head_of(file: str | Path) -> Head:
    """Return what the head of an audio file says, without decoding it.

    Raises:
        ImportError: If soundfile, of the extra ``audio``, is missing.
    """
    soundfile = _soundfile()
    try:
        found = soundfile.info(file)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        return Head(0.0, _why(error))
    if found.frames >= UNKNOWN:
        return Head(0.0, "its head does not say how long it is")
    fault = "" if found.frames else "no samples"
    if found.samplerate < LOWEST:
        fault = f"{found.samplerate} samples per second, fewer than {LOWEST}"
    return Head(found.frames / found.samplerate, fault)


def resample(wave: Tensor, rate: int, to: int) -> Tensor:
    """Return waves ``(*, T)`` at another rate, ``(*, ⌈T · to / rate⌉)``.

    >>> resample(torch.zeros(441), 44100, 16000).shape
    torch.Size([160])
    """
    check_at_least(rate, 1, "rate")
    check_at_least(to, 1, "to")
    if rate == to:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, to)
    values = resample_poly(wave.double().numpy(), to // common, rate // common, axis=-1)
    return torch.from_numpy(values).to(wave.dtype)


def write_audio(wave: Tensor, file: str | Path, rate: int = 16000) -> Path:
    """Write a wave ``(T,)`` as a file of 16 bits. Larger values than 1 scale the whole wave down.

    Args:
        wave: The wave.
        file: The file; its ending says the format: ``.wav``, ``.flac``, ``.ogg`` or ``.opus``.
        rate: Samples per second.

    Returns:
        The file.

    Raises:
        ValueError: If the wave has another shape or is not finite, or the ending is another.
        ImportError: If soundfile, of the extra ``audio``, is missing.
    """
    soundfile, file = _soundfile(), Path(file)
    kind = FORMATS.get(file.suffix.lower())
    if kind is None:
        raise ValueError(f"file must end in {', '.join(FORMATS)}, got {file}")
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"wave must be (T,) with T > 0, got {tuple(wave.shape)}")
    if not bool(torch.isfinite(wave).all()):
        raise ValueError("wave must be finite, got NaN or infinity")
    values = (wave / wave.abs().max().clamp_min(1)).detach().float().cpu().numpy()
    subtype = "OPUS" if file.suffix.lower() == ".opus" else None
    write_atomically(
        file,
        lambda partial: soundfile.write(partial, values, rate, format=kind, subtype=subtype),
    )
    return file


def _why(error: Exception) -> str:
    """Return an error of soundfile in one line, without the name of the file."""
    text = getattr(error, "error_string", str(error))
    return " ".join(text.split()).rstrip(".")


def _soundfile():  # noqa: ANN202  a module
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            f"soundfile must be installed to read audio, got none; {install('audio')}"
        ) from error
    return soundfile
