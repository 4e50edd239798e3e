"""Embeddings of voices, by a packaged encoder of speakers."""

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.audio.mel import slaney_filters
from flowkit.extras import install
from flowkit.provenance import tensor_hash

RATE, N_FFT, HOP, BANDS = 16000, 400, 160, 40  # of the spectrogram that the encoder was trained on
PARTIAL, STEP = 160, 77  # frames of a part of an utterance, and from part to part
LEVEL = 10 ** (-30 / 20)  # root mean square of its training waves


class SpeakerEncoder:
    """Frozen encoder of voices: a vector of length 1 for each utterance.

    Three LSTM layers read parts of 1.6 s of a mel spectrogram. The vectors of the parts are
    averaged. The level of an utterance does not count. The weights are read at the first call.

    Source: Wan et al., *Generalized end-to-end loss for speaker verification*, 2018 (arXiv
    1710.10467), with the weights of the package ``resemblyzer``, whose code is not needed.

    Args:
        path: File of such weights; None takes those of the package ``resemblyzer``.
    """

    size = 256

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = path

    @torch.no_grad()
    def __call__(self, waves: Sequence[Tensor]) -> Tensor:
        """Return the vectors ``(B, 256)`` of waves ``(T,)`` at 16 kHz, of any lengths.

        Raises:
            ValueError: If a wave is silent.
            ImportError: If there are no weights.
        """
        return torch.stack([self._embed(wave) for wave in waves])

    @property
    def hash(self) -> str:
        """SHA-256 of the weights."""
        return tensor_hash(self._net.state_dict())

    def _embed(self, wave: Tensor) -> Tensor:
        """Return the vector of one wave."""
        level = wave.square().mean().sqrt()
        if not float(level) > 0:
            raise ValueError("voice must not be silent, got silence")
        frames = -(-(len(wave) + 1) // HOP)
        starts = [*range(0, max(1, frames - PARTIAL + STEP + 1), STEP)]
        if len(starts) > 1 and len(wave) - starts[-1] * HOP < 0.75 * PARTIAL * HOP:
            starts.pop()  # a part of which less than three quarters are there
        spare = max(0, (starts[-1] + PARTIAL) * HOP - len(wave))
        padded = F.pad(wave * (LEVEL / level), (0, spare))
        window = torch.hann_window(N_FFT)
        spectrum = torch.stft(
            padded, N_FFT, HOP, window=window, pad_mode="constant", return_complex=True
        )
        filters = slaney_filters(RATE, N_FFT, BANDS, 0, RATE / 2).float()
        mel = (filters @ spectrum.abs().square()).mT
        parts = torch.stack([mel[start : start + PARTIAL] for start in starts])
        return F.normalize(self._net(parts).mean(0), dim=0)

    @cached_property
    def _net(self) -> "_Encoder":
        """The frozen network."""
        file = _packaged() if self.path is None else Path(self.path)
        if not file.is_file():
            raise FileNotFoundError(f"speaker.path must be a file, got {file}")
        stored = torch.load(file, map_location="cpu", weights_only=True)
        net = _Encoder()
        try:
            known = net.state_dict()
            net.load_state_dict({name: stored["model_state"][name] for name in known})
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"speaker.path must hold weights of resemblyzer, got {file}: {error}"
            ) from error
        return net.eval().requires_grad_(False)


class _Encoder(nn.Module):
    """The network of `SpeakerEncoder`; the names of its layers are those of the stored weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, SpeakerEncoder.size, 3, batch_first=True)
        self.linear = nn.Linear(SpeakerEncoder.size, SpeakerEncoder.size)

    def forward(self, mels: Tensor) -> Tensor:
        """Return vectors ``(B, 256)`` of spectrograms ``(B, 160, 40)``."""
        last = self.lstm(mels)[1][0][-1]
        return F.normalize(self.linear(last).relu(), dim=1)


def _packaged() -> Path:
    """Return the weights in the package."""
    spec = find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        raise ImportError(
            "resemblyzer must be installed for its weights (speaker.path=null), got none; "
            f"{install('voices')}"
        )
    return Path(spec.origin).with_name("pretrained.pt")
