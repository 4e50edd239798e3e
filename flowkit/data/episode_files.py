"""Files of demonstrations: npz, robomimic's HDF5, folders of LeRobot, and JSONL of ViPRA."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowkit.data.broken import FORMATS
from flowkit.data.npz import Npz
from flowkit.extras import not_imported
from flowkit.provenance import read_json


class Keys(NamedTuple):
    """Names of what to read; None for the names that a format uses."""

    obs: Sequence[str] | None = None
    """Parts of an observation, which are joined."""
    action: str | None = None
    """The action."""
    camera: str | None = None
    """The images; None reads none."""


class Recorded(NamedTuple):
    """An episode as it is in a file."""

    name: str
    """Name in errors."""
    obs: np.ndarray
    """Observations ``(T, O)``."""
    action: np.ndarray | None
    """Actions ``(T, D)``; None for an episode without actions."""
    images: np.ndarray | None
    """Images ``(T, H, W, C)`` in bytes."""


def read_episodes(root: Path, keys: Keys) -> list[Recorded]:
    """Read all episodes of a file or folder, whose format follows from its name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another format, a part is missing, or there is no episode.
        ImportError: If a package is missing.
    """
    if not root.exists():
        raise FileNotFoundError(
            f"root must be a file or folder of demonstrations, got {root}; a relative path counts "
            f"from {Path.cwd()}"
        )
    readers: dict[str, Callable[[Path, Keys], Iterator[Recorded]]] = {
        ".npz": _npz,
        ".hdf5": _robomimic,
        ".h5": _robomimic,
        ".jsonl": _vipra,
    }
    is_lerobot = (root / "meta" / "info.json").is_file()
    reader = _lerobot if is_lerobot else readers.get(root.suffix.lower())
    if reader is None:
        raise ValueError(
            "root must be a .npz, .hdf5 or .jsonl file, or a folder of LeRobot with "
            f"meta/info.json, got {root}"
        )
    try:
        found = list(reader(root, keys))
    except ImportError as error:
        raise not_imported(error, f"to read {root}", "robots") from error
    if not found:
        raise ValueError(f"root must hold episodes, got none in {root}")
    return found


def _pick(part: Mapping[str, Any], key: str, what: str, where: str) -> Any:
    """Return an entry; a missing one is named with those there are."""
    if key not in part:
        raise ValueError(f"{what} of {where} must be one of {', '.join(sorted(part))}, got {key}")
    return part[key]


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Join parts ``(T, ...)`` of an observation to ``(T, O)``."""
    return np.concatenate([np.asarray(c, np.float32).reshape(len(c), -1) for c in columns], 1)


# --- npz ----------------------------------------------------------------------------------------


def _npz(root: Path, keys: Keys) -> Iterator[Recorded]:
    """Read ``obs (S, O)``, ``action (S, D)`` and ``episode_ends (E,)``."""
    file = Npz.open(root)
    parts = {name: file.whole(name) for name in file.names}
    obs = _joined([_pick(parts, key, "obs", str(root)) for key in keys.obs or ["obs"]])
    action = parts.get(keys.action or "action")
    if keys.action is not None:
        action = _pick(parts, keys.action, "action", str(root))
    images = None if keys.camera is None else _pick(parts, keys.camera, "camera", str(root))
    ends = [int(end) for end in _pick(parts, "episode_ends", "array", str(root))]
    if ends != sorted(set(ends)) or not ends or ends[0] < 1 or ends[-1] != len(obs):
        raise ValueError(
            f"episode_ends of {root} must increase from at least 1 to the {len(obs)} steps, got "
            f"{ends[:10]}"
        )
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        own = (None if part is None else part[start:end] for part in (action, images))
        yield Recorded(f"episode {number} of {root}", obs[start:end], *own)


# --- robomimic ----------------------------------------------------------------------------------


