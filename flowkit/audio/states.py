"""Log-mel spectrograms as states of a flow."""

import hashlib
import json

import torch
from torch import Tensor

from flowkit.audio.mel import LogMel
from flowkit.checks import check_choice, check_finite, check_positive

LAYOUTS = ("sequence", "image")


class MelStates:
    """Map between log-mels ``L (B, n_mels, T)`` and states ``(L − center) / spread`` of a flow.

    The states are sequences ``(B, n_mels, T)``, or images ``(B, 1, T, n_mels)`` for networks and
    autoencoders of images. Data, pictures and recipes of a run share one such map, and the run
    keeps its hash.

    Args:
        mel: The spectrogram.
        center: Log-mel whose state is 0.
        spread: Log-mels per unit of a state.
        layout: ``"sequence"`` or ``"image"``.

    Raises:
        ValueError: If a value is out of range.

    >>> states = MelStates(LogMel(), center=-5.0, spread=2.0)
    >>> states.encode(torch.full((1, 64, 3), -7.0))[0, 0]
    tensor([-1., -1., -1.])
    """

    def __init__(
        self, mel: LogMel, center: float = -7.0, spread: float = 3.0, layout: str = "sequence"
    ) -> None:
        check_finite(torch.tensor(center), "center")
        check_positive(spread, "spread")
        check_choice(layout, LAYOUTS, "layout")
        self.mel, self.center, self.spread, self.layout = mel, center, spread, layout

    @property
    def hash(self) -> str:
        """SHA-256 of all settings and of those of the spectrogram."""
        own = [self.mel.hash, self.center, self.spread, self.layout]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()

    @property
    def silence(self) -> float:
        """State of a silent frame."""
        return (torch.tensor(self.mel.floor).log().item() - self.center) / self.spread

    def of_waves(self, waves: Tensor) -> Tensor:
        """Return the states of waves ``(B, S)``."""
        return self.encode(self.mel(waves))

    def encode(self, log_mels: Tensor) -> Tensor:
        """Return the states of log-mels ``(B, n_mels, T)``."""
        states = (log_mels - self.center) / self.spread
        return states if self.layout == "sequence" else states.mT[:, None]

    def decode(self, states: Tensor) -> Tensor:
        """Return the log-mels ``(B, n_mels, T)`` of states; none is below that of silence."""
        states = states if self.layout == "sequence" else states[:, 0].mT
        floor = torch.tensor(self.mel.floor).log().item()
        return (states * self.spread + self.center).clamp_min(floor)
