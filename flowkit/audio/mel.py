"""Log-mel spectrograms, and the two ways back to a wave: a mixture's phase, and Griffin-Lim."""

import hashlib
import json

import torch
from torch import Tensor, nn

from flowkit.checks import check_at_least, check_between, check_finite, check_positive


class LogMel(nn.Module):
    """Frozen map from waves ``(B, T)`` to log-mel spectrograms ``(B, n_mels, 1 + T // hop)``.

    ``log max(floor, Σ_f M_{mf} |STFT(x)_f|)`` with a Hann window, zeros beyond both ends, and the
    filter bank of librosa's default: triangles of equal area on Slaney's scale, which is linear
    below 1 kHz and logarithmic above. The value of a silent frame is ``log floor``.

    Two settings that differ in anything give different numbers (a floor of 1e-6 instead of 1e-9
    shifts the mean of speech by 1.6), and a vocoder of other settings sounds like a robot. So every
    run, cache and vocoder keeps the ``hash`` of these settings.

    Source of the scale: Slaney, *Auditory Toolbox*, 1998.

    Args:
        rate: Samples per second.
        n_fft: Length of a window in samples.
        hop: Samples from frame to frame.
        n_mels: Number of bands.
        fmin: Lower edge of the first band in Hz.
        fmax: Upper edge of the last band in Hz, at most half the rate.
        floor: Smallest magnitude.

    Raises:
        ValueError: If a setting is out of range, or a band is narrower than the bins of the window.

    >>> LogMel()(torch.zeros(1, 1600)).shape
    torch.Size([1, 64, 11])
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        rate: int = 16000,
        n_fft: int = 1024,
        hop: int = 160,
        n_mels: int = 64,
        fmin: float = 0.0,
        fmax: float = 8000.0,
        floor: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in (("rate", rate), ("n_fft", n_fft), ("hop", hop), ("n_mels", n_mels)):
            check_at_least(value, 1, name)
        check_positive(floor, "floor")
        check_between(fmax, 0, rate / 2, "fmax")
        check_between(fmin, 0, fmax, "fmin")
        self.rate, self.n_fft, self.hop, self.n_mels = rate, n_fft, hop, n_mels
        self.fmin, self.fmax, self.floor = fmin, fmax, floor
        filters = slaney_filters(rate, n_fft, n_mels, fmin, fmax)
        if not bool((filters.sum(1) > 0).all()):
            raise ValueError(
                f"n_mels must leave a bin to each band, got {n_mels} bands with n_fft={n_fft}; "
                "take fewer bands or a longer window"
            )
        self.register_buffer("filters", filters.float(), persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    @property
    def settings(self) -> dict[str, float]:
        """All settings, as a record holds them."""
        names = ("rate", "n_fft", "hop", "n_mels", "fmin", "fmax", "floor")
        return {name: getattr(self, name) for name in names}

    @property
    def hash(self) -> str:
        """SHA-256 of the settings and of the kind of the spectrogram."""
        kind = {"kind": "log magnitude, slaney, hann, zeros", **self.settings}
        return hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()

    def frames(self, samples: int) -> int:
        """Return the number of frames of a wave of ``samples`` samples."""
        return 1 + samples // self.hop

    def stft(self, wave: Tensor) -> Tensor:
        """Return the complex spectrogram ``(B, n_fft // 2 + 1, frames)`` of waves ``(B, T)``.

        Raises:
            ValueError: If ``wave`` has another shape, or holds NaN or infinity.
        """
        if wave.ndim != 2 or not wave.shape[1]:
            raise ValueError(f"wave must be (B, T) with T > 0, got {tuple(wave.shape)}")
        check_finite(wave, "wave")
        return torch.stft(
            wave,
            self.n_fft,
            self.hop,
            window=self.window.to(wave.dtype),
            pad_mode="constant",
            return_complex=True,
        )

    def istft(self, spectrum: Tensor, length: int | None = None) -> Tensor:
        """Return waves ``(B, length)`` of complex spectrograms, the inverse of `stft`."""
        window = self.window.to(spectrum.real.dtype)
        return torch.istft(spectrum, self.n_fft, self.hop, window=window, length=length)

    def forward(self, wave: Tensor) -> Tensor:
        """Return log-mel spectrograms of waves in [-1, 1]."""
        magnitudes = self.stft(wave).abs()
        return (self.filters.to(magnitudes.dtype) @ magnitudes).clamp_min(self.floor).log()


def slaney_filters(rate: int, n_fft: int, n_mels: int, fmin: float, fmax: float) -> Tensor:
    """Return triangles of area 1 ``(n_mels, n_fft // 2 + 1)``, evenly spaced on Slaney's scale.

    The scale is ``3 f / 200`` below 1 kHz, and ``15 + 27 ln(f / 1000) / ln 6.4`` above.
    """
    edges = slaney_hertz(n_mels, fmin, fmax)
    bins = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    area = 2 / (edges[2:] - edges[:-2])
    return torch.minimum(rising, falling).clamp_min(0) * area[:, None]


def slaney_hertz(n_mels: int, fmin: float, fmax: float) -> Tensor:
    """Return the edges of bands ``(n_mels + 2,)`` in Hz, evenly spaced on Slaney's scale.

    Band ``k`` rises from edge ``k`` to edge ``k + 1``, its center, and falls to edge ``k + 2``.
    """
    step = torch.tensor(6.4, dtype=torch.float64).log() / 27

    def to_mel(f: Tensor) -> Tensor:
        return torch.where(f < 1000, 3 * f / 200, 15 + (f.clamp_min(1) / 1000).log() / step)

    def to_hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < 15, 200 * mel / 3, 1000 * (step * (mel - 15)).exp())

    low, high = to_mel(torch.tensor([fmin, fmax], dtype=torch.float64)).tolist()
    return to_hertz(torch.linspace(low, high, n_mels + 2, dtype=torch.float64))


def mixture_phase(log_mel: Tensor, mixture: Tensor, mel: LogMel) -> Tensor:
    """Return waves ``(B, T)`` of estimated log-mels, as a mask on the mixture's spectrogram.

    The ratio of the estimate to the mixture in each band, at most 1, is spread to the bins by the
    filter bank, and multiplies the complex spectrogram of the mixture. So the result never holds
    what the mixture lacks, and its samples are comparable with those of the source (SI-SDR).

    Args:
        log_mel: Estimate of the source ``(B, n_mels, frames)``.
        mixture: The mixture ``(B, T)``.
        mel: The map that the estimate belongs to.

    Raises:
        ValueError: If the shapes do not belong together.
    """
    spectrum = mel.stft(mixture)
    expected = (len(mixture), mel.n_mels, spectrum.shape[-1])
    if tuple(log_mel.shape) != expected:
        raise ValueError(f"log_mel must be {expected} for this mixture, got {tuple(log_mel.shape)}")
    filters = mel.filters.to(spectrum.real.dtype)
    heard = (filters @ spectrum.abs()).clamp_min(mel.floor)
    ratio = (log_mel.to(heard.dtype).exp() / heard).clamp(0, 1)
    share = filters / filters.sum(0).clamp_min(1e-12)  # of each band in a bin
    # Bins outside of all bands have no estimate: they take the mask of the nearest band.
    outside = filters.sum(0) < 1e-6 * filters.max()
    if bool(outside.any()):
        inside = (~outside).nonzero()[:, 0]
        bins = torch.arange(len(outside), device=filters.device)
        nearest = inside[(bins[:, None] - inside).abs().argmin(1)]
        share = share[:, nearest]
    return mel.istft(spectrum * (share.mT @ ratio), mixture.shape[1])


def griffin_lim(
    log_mel: Tensor,
    mel: LogMel,
    length: int | None = None,
    iterations: int = 32,
    momentum: float = 0.99,
    seed: int = 0,
) -> Tensor:
    """Return waves ``(B, length)`` whose spectrogram is close to given log-mels.

    The magnitudes are those of `bin_magnitudes`. The phases are found by the fast algorithm:
    ``c ← P(s e^{i∠t})``, ``t ← c + α (c − c_before)``, with the projection ``P`` onto spectrograms
    of waves.

    Source: Perraudin, Balazs and Søndergaard, *A fast Griffin-Lim algorithm*, 2013, algorithm 2.

    Args:
        log_mel: Log-mels ``(B, n_mels, frames)``.
        mel: The map that they belong to.
        length: Samples of the result; None means ``(frames − 1) · hop``.
        iterations: Steps, at least 1.
        momentum: ``α``; 0 is the algorithm of Griffin and Lim.
        seed: Seed of the first phases.

    Raises:
        ValueError: If a value is out of range.
    """
    check_at_least(iterations, 1, "iterations")
    check_between(momentum, 0, 1, "momentum")
    if log_mel.ndim != 3 or log_mel.shape[1] != mel.n_mels:
        raise ValueError(f"log_mel must be (B, {mel.n_mels}, frames), got {tuple(log_mel.shape)}")
    length = (log_mel.shape[-1] - 1) * mel.hop if length is None else length
    check_at_least(length, 1, "length")
    magnitudes = bin_magnitudes(log_mel, mel)
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(magnitudes.shape, generator=generator, dtype=log_mel.dtype)
    ahead = before = torch.polar(magnitudes, angle.to(log_mel.device))
    wave = mel.istft(ahead, length)
    for _ in range(iterations):
        now = _padded(mel.stft(wave), magnitudes.shape[-1])
        ahead, before = now + momentum * (now - before), now
        wave = mel.istft(torch.polar(magnitudes, ahead.angle()), length)
    return wave


def bin_magnitudes(log_mel: Tensor, mel: LogMel, iterations: int = 100) -> Tensor:
    """Return magnitudes of bins ``(B, n_fft // 2 + 1, frames)``, none negative, of given log-mels.

    ``m ← m · Mᵀe^L / (MᵀM m)`` brings the bands ``M m`` to ``e^L`` by least squares. It starts from
    the pseudo-inverse, whose negative values are made small: this alone leaves an error of a tenth.

    Source: Lee and Seung, *Algorithms for non-negative matrix factorization*, 2001.

    Args:
        log_mel: Log-mels ``(B, n_mels, frames)``.
        mel: The map that they belong to.
        iterations: Number of steps.
    """
    filters, bands = mel.filters.to(log_mel.dtype), log_mel.exp()
    found = (torch.linalg.pinv(filters) @ bands).clamp_min(1e-6)
    wanted, gram = filters.mT @ bands, filters.mT @ filters
    for _ in range(iterations):
        found = found * wanted / (gram @ found).clamp_min(1e-12)
    return found


def _padded(spectrum: Tensor, frames: int) -> Tensor:
    """Return a spectrogram with ``frames`` frames: those of a shorter wave end in silence."""
    return nn.functional.pad(spectrum, (0, max(0, frames - spectrum.shape[-1])))[..., :frames]
