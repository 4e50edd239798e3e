"""Synthetic voices that read the same sentences, spoken by flite."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowkit.audio import MelStates, Recognition, SpeakerEncoder, read_audio
from flowkit.audio.listening import Segments, phone_number
from flowkit.data.sentences import SENTENCES
from flowkit.data.speech import RATE, Speech
from flowkit.data.stream import keyed_generator
from flowkit.provenance import cache_folder, cached, content_hash

VOICES = ("kal16", "awb", "rms", "slt")
FRACTIONS = {"test": 0.15, "val": 0.05}  # of the sentences
APT = "apt-get install flite"
VERSION = 2  # of what `speak` returns, raised when that changes: it is kept in a cache


@dataclass(frozen=True, eq=False)
class Spoken:
    """Utterances of synthetic voices.

    Args:
        names: The voices.
        speakers: Number of the voice of each utterance.
        texts: What is said.
        waves: Waves ``(T,)`` of int16.
        phones: Rows of phone and end in milliseconds ``(N, 2)`` of each utterance.
    """

    names: Sequence[str]
    speakers: Sequence[int]
    texts: Sequence[str]
    waves: Sequence[Tensor]
    phones: Sequence[Tensor]

    def wave(self, number: int) -> Tensor:
        """Return the wave of an utterance."""
        return self.waves[number] / 2**15

    def segments(self, number: int) -> Segments:
        """Return the phones of an utterance."""
        return [(phone, end / 1000) for phone, end in self.phones[number].tolist()]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all waves, phones and texts."""
        columns = {f"wave {k}": wave for k, wave in enumerate(self.waves)}
        columns |= {f"phones {k}": rows for k, rows in enumerate(self.phones)}
        return content_hash(columns, json.dumps([self.names, self.speakers, self.texts]))


class SyntheticVoices(Speech):
    """Four voices of flite read 479 sentences; all that is said is known to the phone.

    The voices *kal16* (joined pieces of recordings), *awb*, *rms* and *slt* (statistical) are in
    Debian's package ``flite``. They are rendered once and kept in the user's cache. The splits
    divide the sentences, so test sentences are new, and each is there in all voices: the truth of
    a conversion.

    Args:
        states: Map between log-mels and states.
        speaker: Encoder of voices.
        recognition: Origin of the recognizer of phones.
        voices: The voices, at least 2.
        unseen: Voices among them that only the test split has.
        sentences: The first so many sentences.
        settings: The other arguments, see `Speech`.

    Raises:
        ValueError: If there are too few voices or sentences, or an unseen voice is not among them.
        FileNotFoundError: On ``setup``, if flite is not installed.
        RuntimeError: On ``setup``, if flite fails.
    """

    def __init__(
        self,
        states: MelStates,
        speaker: SpeakerEncoder,
        recognition: Recognition = Recognition(),
        voices: Sequence[str] = VOICES,
        unseen: Sequence[str] = (),
        sentences: int = len(SENTENCES),
        frames: int = 128,
        reference: int = 96,
        train_windows: int = 1_000_000,
        eval_windows: int = 128,
        split_seed: int = 0,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            states,
            speaker,
            recognition,
            frames,
            reference,
            train_windows,
            eval_windows,
            split_seed,
            batch_size,
            seed,
            num_workers,
        )
        self.voices, self.unseen = list(voices), list(unseen)
        if len(set(voices)) != len(self.voices) or len(self.voices) < 2:
            raise ValueError(f"voices must be at least 2 different names, got {self.voices}")
        if others := sorted({*self.unseen} - {*self.voices}):
            raise ValueError(f"unseen must be among the voices {self.voices}, got {others}")
        if len(self.unseen) >= len(self.voices):
            raise ValueError("unseen must leave a voice for the training, got all of them")
        if not 4 <= sentences <= len(SENTENCES):
            raise ValueError(f"sentences must lie in [4, {len(SENTENCES)}], got {sentences}")
        self.sentences = sentences

    @cached_property
    def parts(self) -> dict[str, list[int]]:
        """The numbers of the sentences in each split."""
        count = self.sentences
        order = torch.randperm(
            count, generator=keyed_generator(self.split_seed, "sentences")
        ).tolist()
        tests, vals = (max(1, round(FRACTIONS[split] * count)) for split in ("test", "val"))
        parts = {"train": order[tests + vals :], "val": order[tests:][:vals], "test": order[:tests]}
        return {split: sorted(part) for split, part in parts.items()}

    def utterances(self) -> Mapping[str, Spoken]:
        """Return the utterances of each split."""
        stored = {voice: self._rendered(voice) for voice in self.voices}
        found = {}
        for split, numbers in self.parts.items():
            voices = [v for v in self.voices if split == "test" or v not in self.unseen]
            rows = [(self.voices.index(v), v, k) for v in voices for k in numbers]
            found[split] = Spoken(
                self.voices,
                [speaker for speaker, _, _ in rows],
                [SENTENCES[k] for _, _, k in rows],
                [stored[v][f"wave {k}"] for _, v, k in rows],
                [stored[v][f"phones {k}"] for _, v, k in rows],
            )
        return found

    def _rendered(self, voice: str) -> dict[str, Tensor]:
        """Return waves and phones of a voice, from the cache or by flite."""
        texts = SENTENCES[: self.sentences]
        key = hashlib.sha256(json.dumps([VERSION, voice, texts]).encode()).hexdigest()[:16]
        file = cache_folder() / f"voice-{voice}-{key}.safetensors"
        return cached(file, load_file, lambda: speak(voice, texts), lambda p, x: save_file(x, p))


def speak(voice: str, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return what flite says: ``wave k`` of int16 at 16 kHz, and ``phones k``, see `Spoken`.

    Raises:
        FileNotFoundError: If flite is not installed.
        RuntimeError: If it fails, or has no such voice.
    """
    command = which("flite")
    if command is None:
        raise FileNotFoundError(f"flite must be installed, got none; {APT}")
    known = subprocess.run([command, "-lv"], capture_output=True, text=True, check=False).stdout
    if voice not in known.partition(":")[2].split():  # it would speak with another one
        raise RuntimeError(f"flite must have the voice {voice}, got {' '.join(known.split())}")
    found = {}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "said.wav"
        for k, text in enumerate(texts):
            words = [command, "-voice", voice, "-t", text, "-psdur", "-o", str(out)]
            ended = subprocess.run(words, capture_output=True, text=True, check=False)
            if ended.returncode or not out.is_file():
                told = " ".join(ended.stderr.split()) or "no output"
                raise RuntimeError(f"flite must say {text!r}, got {told}")
            wave = read_audio(out, RATE)
            names, ends = zip(*(part.split(":") for part in ended.stdout.split()), strict=True)
            last = 1000 * len(wave) / RATE  # kal16 ends a tenth of a second sooner than it plans
            found[f"wave {k}"] = (wave * (2**15 - 1)).round().short()
            found[f"phones {k}"] = torch.tensor(
                [
                    [phone_number(name), round(min(1000 * float(end), last))]
                    for name, end in zip(names, ends, strict=True)
                ]
            )
    return found
