"""Mixtures of sound clips with captions: a folder, and a table of files and captions."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit.audio import MelStates, TextEncoder, read_audio
from flowkit.data.broken import verify_audio
from flowkit.data.files import check_root, file_hashes, split_files
from flowkit.data.mixtures import Mixtures
from flowkit.data.splits import SPLITS
from flowkit.provenance import parse_json, read_bounded

FILE_NAMES = ("file", "youtube_id", "id", "wav", "audio")  # of the column of files, in this order
SUFFIXES = ("", ".wav", ".flac", ".ogg", ".mp3")
PREFIXES = ("", "Y")  # copies of AudioCaps begin names with Y, since an id may begin with a dash
Row = tuple[str, str, str | None]


@dataclass(frozen=True, eq=False)
class Clips:
    """Clips of a folder. A clip is read when it is drawn.

    Args:
        root: The folder.
        names: The files.
        hashes: The SHA-256 of each file.
        captions: The captions of each file.
        rate: Samples per second.
    """

    root: Path
    names: Sequence[str]
    hashes: Sequence[str]
    captions: Sequence[Sequence[str]]
    rate: int

    def draw(self, kind: int, samples: int, generator: torch.Generator) -> Tensor:
        """Return a part of a clip, with its loudest sample if the part would be silent.

        A shorter clip is put at a random place, with silence around it.
        """
        wave = read_audio(self.root / self.names[kind], self.rate)
        place = float(torch.rand((), generator=generator))
        spare = len(wave) - samples
        if spare < 0:
            before = int(place * (1 - spare))
            return torch.nn.functional.pad(wave, (before, -spare - before))
        start = int(place * (spare + 1))
        if not bool(wave[start : start + samples].any()):
            start = min(spare, max(0, int(wave.abs().argmax()) - samples // 2))
        return wave[start : start + samples]

    def fingerprint(self) -> str:
        """Return the SHA-256 of all files and captions."""
        text = json.dumps([self.rate, list(self.hashes), self.captions])
        return hashlib.sha256(text.encode()).hexdigest()


class CaptionedAudio(Mixtures):
    """Mixtures of clips of a folder; the caption of a clip asks for it.

    The table is a CSV file with a line of names, or a JSON file with a list ``data``. The files are
    in the column ``file`` (or ``youtube_id``, ``id``, ``wav``, ``audio``), the captions in
    ``caption``; a column ``split`` may hold train, val or test. So the tables of AudioCaps and
    WavCaps serve as they are. Endings may be missing. A file may have several rows, with a caption
    each. Without a column of splits a file's split follows from its name and content, so new files
    move no other.

    Args:
        states: Map between log-mels and states.
        query: Encoder of texts.
        root: The folder of the clips.
        captions: The table; None means ``captions.csv`` in the folder.
        val_fraction: The share of the validation split, without a column of splits.
        test_fraction: The share of the test split.
        settings: The other arguments, see `Mixtures`.

    Raises:
        FileNotFoundError: On ``setup``, if folder, table or a file of a row is missing.
        ValueError: On ``setup``, if a row has no caption, the table another form, or files are no
            recordings by their heads, which names all of them.
    """

    def __init__(
        self,
        states: MelStates,
        query: TextEncoder,
        root: str | Path,
        captions: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
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
        super().__init__(
            states,
            query,
            frames,
            snr,
            sounds,
            train_mixtures,
            eval_mixtures,
            split_seed,
            batch_size,
            seed,
            num_workers,
        )
        self.root = Path(root)
        self.captions = None if captions is None else Path(captions)
        self.fractions = {"val": val_fraction, "test": test_fraction}

    def sources(self) -> Mapping[str, Clips]:
        """Return the clips of each split."""
        check_root(self.root)
        table = self.root / "captions.csv" if self.captions is None else self.captions
        texts: dict[str, list[str]] = {}
        given: dict[str, str | None] = {}
        for name, caption, split in read_captions(table, self.root):
            texts.setdefault(name, []).append(caption)
            given[name] = split
        names = sorted(texts)
        verify_audio(self.root / name for name in names)
        hashes = file_hashes(self.root, names)
        parts = {
            split: [k for k, name in enumerate(names) if given[name] == split] for split in SPLITS
        }
        if not any(parts.values()):
            found, notes = split_files(
                names, hashes, None, self.fractions, self.split_seed, self.known
            )
            parts = {split: sorted(rows.tolist()) for split, rows in found.items()}
            self.notes = notes
        owner = {k: split for split, rows in parts.items() for k in rows}
        self.files = {name: (hashes[k], owner.get(k)) for k, name in enumerate(names)}
        return {
            split: Clips(
                self.root,
                [names[k] for k in rows],
                [hashes[k] for k in rows],
                [texts[names[k]] for k in rows],
                self.states.mel.rate,
            )
            for split, rows in parts.items()
        }


def read_captions(table: Path, root: Path) -> list[Row]:
    """Return file, caption and split of each row of a table.

    Args:
        table: CSV file with a line of names, or JSON file with a list ``data`` of mappings.
        root: The folder of the files.

    Raises:
        FileNotFoundError: If the table, or a file of a row, is missing.
        ValueError: If the table has another form, or a row no caption.
    """
    if not table.is_file():
        raise FileNotFoundError(f"captions must be a file, got {table}; write file,caption rows")
    text = read_bounded(table)
    if table.suffix.lower() == ".json":
        content = parse_json(text, table)
        rows = content.get("data") if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"captions must hold a list data of mappings, got {table}")
    else:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if not rows:
        raise ValueError(f"captions must hold rows, got none in {table}")
    column = next((name for name in FILE_NAMES if name in rows[0]), None)
    if column is None or "caption" not in rows[0]:
        raise ValueError(
            f"captions must have columns file and caption, got {', '.join(map(str, rows[0]))} in "
            f"{table}"
        )
    return [_row(row, column, number, table, root) for number, row in enumerate(rows, start=1)]


def _row(row: Mapping[str, Any], column: str, number: int, table: Path, root: Path) -> Row:
    """Return file, caption and split of a row."""
    where = f"row {number} of {table}"
    caption, split = str(row.get("caption") or "").strip(), row.get("split") or None
    if not caption:
        raise ValueError(f"caption must be given in each row, got none in {where}")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split} in {where}")
    name = str(row.get(column) or "").strip()
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{column} must name a file in {root}, got {name!r} in {where}")
    for prefix in PREFIXES:
        for suffix in SUFFIXES:
            found = str(Path(name).with_name(f"{prefix}{Path(name).name}{suffix}"))
            if (root / found).is_file():
                return found, caption, split
    raise FileNotFoundError(f"{column} must name a file in {root}, got {name} in {where}")