def _robomimic(root: Path, keys: Keys) -> Iterator[Recorded]:
    """Read ``data/demo_k/obs/<key>`` and ``data/demo_k/actions``, in the order of the numbers."""
    import h5py

    try:
        opened = h5py.File(root, "r")
    except OSError as error:
        raise ValueError(f"root must be a whole HDF5 file, got {root}: {error}") from error
    with opened as file:
        demos: Any = _pick(file, "data", "group", str(root))
        for name in sorted(demos, key=lambda text: int(text.rpartition("_")[2])):
            demo, where = demos[name], f"{name} of {root}"
            seen = _pick(demo, "obs", "group", where)
            low = [key for key in sorted(seen) if seen[key].ndim <= 2]
            obs = [_pick(seen, key, "obs", where)[()] for key in keys.obs or low]
            action = keys.action or "actions"
            found = _pick(demo, action, "action", where)[()] if action in demo else None
            camera = keys.camera
            images = None if camera is None else _pick(seen, camera, "camera", where)[()]
            yield Recorded(where, _joined(obs), found, images)


# --- LeRobot ------------------------------------------------------------------------------------


def _lerobot(root: Path, keys: Keys) -> Iterator[Recorded]:
    """Read a folder of version 2.1, a file an episode, or 3.0, several episodes a file."""
    info = read_json(root / "meta" / "info.json")
    version, features = str(info.get("codebase_version")), info.get("features", {})
    if version not in ("v2.0", "v2.1", "v3.0"):
        raise ValueError(f"codebase_version of {root} must be v2.0, v2.1 or v3.0, got {version}")
    states = ("observation.state", "observation.environment_state")
    names = list(keys.obs or [key for key in states if key in features] or states[:1])
    for key in [*names, *([keys.camera] if keys.camera else [])]:
        _pick(features, key, "camera" if key == keys.camera else "obs", str(root))
    action = keys.action or "action"
    wanted = [*names, *([action] if action in features else [])]
    shown = features[keys.camera]["dtype"] if keys.camera else None
    if shown == "image":
        wanted.append(str(keys.camera))
    # Several episodes lie in a file, one behind the other: it is read once.
    table_of = lru_cache(maxsize=1)(lambda name: _parquet(root, name, [*wanted, "episode_index"]))
    video_of = lru_cache(maxsize=1)(_video)
    for row in _lerobot_episodes(root, info, version):
        number = int(row["episode_index"])
        place = {"episode_chunk": number // int(info.get("chunks_size", 1000))}
        place |= {"episode_index": number, "chunk_index": row.get("data/chunk_index", 0)}
        place |= {"file_index": row.get("data/file_index", 0)}
        where = f"episode {number} of {root}"
        table = table_of(str(info["data_path"]).format(**place))
        own = np.flatnonzero(np.asarray(table["episode_index"]) == number)
        if len(own) != int(row["length"]):
            raise ValueError(
                f"{where} must have {row['length']} steps as meta says, got {len(own)}"
            )
        columns = {key: [table[key][k] for k in own] for key in wanted}
        images = None
        if shown == "image":
            images = np.stack([_image(root, cell) for cell in columns[str(keys.camera)]])
        elif shown is not None:
            file, first = _lerobot_video(root, info, str(keys.camera), row, place)
            images = video_of(file)[first : first + len(own)]
        found = _joined([np.asarray(columns[action])]) if action in columns else None
        yield Recorded(where, _joined([np.asarray(columns[key]) for key in names]), found, images)


def _lerobot_episodes(root: Path, info: Mapping[str, Any], version: str) -> list[dict[str, Any]]:
    """Return what ``meta`` says on each episode."""
    if version == "v3.0":
        files = sorted((root / "meta" / "episodes").rglob("*.parquet"))
        rows = []
        for file in files:
            table = _parquet(root, str(file.relative_to(root)), None)
            rows += [
                dict(zip(table, cells, strict=True)) for cells in zip(*table.values(), strict=True)
            ]
    else:
        rows = _lines(root / "meta" / "episodes.jsonl")
    expected = int(info.get("total_episodes", len(rows)))
    if len(rows) != expected or not rows:
        raise ValueError(
            f"meta of {root} must describe the {expected} episodes of info.json, got {len(rows)}"
        )
    return rows


def _lerobot_video(
    root: Path, info: Mapping[str, Any], camera: str, row: Mapping[str, Any], place: dict[str, Any]
) -> tuple[Path, int]:
    """Return the video of an episode, and the number of its first frame there."""
    own = {"video_key": camera, **place}
    first = 0
    if f"videos/{camera}/chunk_index" in row:
        own["chunk_index"] = row[f"videos/{camera}/chunk_index"]
        own["file_index"] = row[f"videos/{camera}/file_index"]
        first = round(float(row[f"videos/{camera}/from_timestamp"]) * float(info["fps"]))
    return root / str(info["video_path"]).format(**own), first


def _video(file: Path) -> np.ndarray:
    """Decode a video."""
    import imageio.v3 as iio

    try:
        return np.asarray(iio.imread(file))
    except Exception as error:  # decoders raise what they like
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"video must be decoded, got {file}: {reason}") from error


