"""Mixtures of sounds with a text that asks for one of them: the common part of such data."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from flowkit.audio import MelStates, TextEncoder, mix
from flowkit.checks import check_at_least, check_between
from flowkit.data.arrays import Index, positions
from flowkit.data.splits import SPLITS, SplitData
from flowkit.data.stream import keyed_generator
from flowkit.types import Batch

PEAKS = (-18.0, 0.0)  # dB; of a mixture, so that the level of a file does not matter


class Sources(Protocol):
    """Sounds of several kinds: instruments, or clips. Two sounds of one kind are never mixed."""

    captions: Sequence[Sequence[str]]
    """The texts that ask for each kind, at least one."""

    def draw(self, kind: int, samples: int, generator: torch.Generator) -> Tensor:
        """Return a sound ``(samples,)`` of a kind, which is not silent."""
        ...

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content."""
        ...


class Sounds(NamedTuple):
    """Mixtures as waves, with what is in them."""

    mixture: Tensor
    """Waves ``(B, S)`` in [-1, 1]."""
    target: Tensor
    """The sounds that are asked for, as they are in the mixtures ``(B, S)``."""
    captions: list[str]
    """The texts that ask for them."""
    absent: list[str]
    """Texts that ask for something that is not in the mixtures."""
    others: list[list[str]]
    """A text for each of the other sounds."""
    kinds: Tensor
    """Numbers of the kinds that are asked for ``(B,)``."""


