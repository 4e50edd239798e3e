"""Words and phones of recordings, by the recognizer pocketsphinx with its packaged model."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowkit.extras import install

PHONES = (
    *("sil", "aa", "ae", "ah", "ao", "aw", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g"),
    *("hh", "ih", "iy", "jh", "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t"),
    *("th", "uh", "uw", "v", "w", "y", "z", "zh"),
)
"""The phones of the dictionary of Carnegie Mellon University, and silence."""

OTHER_NAMES = {"pau": "sil", "ax": "ah", "+spn+": "sil", "+nsn+": "sil", "sp": "sil"}
RATE = 16000

Segments = Sequence[tuple[int, float]]
"""Number of each phone in `PHONES`, and the second at which it ends."""


def hear(waves: Sequence[Tensor]) -> list[str]:
    """Return the words of waves ``(T,)`` at 16 kHz, in lower case.

    Raises:
        ImportError: If pocketsphinx, of the extra ``voices``, is missing.
    """
    decoder = _decoder("words")
    found = []
    for wave in waves:
        _feed(decoder, wave)
        heard = decoder.hyp()
        found.append("" if heard is None else heard.hypstr)
    return found


def align(wave: Tensor, text: str) -> list[tuple[int, float]] | None:
    """Return the phones of a wave ``(T,)`` at 16 kHz whose words are known.

    Returns:
        The segments, see `Segments`. None if a word is not in the dictionary of the recognizer, or
        the words do not fit.

    Raises:
        ImportError: If pocketsphinx, of the extra ``voices``, is missing.
    """
    decoder = _decoder("phones")
    words = "".join(c if c.isalpha() or c == "'" else " " for c in text.lower()).split()
    if not words or any(decoder.lookup_word(word) is None for word in words):
        return None
    try:
        decoder.set_align_text(" ".join(words))
        _feed(decoder, wave)
        decoder.set_alignment()  # from the words to their phones
        _feed(decoder, wave)
    except RuntimeError:  # no path through the words
        return None
    alignment = decoder.get_alignment()
    if alignment is None:
        return None
    return [
        (phone_number(phone.name), (phone.start + phone.duration) / 100)
        for word in alignment.words()
        for phone in word
    ]


def phone_number(name: str) -> int:
    """Return the number of a phone.

    >>> phone_number("SIL"), phone_number("ax"), phone_number("AH0")
    (0, 3, 3)
    """
    plain = name.lower().rstrip("012")
    return PHONES.index(OTHER_NAMES.get(plain, plain))


def phones_at(segments: Segments, times: Tensor) -> Tensor:
    """Return the number of the phone at each time ``(T,)`` in seconds; silence after the last.

    >>> phones_at([(0, 0.1), (3, 0.3)], torch.tensor([0.0, 0.1, 0.2, 0.5]))
    tensor([0, 3, 3, 0])
    """
    ends = torch.tensor([end for _, end in segments], dtype=torch.float64)
    numbers = torch.tensor([*(number for number, _ in segments), 0])
    return numbers[torch.searchsorted(ends, times.double(), right=True)]


@cache
def _decoder(kind: str) -> Any:
    """Return a recognizer; one of each kind, since an alignment changes what it listens for."""
    try:
        import pocketsphinx
    except ImportError as error:
        raise ImportError(
            f"pocketsphinx must be installed to recognize words, got none; {install('voices')}"
        ) from error
    return pocketsphinx.Decoder(samprate=float(RATE), loglevel="FATAL")


def _feed(decoder: Any, wave: Tensor) -> None:
    """Let a recognizer hear a wave, as 16 bits at half of the full level."""
    peak = float(wave.abs().max().clamp_min(1e-9))
    values = (wave * (2**14 / peak)).round().short().cpu().numpy().tobytes()
    decoder.start_utt()
    decoder.process_raw(values, full_utt=True)
    decoder.end_utt()
