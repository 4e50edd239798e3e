"""Image files below a folder: how they are found, known by their content, and put into splits."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.provenance import cache_folder, write_atomically

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
ARCHIVES = frozenset({".7z", ".gz", ".rar", ".tar", ".tgz", ".zip"})
SPLIT_FOLDERS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}
SETTLED = 2 * 10**9  # ns; a later change of a file has another time of change


# --- finding ----------------------------------------------------------------------------------


@dataclass
class _Left:
    """Counts of all that a search leaves out."""

    hidden: int = 0
    loops: int = 0
    other: Counter[str] = field(default_factory=Counter)
    dangling: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Describe what was left out, a text for each kind."""
        notes = []
        if self.hidden:
            notes.append(
                f"{_count(self.hidden, 'hidden file or folder', 'hidden files or folders')} skipped"
            )
        if count := self.other.total():
            kinds = count_of_kinds(self.other)
            notes.append(f"{_count(count, 'file', 'files')} of other types not read ({kinds})")
        if self.loops:
            notes.append(f"{_count(self.loops, 'link', 'links')} to a folder above not followed")
        return notes


def count_of_kinds(kinds: Mapping[str, int]) -> str:
    """Return the five most frequent kinds with their numbers.

    >>> count_of_kinds({".csv": 1, ".txt": 30})
    '30 .txt, 1 .csv'
    """
    ranked = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n:,} {kind}" for kind, n in ranked[:5]) + (", …" if len(ranked) > 5 else "")


def is_hidden(name: str) -> bool:
    """Return True for names that systems and editors give to files of their own.

    >>> [is_hidden(name) for name in (".DS_Store", "__MACOSX", "cat.1")]
    [True, True, False]
    """
    return name.startswith(".") or name == "__MACOSX"


def find_images(root: Path) -> tuple[list[str], list[str]]:
    """Find the image files of a folder and of its sub-folders at any depth.

    Links to files and folders are followed, but not a link to a folder that the link lies in.
    Hidden files and folders are left out.

    Returns:
        The names relative to the folder, sorted, and notes on what was left out.

    Raises:
        FileNotFoundError: If the folder does not exist, or a link leads nowhere.
        ValueError: If the folder holds no images.
    """
    check_root(root)
    left = _Left()
    names = sorted(_walk(root, "", (), left))
    if left.dangling:
        raise FileNotFoundError(
            f"links must lead to files or folders, got {len(left.dangling)} that lead nowhere: "
            f"{first_ten(left.dangling)}"
        )
    if not names:
        got = "; ".join([f"no image in {root}", *left.notes()])
        raise ValueError(f"root must hold images ({', '.join(sorted(SUFFIXES))}), got {got}")
    return names, left.notes()


def check_root(root: Path) -> None:
    """Require a folder of data.

    Raises:
        NotADirectoryError: If it is a file.
        FileNotFoundError: If there is nothing.
    """
    if root.is_file():
        fix = "unpack it, and give the folder" if root.suffix in ARCHIVES else "give its folder"
        raise NotADirectoryError(f"root must be a folder, got the file {root}; {fix}")
    if not root.is_dir():
        raise FileNotFoundError(
            f"root must be a folder, got {root}; a relative path counts from {Path.cwd()}; "
            "give the folder of the data as data.root="
        )


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...], left: _Left
) -> Iterator[str]:
    """Yield the names of images; ``above`` identifies the folders on the way."""
    state = folder.stat()
    identity = (state.st_dev, state.st_ino)
    if identity in above:
        left.loops += 1
        return
    with os.scandir(folder) as opened:
        entries = list(opened)
    for entry in entries:
        suffix = os.path.splitext(entry.name)[1].lower()
        if is_hidden(entry.name):
            left.hidden += 1
        elif entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, identity), left)
        elif not entry.is_file():
            left.dangling.append(entry.path)
        elif suffix in SUFFIXES:
            yield prefix + entry.name
        else:
            left.other[suffix or "without suffix"] += 1


