"""Content of speech without its voice: a small recognizer of phones, frozen in a flow."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowkit.audio.listening import PHONES
from flowkit.checks import check_at_least, check_between, check_integer
from flowkit.nn.stored import Stored
from flowkit.provenance import cache_folder, cached, content_hash

WINDOW, ROWS = 128, 16  # frames and rows of a training batch
GAIN, WARP = 0.3, 0.15  # spread of levels in states, and largest change of frequencies
SAMPLE = 8000  # frames that the codes are chosen from
LEARNING_RATE, DECAY = 2e-3, 1e-2  # the largest one, and that of the weights
ROUNDS = 50  # of the search for codes, at most


class PhoneRecognizer(Stored):
    """Small convolutional network from mel states to phones; its features are the content.

    Three layers of 5 frames see 17 frames in all, 0.17 s. The *content* of a frame has two parts:
    the posteriors of the 40 phones, and the code that is nearest to the last hidden frame. The
    codes are centers of clusters, so what is left of the voice between the words is rounded away.
    Frames of padding count as nothing: the content of the others does not depend on them.

    Source: Takin-VC, 2024 (arXiv 2410.01350), section 3.1, which joins posteriors and quantized
    features of two large recognizers.

    Args:
        n_mels: Bands of a state.
        width: Channels of a layer.
        codes: Number of codes.
        states: Hash of the map of states, see `flowkit.audio.MelStates`.

    Raises:
        ValueError: If a number is below 1.

    >>> PhoneRecognizer(64, width=8, codes=4).content(torch.randn(2, 64, 30)).shape
    torch.Size([2, 48, 30])
    """

    codebook: Tensor

    def __init__(self, n_mels: int, width: int = 128, codes: int = 64, states: str = "") -> None:
        super().__init__()
        for name, value in (("n_mels", n_mels), ("width", width), ("codes", codes)):
            check_integer(value, name, 1)
        self.config = {"n_mels": n_mels, "width": width, "codes": codes, "states": states}
        sizes = [n_mels, width, width, width]
        self.layers = nn.ModuleList(
            nn.Conv1d(inputs, outputs, 5, padding=2 * dilation, dilation=dilation)
            for (inputs, outputs), dilation in zip(pairwise(sizes), (1, 1, 2), strict=True)
        )
        self.norm, self.outputs = nn.LayerNorm(width), nn.Linear(width, len(PHONES))
        self.register_buffer("codebook", torch.zeros(codes, width))

    @property
    def channels(self) -> int:
        """Channels of the content."""
        return len(PHONES) + self.config["width"]

    @property
    def hash(self) -> str:
        """SHA-256 of all weights and codes."""
        return content_hash(self.state_dict())

    def hidden(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the last hidden frames ``(B, T, width)``; see `content`."""
        h, kept = states, None if mask is None else mask[:, None].to(states.dtype)
        for layer in self.layers:
            h = F.silu(layer(h if kept is None else h * kept))
        return self.norm(h.mT)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits of the phones ``(B, T, 40)`` of states ``(B, n_mels, T)``."""
        return self.outputs(self.hidden(states, mask))

    @torch.no_grad()
    def content(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the content ``(B, 40 + width, T)`` of states ``(B, n_mels, T)``.

        Args:
            states: States of log-mels.
            mask: Booleans ``(B, T)``, True for a frame; None means that all are.
        """
        hidden = self.hidden(states, mask)
        nearest = torch.cdist(hidden, self.codebook.expand(len(hidden), -1, -1)).argmin(-1)
        posteriors = self.outputs(hidden).softmax(-1)
        return torch.cat([posteriors, self.codebook[nearest]], -1).mT

    def fit_codes(self, frames: Tensor, seed: int = 0) -> None:
        """Take the centers of clusters of hidden frames ``(N, width)`` as codes.

        Raises:
            ValueError: If there are fewer frames than codes.
        """
        from sklearn.cluster import KMeans

        check_at_least(len(frames), len(self.codebook), "number of frames")
        once: Any = 1  # a number, whatever its stub says
        found = KMeans(len(self.codebook), n_init=once, random_state=seed, max_iter=ROUNDS)
        found.fit(np.asarray(frames.double()))
        self.codebook.copy_(torch.from_numpy(found.cluster_centers_))


