"""Notes of a soundfont: which samples play them, and their sound by fluidsynth."""

import struct
import subprocess
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

RENDERED = 48000  # samples per second; at a lower rate high notes would fold
KEYS, SAMPLE, INSTRUMENT = 43, 53, 41  # generators of the format
ANY = 127 << 8  # keys 0 to 127
Zone = dict[int, int]
APT = "apt-get install fluidsynth fluid-soundfont-gm"


def samples_of_keys(font: Path) -> dict[int, dict[int, frozenset[int]]]:
    """Return for each program of bank 0 and each key the numbers of the samples that play it.

    A soundfont plays neighboring keys by one recording at several speeds. So keys without a common
    sample, and only those, are different recordings.

    Args:
        font: A soundfont, format 2.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another format, or is damaged.
    """
    if not font.is_file():
        raise FileNotFoundError(f"font must be a soundfont, got {font}; {APT}")
    try:
        parts = _tables(font)
        bags = {
            name: [bag for bag, _ in struct.iter_unpack("<HH", parts[name])]
            for name in ("pbag", "ibag")
        }
        values = {name: list(struct.iter_unpack("<HH", parts[name])) for name in ("pgen", "igen")}
        presets = list(struct.iter_unpack("<20sHHHIII", parts["phdr"]))
        instruments = [first for _, first in struct.iter_unpack("<20sH", parts["inst"])]
        found: dict[int, dict[int, frozenset[int]]] = {}
        for this, following in pairwise(presets):
            if this[2] != 0:
                continue
            keys: dict[int, set[int]] = {}
            outer = _zones(bags["pbag"], values["pgen"], this[3], following[3], INSTRUMENT)
            for zone in outer:
                ends = instruments[zone[INSTRUMENT]], instruments[zone[INSTRUMENT] + 1]
                for inner in _zones(bags["ibag"], values["igen"], *ends, SAMPLE):
                    for key in {*_keys(zone)} & {*_keys(inner)}:
                        keys.setdefault(key, set()).add(inner[SAMPLE])
            found[this[1]] = {key: frozenset(keys[key]) for key in sorted(keys)}
    except (struct.error, IndexError, KeyError) as error:
        raise ValueError(f"font must be a soundfont, got {error} in {font}") from error
    return found


def _tables(font: Path) -> dict[str, bytes]:
    """Return the tables of a soundfont by their names; the samples themselves are not read."""
    found = {}
    with font.open("rb") as file:
        if file.read(4) != b"RIFF":
            raise struct.error("another format")
        size = font.stat().st_size
        for name, start, length in _chunks(file, 12, size):
            file.seek(start)
            if name == b"LIST" and file.read(4) == b"pdta":
                for inner, at, count in _chunks(file, start + 4, min(size, start + length)):
                    file.seek(at)
                    found[inner.decode("latin-1")] = file.read(count)
    return found


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and length of the parts of a RIFF file."""
    while start < end:
        file.seek(start)
        name, length = struct.unpack("<4sI", file.read(8))
        if start + 8 + length > end:
            raise struct.error(f"a file that ends before its part {name.decode('latin-1')}")
        yield name, start + 8, length
        start += 8 + length + length % 2


def _zones(
    bags: Sequence[int], values: Sequence[tuple[int, int]], first: int, last: int, ends: int
) -> list[Zone]:
    """Return the zones of a preset or an instrument; a first one without an end is for all."""
    zones, common = [], {}
    for number in range(first, last):
        zone = dict(values[bags[number] : bags[number + 1]])
        if ends in zone:
            zones.append({**common, **zone})
        elif number == first:
            common = zone
    return zones


def _keys(zone: Zone) -> range:
    """Return the keys of a zone."""
    both = zone.get(KEYS, ANY)
    return range(both & 255, (both >> 8) + 1)


def render(
    font: Path,
    program: int,
    notes: Sequence[tuple[int, int]],
    rate: int,
    held: float,
    seconds: float,
) -> Tensor:
    """Return the sound of single notes ``(N, rate · seconds)``, in [-1, 1], by fluidsynth.

    Each note has a slot of its own. There is no reverberation, and both channels are averaged. The
    same font and version of fluidsynth give the same bytes.

    Args:
        font: The soundfont.
        program: Number of the instrument in General MIDI, from 0.
        notes: Key and velocity of each note.
        rate: Samples per second.
        held: Seconds until a note is released.
        seconds: Length of a slot.

    Raises:
        FileNotFoundError: If fluidsynth is not installed.
        RuntimeError: If it fails.
    """
    from flowkit.audio import resample

    command = which("fluidsynth")
    if command is None:
        raise FileNotFoundError(f"fluidsynth must be installed, got none; {APT}")
    with TemporaryDirectory() as folder:
        midi, out = Path(folder) / "notes.mid", Path(folder) / "notes.raw"
        midi.write_bytes(midi_file(program, notes, round(1000 * held), round(1000 * seconds)))
        settings = ["-n", "-i", "-q", "-R", "0", "-C", "0", "-g", "0.5", "-r", str(RENDERED)]
        settings += ["-o", "synth.cpu-cores=1", "-O", "float", "-T", "raw", "-F", str(out)]
        ended = subprocess.run(
            [command, *settings, str(font), str(midi)], capture_output=True, text=True, check=False
        )
        if ended.returncode or not out.is_file():
            words = " ".join(ended.stderr.split()) or "no output"
            raise RuntimeError(f"fluidsynth must render {font}, got {words}")
        sound = np.fromfile(out, "<f4").reshape(-1, 2).mean(1)
    length = round(RENDERED * seconds)
    wave = torch.zeros(len(notes) * length)
    count = min(len(wave), len(sound))
    wave[:count] = torch.from_numpy(sound[:count])
    return resample(wave.reshape(len(notes), length), RENDERED, rate)


def midi_file(program: int, notes: Sequence[tuple[int, int]], held: int, slot: int) -> bytes:
    """Return a MIDI file that plays notes one after the other.

    Args:
        program: Number of the instrument, from 0.
        notes: Key and velocity of each note.
        held: Milliseconds until a note is released.
        slot: Milliseconds from note to note.

    >>> midi_file(40, [(60, 100)], 1000, 1500)[:4]
    b'MThd'
    """
    track = b"\0\xff\x51\x03" + (1_000_000).to_bytes(3, "big")  # a beat a second
    track += b"\0" + bytes([0xC0, program])
    wait = 0
    for key, velocity in notes:
        track += _number(wait) + bytes([0x90, key, velocity])
        track += _number(held) + bytes([0x80, key, 0])
        wait = slot - held
    track += _number(wait) + b"\xff\x2f\0"
    head = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 1000)  # 1000 ticks a beat
    return head + b"MTrk" + struct.pack(">I", len(track)) + track


def _number(value: int) -> bytes:
    """Return a number in MIDI's form: 7 bits a byte, the highest first."""
    found = [value & 127]
    while value := value >> 7:
        found.insert(0, value & 127 | 128)
    return bytes(found)
