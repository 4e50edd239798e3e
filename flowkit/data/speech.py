"""Windows of speech with a reference of the same voice: the common part of such data."""

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.audio import MelStates, PhoneRecognizer, Recognition, SpeakerEncoder
from flowkit.audio.content import Labeled
from flowkit.audio.listening import Segments, phones_at
from flowkit.audio.voices import LEVEL, leveled
from flowkit.checks import check_at_least, check_choice
from flowkit.data.arrays import Index, positions
from flowkit.data.splits import SPLITS, SplitData
from flowkit.data.stream import keyed_generator
from flowkit.types import Batch

RATE = 16000  # of the encoder of voices and of the recognizers
LEARNED = 1000  # utterances that a recognizer of phones learns from


class Utterances(Protocol):
    """Utterances of several speakers."""

    names: Sequence[str]
    """Names of the speakers."""
    speakers: Sequence[int]
    """Number of the speaker of each utterance."""
    texts: Sequence[str | None]
    """What is said in each utterance; None where it is not known."""

    def wave(self, number: int) -> Tensor:
        """Return the wave ``(T,)`` of an utterance."""
        ...

    def segments(self, number: int) -> Segments | None:
        """Return the phones of an utterance, None where they are not known."""
        ...

    def fingerprint(self) -> str:
        """Return the SHA-256 of the content."""
        ...