def _parquet(root: Path, name: str, columns: Sequence[str] | None) -> dict[str, list[Any]]:
    """Read columns of a parquet file below a folder."""
    import pyarrow
    import pyarrow.parquet

    file = root / name
    if not file.is_file():
        raise FileNotFoundError(f"file of {root} must exist, got no {name}")
    try:
        return pyarrow.parquet.read_table(
            file, columns=list(columns) if columns else None
        ).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"file must be parquet, got {file}: {error}") from error


# --- ViPRA --------------------------------------------------------------------------------------


def _vipra(root: Path, keys: Keys) -> Iterator[Recorded]:
    """Read a step a line: ``raw_action``, ``proprio``, ``image``, ``id`` as ``task/episode/step``.

    Lines without ``id`` belong to the episode whose folder their last image lies in.
    """
    episodes: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for number, line in enumerate(_lines(root), 1):
        images = line.get("image", [])
        last = images if isinstance(images, str) else (images or [""])[-1]
        step = str(line.get("id") or last)
        if "/" not in step:
            raise ValueError(
                f"line {number} of {root} must have an id or an image, got {line}"[:300]
            )
        episodes.setdefault(step.rpartition("/")[0], []).append((step, {**line, "image": last}))
    for name, steps in episodes.items():
        lines = [line for _, line in sorted(steps, key=lambda pair: pair[0])]
        where = f"{name} of {root}"
        columns = [
            np.asarray([_pick(line, key, "obs", where) for line in lines])
            for key in keys.obs or ["proprio"]
        ]
        action, images = keys.action or "raw_action", None
        found = None
        if all(action in line for line in lines):
            found = _joined([np.asarray([line[action] for line in lines])])
        if keys.camera is not None:
            cells = [{"path": _pick(line, keys.camera, "camera", where)} for line in lines]
            images = np.stack([_image(root.parent, cell) for cell in cells])
        yield Recorded(where, _joined(columns), found, images)


def _lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    if not file.is_file():
        raise FileNotFoundError(f"file must exist, got no {file}")
    found = []
    with file.open(encoding="utf-8") as opened:
        for number, line in enumerate(opened, 1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"line {number} of {file} must be JSON, got {error}"
                    ) from error
                if not isinstance(found[-1], dict):
                    raise ValueError(f"line {number} of {file} must be a mapping, got {line[:80]}")
    return found


def _image(root: Path, cell: Mapping[str, Any]) -> np.ndarray:
    """Decode an image that is in a file, or stands for one below a folder."""
    from PIL import Image, UnidentifiedImageError

    content, file = cell.get("bytes"), root / str(cell.get("path"))
    if content is None and not file.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"images must lie in {root}, got {file}")
    try:
        source = io.BytesIO(content) if content is not None else file
        with Image.open(source, formats=FORMATS) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"image must be decoded, got {file}: {error}") from error