def first_ten(texts: Sequence[str]) -> str:
    """Join the first ten texts."""
    return "; ".join(texts[:10]) + ("; …" if len(texts) > 10 else "")


def _count(number: int, one: str, several: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {one if number == 1 else several}"


# --- content ----------------------------------------------------------------------------------


def file_hashes(root: Path, names: Sequence[str]) -> list[str]:
    """Return the SHA-256 of the content of files of a folder.

    A file is read once: its hash is kept in the user's cache, with its size and its times of
    change. A file that changed less than two seconds ago is read again at the next call, since
    another change might give it the same times.

    Args:
        root: The folder.
        names: The files, relative to the folder.
    """
    key = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    store = cache_folder() / "hashes" / f"{key}.json"
    known: dict[str, list] = {}
    with suppress(OSError, ValueError):  # a cache: without it, files are read again
        known = dict(json.loads(store.read_text()))
    hashes, kept, now = [], {}, time.time_ns()
    for name in names:
        state = (root / name).stat()
        times = [state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        entry = known.get(name)
        if not isinstance(entry, list) or entry[:-1] != times:
            with (root / name).open("rb") as opened:
                entry = [*times, hashlib.file_digest(opened, "sha256").hexdigest()]
        hashes.append(entry[-1])
        if now - max(times[1:]) > SETTLED:
            kept[name] = entry
    if kept != {name: known[name] for name in kept if name in known}:
        with suppress(OSError):
            store.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(store, lambda file: file.write_text(json.dumps({**known, **kept})))
    return hashes


# --- splits -----------------------------------------------------------------------------------


def folders_of(root: Path) -> list[str]:
    """Return the names of the folders in a folder, without hidden ones, sorted."""
    return sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name)
    )


def folder_splits(root: Path, names: Sequence[str]) -> dict[str, str] | None:
    """Return the split of each folder if the folders are splits and not classes, else None.

    They are splits if their names are those of splits, such as train and val, and one is train.

    Args:
        root: The folder.
        names: All images in it.
    """
    folders = folders_of(root)
    splits = {name: SPLIT_FOLDERS.get(name.lower()) for name in folders}
    found = {name: split for name, split in splits.items() if split}
    whole = len(found) == len(folders) == len(set(found.values()))
    loose = any("/" not in name for name in names)
    return found if whole and "train" in found.values() and not loose else None


def said(given: Mapping[str, str]) -> list[str]:
    """Return the note that folders are splits."""
    if not given:
        return []
    taken = [split for split in ("val", "test") if split not in given.values()]
    rest = f", {' and '.join(taken)} {'is' if len(taken) == 1 else 'are'} taken from train"
    return [f"folders {', '.join(given)} are splits{rest if taken else ''}"]


def split_files(
    names: Sequence[str],
    hashes: Sequence[str],
    given: Mapping[str, str] | None,
    fractions: Mapping[str, float | None],
    seed: int,
    known: Mapping[str, Any] | None,
    prefix: str = "",
) -> tuple[dict[str, Tensor], list[str]]:
    """Divide files into splits: by their folders, by a record, and others by `content_splits`.

    Args:
        names: The files.
        hashes: The SHA-256 of each file.
        given: The split of each folder, see `folder_splits`; None if folders are not splits.
        fractions: The share of val and test; None for test as in `share_of_test`.
        seed: The seed of the splits.
        known: A record of these data, see `flowkit.data.SplitData.record`. A file keeps the split
            that it, or its content, has in the record.
        prefix: What the record has before the names.

    Returns:
        The positions of the files of each split, and notes on the splits.
    """
    given = given or {}
    share, notes = share_of_test(fractions["test"], len(names))
    shares = {"val": cast(float, fractions["val"]), "test": share}
    missing = {name: share for name, share in shares.items() if name not in given.values()}
    files = known["files"] if known else {}
    earlier = {}
    for split in ("test", "val", "train"):  # a copy of a training file counts as trained
        earlier |= {content: split for content, own in files.values() if own == split}
    earlier |= {f"{name} {content}": split for name, (content, split) in files.items()}
    placed = []
    for name, content in zip(names, hashes, strict=True):
        own = given.get(name.split("/")[0])
        own = earlier.get(content, None if own == "train" and missing else own)
        placed.append(earlier.get(f"{prefix}{name} {content}", own))
    keys = [f"{name} {content}" for name, content in zip(names, hashes, strict=True)]
    notes = notes if "test" in missing and known is None else []
    return content_splits(keys, missing, seed, placed), [*said(given), *notes]


