"""Mixtures of sampled instruments, rendered from a soundfont."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowkit.audio import MelStates, TextEncoder, resample
from flowkit.checks import check_between
from flowkit.data.files import file_hashes
from flowkit.data.mixtures import Mixtures
from flowkit.data.soundfonts import render, samples_of_keys
from flowkit.data.stream import keyed_generator
from flowkit.provenance import cache_folder, cached, content_hash

DEBIAN_SOUNDFONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
PLAYED = {  # program of General MIDI from 0, and the lowest and highest key
    "piano": (0, 43, 84),
    "harpsichord": (6, 43, 84),
    "vibraphone": (11, 53, 88),
    "church organ": (19, 43, 84),
    "acoustic guitar": (24, 43, 79),
    "violin": (40, 56, 90),
    "cello": (42, 40, 75),
    "harp": (46, 43, 84),
    "trombone": (57, 44, 74),
    "alto saxophone": (65, 50, 80),
    "clarinet": (71, 50, 84),
    "flute": (73, 60, 90),
}
VELOCITIES = (64, 110)
HELD, SLOT = 1.0, 1.6  # seconds until a note is released, and until it has faded
TUNED = 3  # copies of each training note at other pitches
FRACTIONS = {"test": 0.2, "val": 0.1}  # of the recordings of an instrument


def wordings(name: str) -> list[str]:
    """Return texts that ask for an instrument.

    >>> wordings("alto saxophone")[:2]
    ['alto saxophone', 'an alto saxophone']
    """
    one = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return [
        name,
        one,
        f"the sound of {one}",
        f"{name} music",
        f"someone plays the {name}",
        f"{one} is playing",
    ]


@dataclass(frozen=True, eq=False)
class Notes:
    """Sounds of instruments: a few of their notes in the window, at random times.

    Args:
        waves: Notes ``(N, S)`` of int16 of each instrument.
        captions: The texts that ask for each instrument.
        rate: Samples per second.
    """

    waves: Sequence[Tensor]
    captions: Sequence[Sequence[str]]
    rate: int

    def draw(self, kind: int, samples: int, generator: torch.Generator) -> Tensor:
        """Return one to four notes of an instrument; the first begins in the first half."""
        notes = self.waves[kind]
        count = int(torch.randint(1, 5, (), generator=generator))
        which = torch.randint(len(notes), (count,), generator=generator).tolist()
        early = int(HELD * self.rate / 2)
        places = torch.rand(count, generator=generator).tolist()
        found = torch.zeros(samples)
        for k, (row, place) in enumerate(zip(which, places, strict=True)):
            start = int(place * (samples // 2 if k == 0 else samples + early)) - (k > 0) * early
            wave = notes[row, max(0, -start) :][: samples - max(0, start)]
            found[max(0, start) : max(0, start) + len(wave)] += wave / 2**15
        return found

    def fingerprint(self) -> str:
        """Return the SHA-256 of all notes and texts."""
        columns = {str(k): wave for k, wave in enumerate(self.waves)}
        return content_hash(columns, json.dumps([self.rate, self.captions]))


class Instruments(Mixtures):
    """Mixtures of twelve real instruments, sampled in the soundfont *Fluid R3* (MIT license).

    The notes are rendered once by fluidsynth and kept in the user's cache: each key of an
    instrument's range at two velocities. A soundfont plays several neighboring keys by one
    recording. The splits divide an instrument's *recordings*, so validation and test have pitches
    and recordings that training never heard. A sound has one to four notes. The texts are names of
    General MIDI in several wordings.

    Args:
        states: Map between log-mels and states.
        query: Encoder of texts.
        font: Soundfont with the programs of General MIDI; None means that of Debian's package
            ``fluid-soundfont-gm``.
        detune: Largest shift of a training note in semitones, up or down, in [0, 12]. Each note is
            then there as it is and at three random shifts, as if its recording were played faster
            or slower. Validation and test have the notes as they are.
        settings: The other arguments, see `Mixtures`.

    Raises:
        FileNotFoundError: On ``setup``, if there is no such font, or no fluidsynth.
        ValueError: If ``detune`` is out of range; on ``setup``, if the font is damaged, or lacks an
            instrument.
    """

    classes: Sequence[str] | None = tuple(PLAYED)

    def __init__(
        self,
        states: MelStates,
        query: TextEncoder,
        font: str | Path | None = None,
        detune: float = 0.0,
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
        check_between(detune, 0, 12, "detune")
        self.font, self.detune = DEBIAN_SOUNDFONT if font is None else Path(font), detune

    @cached_property
    def keys(self) -> dict[str, dict[str, list[int]]]:
        """The keys of each instrument in each split."""
        programs = samples_of_keys(self.font)
        found = {}
        for name, (program, low, high) in PLAYED.items():
            known = programs.get(program, {})
            groups = recordings({key: known[key] for key in range(low, high + 1) if key in known})
            if len(groups) < 3:
                raise ValueError(
                    f"font must have 3 recordings of each instrument, got {len(groups)} of "
                    f"{name} in {self.font}"
                )
            found[name] = divided(groups, self.split_seed, name)
        return found

    def sources(self) -> Mapping[str, Notes]:
        """Return the notes of each split."""
        rate, keys = self.states.mel.rate, self.keys
        notes = self._rendered(rate)
        texts = [wordings(name) for name in PLAYED]
        count = len(VELOCITIES)
        found = {}
        for split in ("train", "val", "test"):
            waves = []
            for name, (_, low, _) in PLAYED.items():
                first = torch.tensor(keys[name][split]) - low
                rows = (first[:, None] * count + torch.arange(count)).flatten()
                own = notes[name][rows]
                if split == "train" and self.detune:
                    generator = keyed_generator(self.split_seed, "detune", name)
                    own = torch.cat([own, detuned(own.repeat(TUNED, 1), self.detune, generator)])
                waves.append(own)
            found[split] = Notes(waves, texts, rate)
        return found

    def _rendered(self, rate: int) -> dict[str, Tensor]:
        """Return the notes of all keys as int16, from the cache or by fluidsynth."""
        content = file_hashes(self.font.parent, [self.font.name])[0]
        settings = json.dumps([content, rate, HELD, SLOT, VELOCITIES, PLAYED])
        key = hashlib.sha256(settings.encode()).hexdigest()[:16]
        file = cache_folder() / f"instruments-{key}.safetensors"
        return cached(file, load_file, lambda: self._render(rate), lambda p, x: save_file(x, p))

    def _render(self, rate: int) -> dict[str, Tensor]:
        """Render all keys of all instruments."""
        found = {}
        for name, (program, low, high) in PLAYED.items():
            notes = [(key, v) for key in range(low, high + 1) for v in VELOCITIES]
            waves = render(self.font, program, notes, rate, HELD, SLOT)
            if not bool((waves.abs().amax(1) > 1e-3).all()):
                raise ValueError(f"font must have all notes of {name}, got silence in {self.font}")
            found[name] = (waves * (2**15 - 1)).round().clamp(-(2**15), 2**15 - 1).short()
        return found


def detuned(waves: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Return waves ``(N, S)`` of int16 that are each shifted by up to ``most`` semitones.

    A wave is read faster or slower, and silence fills its end.

    >>> waves = (1e4 * torch.sin(torch.arange(400) * 2 * torch.pi / 40)).short()[None]
    >>> detuned(waves, 12.0, torch.Generator().manual_seed(0)).shape
    torch.Size([1, 400])
    """
    shifts = most * (2 * torch.rand(len(waves), generator=generator) - 1)
    found = torch.zeros_like(waves)
    for row, (wave, shift) in enumerate(zip(waves, shifts.tolist(), strict=True)):
        # Ratios of small numbers, within 9 cents, keep the filter short.
        other = resample(wave.float(), round(100 * 2 ** (shift / 12)), 100)[: len(wave)]
        found[row, : len(other)] = other.round().clamp(-(2**15), 2**15 - 1).short()
    return found