@dataclass(frozen=True, eq=False)
class MixtureList:
    """Split of mixtures. Mixture ``k`` is drawn when it is read, and is always the same.

    A batch holds the states of the targets as ``x1``, and as ``cond`` those of the mixtures
    (``frames``) with the codes of the captions.

    Args:
        sources: The sounds.
        size: Number of mixtures.
        key: What the draws depend on beside the number: the name of the split, a seed.
        states: Map from waves to states.
        query: Encoder of captions.
        frames: Frames of a mixture.
        snr: Lowest and highest ratio of the target's energy to that of the others, in dB.
        most: Largest number of sounds in a mixture; smaller ones from 2 on are as frequent.
    """

    sources: Sources
    size: int
    key: tuple[str, int]
    states: MelStates
    query: TextEncoder
    frames: int
    snr: tuple[float, float]
    most: int

    def __len__(self) -> int:
        """Return the number of mixtures."""
        return self.size

    def __getitem__(self, index: Index) -> Batch:
        """Return mixtures as a batch."""
        sounds = self.sounds(index)
        return {
            "x1": self.states.of_waves(sounds.target),
            "cond": {"frames": self.states.of_waves(sounds.mixture), **self.query(sounds.captions)},
        }

    def sounds(self, index: Index) -> Sounds:
        """Return mixtures as waves."""
        drawn = [self._draw(k) for k in positions(index, self.size).tolist()]
        target, other = torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn])
        ratios, peaks = torch.tensor([d[2:4] for d in drawn]).T
        mixture, target = mix(target, other, ratios)
        gain = (10 ** (peaks / 20) / mixture.abs().amax(1))[:, None]
        gain = torch.minimum(gain, 1 / target.abs().amax(1, keepdim=True))
        texts = [d[5] for d in drawn]
        return Sounds(
            gain * mixture,
            gain * target,
            [named[0] for named in texts],
            [named[1] for named in texts],
            [named[2:] for named in texts],
            torch.tensor([d[4] for d in drawn]),
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the sounds and of all that the draws depend on."""
        own = [self.size, *self.key, self.frames, *self.snr, self.most, self.states.mel.hash]
        text = json.dumps([self.sources.fingerprint(), *own])
        return hashlib.sha256(text.encode()).hexdigest()

    def _draw(self, number: int) -> tuple[Tensor, Tensor, float, float, int, list[str]]:
        """Draw target, others, ratio, peak, kind, and texts: of it, an absent kind, others."""
        generator = keyed_generator(*self.key, number)
        samples = (self.frames - 1) * self.states.mel.hop
        count = int(torch.randint(2, self.most + 1, (), generator=generator))
        kinds: list[int] = []
        while len(kinds) <= count:  # the last one is in none
            kind = int(torch.randint(len(self.sources.captions), (), generator=generator))
            kinds += [kind] if kind not in kinds else []
        waves = [self.sources.draw(kind, samples, generator) for kind in kinds[:count]]
        other = torch.zeros(samples)
        for wave in waves[1:]:
            other += wave / wave.square().sum().sqrt()
        ratio, peak, *places = torch.rand(3 + count, generator=generator).tolist()
        texts = []
        for kind, place in zip((kinds[0], kinds[-1], *kinds[1:-1]), places, strict=True):
            wordings = self.sources.captions[kind]
            texts.append(wordings[int(place * len(wordings))])
        low, high = self.snr
        level = PEAKS[0] + peak * (PEAKS[1] - PEAKS[0])
        return waves[0], other, low + ratio * (high - low), level, kinds[0], texts


class Mixtures(SplitData):
    """Mixtures of sounds, each with a text that asks for one of them.

    Batches hold ``x1``, the log-mel states of the sound that is asked for, and ``cond`` with the
    states of the mixture as ``frames`` and the code of the text, see `flowkit.audio.TextEncoder`.
    Training mixtures are made on the fly. Each is a function of its number, so a resumed run reads
    those of an uninterrupted one, for any number of workers. Validation and test are fixed lists.

    Args:
        states: Map between log-mels and states.
        query: Encoder of texts.
        frames: Frames of a mixture, at least 8.
        snr: Lowest and highest ratio of the target's energy to that of the others, in dB.
        sounds: Largest number of sounds in a mixture, 2 or 3.
        train_mixtures: Number of different training mixtures.
        eval_mixtures: Number of mixtures for validation, and for test.
        split_seed: The seed of the splits and of all mixtures.
        batch_size: Samples per process and training step.
        seed: The seed of the order of training.
        num_workers: Processes that prepare batches in advance; 0 means the main process.

    Attributes:
        classes: Names of the kinds of sounds, which are the same in all splits; None for sounds
            without classes, such as clips.

    Raises:
        ValueError: If a value is out of range.
    """

    recipe = "separate"
    classes: Sequence[str] | None = None

    def __init__(
        self,
        states: MelStates,
        query: TextEncoder,
        frames: int = 256,
        snr: Sequence[float] = (-15.0, 15.0),
        sounds: int = 2,
        train_mixtures: int = 1_000_000,
        eval_mixtures: int = 256,
        split_seed: int = 0,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        check_at_least(frames, 8, "frames")
        check_between(sounds, 2, 3, "sounds")
        check_at_least(train_mixtures, 1, "train_mixtures")
        check_at_least(eval_mixtures, 1, "eval_mixtures")
        low, high = snr
        check_between(low, -60, high, "snr[0]")
        check_between(high, low, 60, "snr[1]")
        self.states, self.query, self.frames = states, query, frames
        self.snr, self.most, self.split_seed = (float(low), float(high)), sounds, split_seed
        self.counts = {"train": train_mixtures, "val": eval_mixtures, "test": eval_mixtures}

    @abstractmethod
    def sources(self) -> Mapping[str, Sources]:
        """Return the sounds of each split."""
        raise NotImplementedError

    def load(self) -> Mapping[str, MixtureList]:
        """Read the sounds."""
        found = self.sources()
        for name in SPLITS:
            if (kinds := len(found[name].captions)) <= self.most:
                raise ValueError(
                    f"sounds must be below the number of kinds of sounds, got {self.most} for "
                    f"{kinds} in {name}; give more clips, or this split a larger share"
                )
        return {
            name: MixtureList(
                found[name],
                self.counts[name],
                (name, self.split_seed),
                self.states,
                self.query,
                self.frames,
                self.snr,
                self.most,
            )
            for name in SPLITS
        }

    def listed(self, name: str) -> MixtureList:
        """Return a split with its waves."""
        return cast(MixtureList, self.split(name))

    def record(self) -> dict[str, Any]:
        """Return what a run keeps about its data, with the hashes of spectrogram and encoder."""
        return {**super().record(), "preprocessing": self.hashes()}

    def hashes(self) -> dict[str, str]:
        """Return the hashes of the map of states and of the encoder of texts."""
        return {"states": self.states.hash, "query": self.query.hash}