class Pair(NamedTuple):
    """A conversion to measure, by the numbers of utterances."""

    source: int
    """What is to be said."""
    reference: int
    """An utterance of the target voice, of another text if there is one."""
    truth: int | None
    """The same text in the target voice, if there is such an utterance."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Split of windows of utterances. Window ``k`` is drawn when it is read, always the same.

    A batch holds the states of a window as ``x1`` and again as ``cond["frames"]``, the source; the
    embedding of another utterance of its speaker as ``cond["vector"]``, and a window of that one as
    ``cond["tokens"]``. An utterance that is shorter than the window is padded, with masks
    ``mask``, ``cond["frame_mask"]`` and ``cond["token_mask"]``.

    Args:
        utterances: The utterances.
        size: Number of windows.
        key: What the draws depend on beside the number: the name of the split, a seed.
        states: Map from waves to states.
        speaker: Encoder of voices.
        frames: Frames of a window.
        reference: Frames of a reference.
    """

    utterances: Utterances
    size: int
    key: tuple[str, int]
    states: MelStates
    speaker: SpeakerEncoder
    frames: int
    reference: int
    _known: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of windows."""
        return self.size

    def __getitem__(self, index: Index) -> Batch:
        """Return windows as a batch."""
        drawn = [self._draw(k) for k in positions(index, self.size).tolist()]
        x1, mask = (torch.stack(part) for part in zip(*(d[0] for d in drawn), strict=True))
        tokens, token_mask = (
            torch.stack(part) for part in zip(*(d[1] for d in drawn), strict=True)
        )
        cond = {
            "frames": x1,
            "frame_mask": mask,
            "vector": torch.stack([self.embedding(d[2]) for d in drawn]),
            "tokens": tokens.mT,
            "token_mask": token_mask,
        }
        return {"x1": x1, "cond": cond, "mask": mask[:, None].to(x1.dtype)}

    def wave(self, number: int) -> Tensor:
        """Return an utterance ``(T,)`` at the level of all speech."""
        return leveled(self.utterances.wave(number))

    def embedding(self, number: int) -> Tensor:
        """Return the vector of the voice in an utterance; it is kept."""
        if number not in self._known:
            self._known[number] = self.speaker([self.utterances.wave(number)])[0]
        return self._known[number]

    def of_speaker(self, speaker: int) -> list[int]:
        """Return the numbers of the utterances of a speaker."""
        return [k for k, one in enumerate(self.utterances.speakers) if one == speaker]

    def pairs(self, count: int, targets: Sequence[str] | None = None) -> list[Pair]:
        """Return conversions between different speakers, drawn with the seed of the split.

        Args:
            count: Number of conversions.
            targets: Names of the speakers to convert to; None means all.

        Raises:
            ValueError: If there is one speaker only, or none of a name.
        """
        speakers, texts = self.utterances.speakers, self.utterances.texts
        check_at_least(len(set(speakers)), 2, "number of speakers")
        names = self.utterances.names
        known = [names[speaker] for speaker in sorted({*speakers})]
        chosen = known if targets is None else targets
        check_at_least(len(chosen), 1, "number of targets")
        for name in chosen:
            check_choice(name, known, "each of targets")
        allowed = {speaker for speaker in speakers if names[speaker] in chosen}
        sources = [k for k, speaker in enumerate(speakers) if allowed - {speaker}]
        found = []
        for k in range(count):
            generator = keyed_generator(*self.key, "pair", k)
            source = sources[int(torch.randint(len(sources), (), generator=generator))]
            others = sorted(allowed - {speakers[source]})
            target = others[int(torch.randint(len(others), (), generator=generator))]
            own, text = self.of_speaker(target), texts[source]
            truth = next((j for j in own if text is not None and texts[j] == text), None)
            own = [j for j in own if text is None or texts[j] != text] or own
            place = int(torch.randint(len(own), (), generator=generator))
            found.append(Pair(source, own[place], truth))
        return found

    def fingerprint(self) -> str:
        """Return the SHA-256 of the utterances and of all that the draws depend on."""
        own = [self.size, *self.key, self.frames, self.reference, self.states.hash]
        text = json.dumps([self.utterances.fingerprint(), *own])
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _others(self) -> dict[int, list[int]]:
        return {speaker: self.of_speaker(speaker) for speaker in set(self.utterances.speakers)}

    def _draw(self, number: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
        """Draw states and mask of a window, those of a reference, and whose utterance it is."""
        generator = keyed_generator(*self.key, number)
        speakers = self.utterances.speakers
        row = int(torch.randint(len(speakers), (), generator=generator))
        own = self._others[speakers[row]]
        place = int(torch.randint(max(1, len(own) - 1), (), generator=generator))
        other = [*(k for k in own if k != row), row][place]
        places = torch.rand(2, generator=generator).tolist()
        window = self._window(row, self.frames, places[0])
        return window, self._window(other, self.reference, places[1]), other

    def _window(self, number: int, frames: int, place: float) -> tuple[Tensor, Tensor]:
        """Return states ``(n_mels, frames)`` of a part of an utterance, and their mask."""
        wave, mel = self.wave(number), self.states.mel
        first = int(place * (max(0, mel.frames(len(wave)) - frames) + 1))
        beyond = -(-mel.n_fft // (2 * mel.hop))  # frames that hear samples of their neighbors
        begin = max(0, first - beyond)
        heard = wave[None, begin * mel.hop : (first + frames - 1 + beyond) * mel.hop]
        found = self.states.of_waves(heard)[0][:, first - begin :][:, :frames]
        count = found.shape[1]
        padded = F.pad(found, (0, frames - count), value=self.states.silence)
        return padded, torch.arange(frames) < count


class Speech(SplitData):
    """Speech of several voices, to learn to say the same in another voice.

    The source of a training window is the window itself, without its voice: the network sees its
    *content* alone. The voice comes from another utterance of the speaker. So no two voices must
    say the same, and any utterance can be the source later.

    Batches hold ``x1``, log-mel states of windows, and ``cond``, see `Windows`. Training windows
    are cut on the fly, each a function of its number, so a resumed run reads those of an
    uninterrupted one. Validation and test are fixed lists.

    Args:
        states: Map between log-mels and states, of sequences.
        speaker: Encoder of voices.
        recognition: Origin of the recognizer of phones.
        frames: Frames of a window, at least 8.
        reference: Frames of a reference, at least 8.
        train_windows: Number of different training windows.
        eval_windows: Number of windows for validation, and for test.
        split_seed: The seed of the splits and of all windows.
        batch_size: Samples per process and training step.
        seed: The seed of the order of training.
        num_workers: Processes that prepare batches in advance; 0 means the main process.

    Raises:
        ValueError: If a value is out of range.
    """

    recipe = "convert"

    def __init__(
        self,
        states: MelStates,
        speaker: SpeakerEncoder,
        recognition: Recognition = Recognition(),
        frames: int = 128,
        reference: int = 96,
        train_windows: int = 1_000_000,
        eval_windows: int = 128,
        split_seed: int = 0,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        check_at_least(frames, 8, "frames")
        check_at_least(reference, 8, "reference")
        check_at_least(train_windows, 1, "train_windows")
        check_at_least(eval_windows, 1, "eval_windows")
        if states.layout != "sequence":
            raise ValueError(f"states.layout must be sequence for speech, got {states.layout}")
        if states.mel.rate != RATE:
            raise ValueError(f"states.mel.rate must be {RATE} for speech, got {states.mel.rate}")
        self.states, self.speaker, self.recognition = states, speaker, recognition
        self.frames, self.reference, self.split_seed = frames, reference, split_seed
        self.counts = {"train": train_windows, "val": eval_windows, "test": eval_windows}

    @abstractmethod
    def utterances(self) -> Mapping[str, Utterances]:
        """Return the utterances of each split."""
        raise NotImplementedError

    def load(self) -> Mapping[str, Windows]:
        """Read the utterances.

        Raises:
            ValueError: If a speaker has a single utterance for training.
        """
        found = self.utterances()
        for number, count in Counter(found["train"].speakers).items():
            if count < 2:
                raise ValueError(
                    "data must have 2 utterances of each speaker to train on, since one is the "
                    f"reference of the other, got {count} of {found['train'].names[number]}"
                )
        return {
            name: Windows(
                found[name],
                self.counts[name],
                (name, self.split_seed),
                self.states,
                self.speaker,
                self.frames,
                self.reference,
            )
            for name in SPLITS
        }

    def listed(self, name: str) -> Windows:
        """Return a split with its utterances."""
        return cast(Windows, self.split(name))

    @cached_property
    def recognizer(self) -> PhoneRecognizer:
        """The recognizer of phones, trained on the training utterances or read from a file.

        Raises:
            ValueError: If no utterance has known phones.
        """
        utterances, mel = self.listed("train").utterances, self.states.mel
        key = f"{utterances.fingerprint()} {LEARNED} {LEVEL}"
        order = torch.randperm(len(utterances.speakers), generator=keyed_generator(0, "phones"))

        def labeled() -> tuple[list[Tensor], list[Tensor]]:
            states, phones = [], []
            for number in order[:LEARNED].tolist():
                segments = utterances.segments(number)
                if segments is None:
                    continue
                states.append(self.states.of_waves(leveled(utterances.wave(number))[None])[0])
                times = torch.arange(states[-1].shape[1]) * mel.hop / mel.rate
                phones.append(phones_at(segments, times))
            if not states:
                raise ValueError(
                    "data must have texts that fit the recordings to train a recognizer of "
                    "phones, got none; give the file of one as data.recognition.path"
                )
            return states, phones

        return self.recognition.recognizer(Labeled(labeled, key), self.states.hash)

    def record(self) -> dict[str, Any]:
        """Return what a run keeps about its data, with the hashes of spectrogram and encoder."""
        return {**super().record(), "preprocessing": self.hashes()}

    def hashes(self) -> dict[str, str]:
        """Return the hashes of the map of states and of the encoder of voices."""
        return {"states": self.states.hash, "speaker": self.speaker.hash}