def share_of_test(fraction: float | None, size: int) -> tuple[float, list[str]]:
    """Return the share of the test split, and a note if it follows from the number of samples.

    Measures against a few images are noise. Without a given fraction the share is 0.05, but 0.1 of
    fewer than 2000 samples, and 0.2 of fewer than 1000. So new data may move samples from test to
    train where their number passes 1000 or 2000, and never in the other direction.

    Args:
        fraction: The given share, or None.
        size: The number of samples.

    >>> share_of_test(None, 200)
    (0.2, ['test takes a share of 0.2, since there are fewer than 1000 samples'])
    >>> share_of_test(0.1, 200)
    (0.1, [])
    """
    if fraction is not None:
        return fraction, []
    for limit, share in ((1000, 0.2), (2000, 0.1)):
        if size < limit:
            note = f"test takes a share of {share}, since there are fewer than {limit} samples"
            return share, [note]
    return 0.05, []


def content_splits(
    keys: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    placed: Sequence[str | None] | None = None,
    what: str = "samples",
) -> dict[str, Tensor]:
    """Divide samples into splits by a hash of the key of each sample.

    A sample is in a split with the probability of its fraction. Its split does not depend on the
    other samples, so new samples move no other. Only a split that would be empty takes a sample of
    the rest.

    Args:
        keys: The key of each sample: all that decides on its split, for example name and content.
        fractions: The share of each split but ``train``, each in (0, 1), with a sum below 1.
        seed: Another seed gives other splits.
        placed: The split of samples that have one already; None for others. If it is given, no
            split may be empty.
        what: What a sample is, in errors.

    Returns:
        The positions of the samples of ``train`` and of each split with a fraction (with ``placed``
        of train, val and test), in an order that follows from
        the hashes.

    Raises:
        ValueError: If a fraction is out of range, or there are too few samples for all splits.

    >>> splits = content_splits([f"{k}.png" for k in range(1000)], {"val": 0.1, "test": 0.2}, 0)
    >>> {name: len(part) for name, part in splits.items()}
    {'train': 696, 'val': 106, 'test': 198}
    """
    if not (all(f > 0 for f in fractions.values()) and sum(fractions.values()) < 1):
        raise ValueError(
            "fractions of the splits must be positive and sum to less than 1, got "
            f"{list(fractions.values())}"
        )
    draws = [_draw(seed, key) for key in keys]
    owner = list(placed or [None] * len(keys))
    free = sorted((k for k, split in enumerate(owner) if split is None), key=draws.__getitem__)
    low, order = 0.0, list(fractions)[::-1]
    for name in order:  # the test split does not depend on the other fractions
        high = low + fractions[name]
        for k in free:
            if low <= draws[k] < high:
                owner[k] = name
        low = high
    rest = [k for k in free if owner[k] is None]
    for name in order:
        if name not in owner and len(rest) > 1:
            owner[rest.pop(0)] = name
    names = ("train", *fractions) if placed is None else ("train", "val", "test")
    parts = {
        name: [k for k, split in enumerate(owner) if (split or "train") == name] for name in names
    }
    if empty := [name for name, part in parts.items() if not part]:
        raise ValueError(
            f"number of {what} must be at least 1 in each split, got {len(keys)} {what} and none "
            f"for {' and '.join(empty)}"
        )
    return {name: torch.tensor(sorted(part, key=draws.__getitem__)) for name, part in parts.items()}


def _draw(seed: int, key: str) -> float:
    """Return a number in [0, 1) that follows from a seed and a key."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
