"""Ways from log-mels to waves: without training, and by a network of the transformers library."""

from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowkit.audio.mel import LogMel, griffin_lim
from flowkit.checks import check_at_least
from flowkit.extras import install
from flowkit.provenance import located, tensor_hash


class Vocoder(Protocol):
    """Anything that is called with log-mels ``(B, n_mels, T)`` and their map, and returns waves.

    The waves are ``(B, S)`` with ``S = (T − 1) · hop`` samples in [-1, 1], or up to three frames
    more. Records keep the ``hash`` of a vocoder that has one.
    """

    def __call__(self, log_mels: Tensor, mel: LogMel) -> Tensor:
        """Return the waves."""
        ...


class GriffinLim:
    """Vocoder that needs no training, see `flowkit.audio.griffin_lim`.

    Args:
        iterations: Steps; more than 60 are not heard.

    Raises:
        ValueError: If ``iterations`` is below 1.
    """

    def __init__(self, iterations: int = 60) -> None:
        check_at_least(iterations, 1, "iterations")
        self.iterations = iterations

    def __call__(self, log_mels: Tensor, mel: LogMel) -> Tensor:
        """Return waves of log-mels ``(B, n_mels, T)``."""
        return griffin_lim(log_mels, mel, iterations=self.iterations)


class HiFiGAN:
    """Vocoder of the transformers library (``SpeechT5HifiGan``) from a folder or the hub.

    A vocoder serves the spectrogram that it was trained on alone. Its configuration should state
    ``mel_hash``, see `flowkit.audio.LogMel.hash`; one that states another is refused.

    Source: Kong et al., *HiFi-GAN*, 2020 (arXiv 2010.05646).

    Args:
        path: The folder, or ``hub:owner/name``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path

    @torch.no_grad()
    def __call__(self, log_mels: Tensor, mel: LogMel) -> Tensor:
        """Return waves of log-mels ``(B, n_mels, T)``.

        Raises:
            ValueError: If the vocoder is for another spectrogram.
        """
        config = self._net.config
        known = {
            "n_mels": (config.model_in_dim, mel.n_mels),
            "rate": (config.sampling_rate, mel.rate),
            "hop": (prod(config.upsample_rates), mel.hop),
            "hash": (getattr(config, "mel_hash", mel.hash), mel.hash),
        }
        for name, (own, given) in known.items():
            if own != given:
                raise ValueError(
                    f"vocoder must be trained on log-mels of {name} {given}, got {own} in "
                    f"{self.path}"
                )
        return self._net(log_mels.mT.float()).reshape(len(log_mels), -1)

    @property
    def hash(self) -> str:
        """SHA-256 of the weights, which records keep."""
        return tensor_hash(self._net.state_dict())

    @cached_property
    def _net(self) -> Any:
        """The frozen network."""
        try:
            from transformers import SpeechT5HifiGan
        except ImportError as error:
            raise ImportError(
                f"transformers must be installed for a vocoder of it, got none; {install('audio')}"
            ) from error
        place, on_hub = located(self.path, "vocoder.path")
        try:
            net = SpeechT5HifiGan.from_pretrained(place, local_files_only=not on_hub)
        except (OSError, ValueError) as error:
            words = " ".join(str(error).split())
            raise ValueError(
                f"vocoder.path must hold a vocoder of transformers, got {self.path}: {words}"
            ) from error
        return net.float().eval().requires_grad_(False)