def recordings(keys: Mapping[int, frozenset[int]]) -> list[list[int]]:
    """Group keys so that keys of different groups share no sample.

    >>> recordings({60: frozenset({1}), 61: frozenset({1, 2}), 62: frozenset({3})})
    [[60, 61], [62]]
    """
    groups: list[tuple[set[int], list[int]]] = []
    for key, samples in sorted(keys.items()):
        joined = [group for group in groups if group[0] & samples]
        rest = [group for group in groups if not group[0] & samples]
        both = set(samples).union(*(group[0] for group in joined))
        groups = [*rest, (both, sorted([*(k for group in joined for k in group[1]), key]))]
    return sorted(group for _, group in groups)


def divided(groups: Sequence[list[int]], seed: int, name: str) -> dict[str, list[int]]:
    """Divide groups of keys into splits at random, at least one group each.

    >>> {split: len(keys) for split, keys in divided([[k] for k in range(10)], 0, "a").items()}
    {'train': 7, 'val': 1, 'test': 2}
    """
    order = torch.randperm(len(groups), generator=keyed_generator(seed, "keys", name)).tolist()
    tests, vals = (max(1, round(FRACTIONS[split] * len(groups))) for split in ("test", "val"))
    parts = {"train": order[tests + vals :], "val": order[tests:][:vals], "test": order[:tests]}
    return {split: sorted(key for k in part for key in groups[k]) for split, part in parts.items()}