@dataclass(frozen=True)
class Recognition:
    """Origin of the recognizer of a training: a file, or a short training on its speech.

    Args:
        path: File that `PhoneRecognizer.save` wrote; None trains one, and keeps it in the user's
            cache.
        width: Channels of a layer.
        codes: Number of codes.
        steps: Steps of the training.

    Raises:
        ValueError: If a number is out of range.
    """

    path: str | Path | None = None
    width: int = 128
    codes: int = 64
    steps: int = 1500

    def __post_init__(self) -> None:
        for name in ("width", "codes", "steps"):
            check_integer(getattr(self, name), name, 1)
        check_between(self.codes, 1, SAMPLE, "codes")

    def recognizer(self, speech: "Labeled", states: str) -> PhoneRecognizer:
        """Return the recognizer for labeled speech.

        Args:
            speech: States and phones of training utterances.
            states: Hash of the map of states.

        Raises:
            ValueError: If the recognizer of the file is for other states or has another size.
        """
        if self.path is not None:
            found = PhoneRecognizer.load(self.path)
            wanted = {"width": self.width, "codes": self.codes, "states": states}
            for name, value in wanted.items():
                if found.config[name] != value:
                    raise ValueError(
                        f"recognition.path must hold a recognizer with {name} {value}, got "
                        f"{found.config[name]} in {self.path}"
                    )
            return found
        own = [speech.key, states, self.width, self.codes, self.steps, PHONES]
        own += [WINDOW, ROWS, GAIN, WARP, LEARNING_RATE, DECAY, SAMPLE, ROUNDS]
        key = hashlib.sha256(json.dumps(own).encode()).hexdigest()
        return cached(
            cache_folder() / f"phones-{key[:16]}.safetensors",
            PhoneRecognizer.load,
            lambda: self._trained(speech, states),
            lambda file, net: net.save(file),
        )

    def _trained(self, speech: "Labeled", states: str) -> PhoneRecognizer:
        """Train by cross-entropy on windows of utterances, then choose the codes."""
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = PhoneRecognizer(speech.n_mels, self.width, self.codes, states)
        optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            x, phones, mask = speech.windows(generator)
            loss = F.cross_entropy(net(varied(x, generator), mask)[mask], phones[mask])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
        net.eval().requires_grad_(False)
        frames = []
        while sum(map(len, frames)) < SAMPLE:
            x, _, mask = speech.windows(generator)
            frames.append(net.hidden(x, mask)[mask])
        net.fit_codes(torch.cat(frames))
        return net


@dataclass(frozen=True, eq=False)
class Labeled:
    """Training utterances of a recognizer.

    Args:
        read: Returns the states ``(n_mels, T)`` of each utterance, and the number of the phone of
            each frame ``(T,)``, see `flowkit.audio.listening.PHONES`. It is called when needed.
        key: What the utterances depend on.
    """

    read: Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
    key: str

    @cached_property
    def utterances(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """States and phones of all utterances."""
        return self.read()

    @property
    def n_mels(self) -> int:
        """Bands of a state."""
        return len(self.utterances[0][0])

    @cached_property
    def _ends(self) -> Tensor:
        return torch.tensor([states.shape[1] for states in self.utterances[0]]).cumsum(0)

    def windows(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return windows ``(16, n_mels, 128)``, their phones and masks ``(16, 128)``.

        Each frame of the speech is as likely.
        """
        x, phones = torch.zeros(ROWS, self.n_mels, WINDOW), torch.zeros(ROWS, WINDOW).long()
        mask = torch.zeros(ROWS, WINDOW, dtype=torch.bool)
        places = torch.randint(int(self._ends[-1]), (ROWS,), generator=generator)
        rows = torch.searchsorted(self._ends, places, right=True).tolist()
        for k, (row, place) in enumerate(zip(rows, places.tolist(), strict=True)):
            own = self.utterances[0][row]
            at = place - int(self._ends[row]) + own.shape[1] - WINDOW // 2
            start = max(0, min(at, own.shape[1] - WINDOW))
            count = min(WINDOW, own.shape[1] - start)
            x[k, :, :count] = own[:, start : start + count]
            phones[k, :count], mask[k, :count] = (
                self.utterances[1][row][start : start + count],
                True,
            )
        return x, phones, mask


def varied(states: Tensor, generator: torch.Generator) -> Tensor:
    """Return states ``(B, n_mels, T)`` of other levels and of other lengths of the vocal tract.

    So a recognizer of few voices serves others. Frequencies are stretched along the bands by up to
    15 %, as in Jaitly and Hinton, *Vocal tract length perturbation improves speech recognition*,
    2013.
    """
    rows, bands, _ = states.shape
    factor = 1 + WARP * (2 * torch.rand(rows, 1, generator=generator) - 1)
    places = (torch.arange(bands) * factor).clamp(max=bands - 1)
    low = places.floor().long()
    share = (places - low)[..., None]
    high = (low + 1).clamp(max=bands - 1)
    index = torch.arange(rows)[:, None]
    warped = torch.lerp(states[index, low], states[index, high], share)
    return warped + GAIN * torch.randn(rows, 1, 1, generator=generator)
