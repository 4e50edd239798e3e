"""A folder of recordings of several speakers, in the layouts of LibriTTS and VCTK."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flowkit.audio import MelStates, Recognition, SpeakerEncoder, read_audio
from flowkit.audio.listening import Segments, align
from flowkit.audio.voices import SHORTEST
from flowkit.data.broken import verify_audio
from flowkit.data.files import check_root, file_hashes, is_hidden, split_files
from flowkit.data.speech import RATE, Speech
from flowkit.data.splits import SPLITS
from flowkit.provenance import read_bounded

SUFFIXES = frozenset({".flac", ".mp3", ".ogg", ".opus", ".wav"})
TEXTS = (".normalized.txt", ".original.txt", ".txt", ".lab")
SECOND = "_mic2"  # of VCTK: the same utterance by another microphone
SUBSETS = {"train": "train", "dev": "val", "val": "val", "test": "test"}  # how folders begin


@dataclass(frozen=True, eq=False)
class Recorded:
    """Recordings of a folder. A file is read when it is needed.

    Args:
        root: The folder.
        files: The files.
        hashes: The SHA-256 of each file.
        names: The speakers.
        speakers: Number of the speaker of each file.
        texts: What is said in each file, or None.
    """

    root: Path
    files: Sequence[str]
    hashes: Sequence[str]
    names: Sequence[str]
    speakers: Sequence[int]
    texts: Sequence[str | None]

    def wave(self, number: int) -> Tensor:
        """Return the wave of a file."""
        return read_audio(self.root / self.files[number], RATE)

    def segments(self, number: int) -> Segments | None:
        """Return the phones of a file by an alignment with its text."""
        text = self.texts[number]
        return None if text is None else align(self.wave(number), text)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all files, speakers and texts."""
        own = [list(self.hashes), [self.names[k] for k in self.speakers], list(self.texts)]
        return hashlib.sha256(json.dumps(own).encode()).hexdigest()


class SpeechFolder(Speech):
    """Recordings of several speakers in a folder.

    The speaker of a file is the folder whose name the file's name begins with, as in LibriTTS
    (``84/121123/84_121123_000007_000001.wav``) and VCTK (``wav48/p225/p225_001.wav``); without such
    a folder it is the first one, below a folder of a split. The text, which may be missing, is
    beside the file with the ending ``.normalized.txt``, ``.txt`` or ``.lab``, or in
    ``txt/<speaker>/`` as in VCTK. Texts serve the recognizer of phones and the word error rate,
    never the conversion.

    Folders ``train…``, ``dev…`` and ``test…`` at the top, as of LibriTTS, are the splits. Else a
    file's split follows from its name and content. Recordings below half a second are left out.

    Args:
        states: Map between log-mels and states.
        speaker: Encoder of voices.
        root: The folder.
        recognition: Origin of the recognizer of phones.
        val_fraction: The share of the validation split, without folders of splits.
        test_fraction: The share of the test split.
        settings: The other arguments, see `Speech`.

    Raises:
        FileNotFoundError: On ``setup``, if there is no such folder.
        ValueError: On ``setup``, if it holds no recordings, or a file no sound.
    """

    def __init__(
        self,
        states: MelStates,
        speaker: SpeakerEncoder,
        root: str | Path,
        recognition: Recognition = Recognition(),
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
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
        self.root = Path(root)
        self.fractions = {"val": val_fraction, "test": test_fraction}

    def utterances(self) -> Mapping[str, Recorded]:
        """Return the recordings of each split."""
        check_root(self.root)
        found = find_recordings(self.root)
        lengths = verify_audio(self.root / name for name in found)
        files = [name for name, long in zip(found, lengths, strict=True) if long >= SHORTEST]
        if short := len(found) - len(files):
            self.notes = [f"{short} recordings below {SHORTEST} s left out"]
        if not files:
            kinds = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"root must hold recordings ({kinds}), got none in {self.root}")
        hashes = file_hashes(self.root, files)
        given = subsets(files)
        parts, notes = split_files(
            files, hashes, given, self.fractions, self.split_seed, self.known
        )
        self.notes = [*self.notes, *notes]
        speakers = speakers_of(files, given)
        owner = {k: split for split in SPLITS for k in parts[split].tolist()}
        self.files = {name: (hashes[k], owner.get(k)) for k, name in enumerate(files)}
        return {
            split: self._recorded(sorted(parts[split].tolist()), files, hashes, speakers)
            for split in SPLITS
        }

    def _recorded(
        self,
        rows: Sequence[int],
        files: Sequence[str],
        hashes: Sequence[str],
        speakers: Sequence[str],
    ) -> Recorded:
        """Return the recordings of some rows."""
        own, names = [files[k] for k in rows], sorted(set(speakers))
        return Recorded(
            self.root,
            own,
            [hashes[k] for k in rows],
            names,
            [names.index(speakers[k]) for k in rows],
            [text_of(self.root, name) for name in own],
        )


def find_recordings(root: Path) -> list[str]:
    """Return the recordings below a folder, sorted; not those of a second microphone."""
    found = []
    for file in root.rglob("*"):
        name = file.relative_to(root)
        if file.suffix.lower() in SUFFIXES and not any(map(is_hidden, name.parts)):
            found += [name.as_posix()] * (not file.stem.endswith(SECOND))
    return sorted(found)


def speaker_of(name: str) -> str:
    """Return the speaker of a file.

    >>> speaker_of("dev/84/121123/84_121123_000007.wav"), speaker_of("wav48/p225/p225_001.flac")
    ('84', 'p225')
    >>> speaker_of("anna/hello.wav")
    'anna'
    """
    path = Path(name)
    for folder in path.parts[:-1]:
        if path.stem.startswith((f"{folder}_", f"{folder}-")):
            return folder
    return path.parts[0] if len(path.parts) > 1 else ""


def speakers_of(files: Sequence[str], given: Mapping[str, str] | None) -> list[str]:
    """Return the speaker of each file; folders of splits are no speakers.

    Args:
        files: The files.
        given: Result of `subsets`.

    >>> speakers_of(["train/anna/a.wav", "test/bob/b.wav"], {"train": "train", "test": "test"})
    ['anna', 'bob']
    """
    return [speaker_of(name if given is None else name.partition("/")[2]) for name in files]


def text_of(root: Path, name: str) -> str | None:
    """Return the text of a recording, or None."""
    file, stem = root / name, Path(name).stem.removesuffix("_mic1")
    places = [file.with_name(f"{stem}{ending}") for ending in TEXTS]
    for place in (*places, root / "txt" / speaker_of(name) / f"{stem}.txt"):
        if place.is_file():
            return " ".join(read_bounded(place).split()) or None
    return None


def subsets(files: Sequence[str]) -> dict[str, str] | None:
    """Return the split of each folder at the top, if all of them are splits and one is train.

    >>> subsets(["train-clean-100/84/1/84_1.wav", "dev-clean/85/1/85_1.wav"])
    {'dev-clean': 'val', 'train-clean-100': 'train'}
    >>> subsets(["p225/p225_001.wav"]) is None
    True
    """
    found: dict[str, str] = {}
    for folder in sorted({name.partition("/")[0] for name in files}):
        begins = [split for word, split in SUBSETS.items() if folder.lower().startswith(word)]
        if not begins:
            return None
        found[folder] = begins[0]
    return found if "train" in found.values() else None
