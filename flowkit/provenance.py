"""Provenance: hashes, versions of packages, places of networks, reading and writing of files."""

import errno
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flowkit._version import __version__

T = TypeVar("T")


def tensor_hash(tensors: Tensor | Iterable[Tensor] | Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of one or several tensors: of their names, dtypes, shapes and bytes.

    The device and the order of a mapping (for example a ``state_dict``) do not change the hash.

    Args:
        tensors: One tensor, several tensors, or a mapping from names to tensors.

    Returns:
        64 hexadecimal digits.

    >>> tensor_hash(torch.zeros(2)) == tensor_hash([torch.zeros(2)])
    True
    >>> tensor_hash(torch.zeros(2)) == tensor_hash(torch.zeros(1, 2))
    False
    """
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    if isinstance(tensors, Mapping):
        named = sorted(cast(Mapping[str, Tensor], tensors).items())
    else:
        named = [(str(i), tensor) for i, tensor in enumerate(tensors)]
    return _digest(named, "", "{}:{}:{};")


def content_hash(columns: Mapping[str, Tensor], header: str = "") -> str:
    """Compute the SHA-256 of a header and of named tensors.

    It identifies autoencoders and data. It differs from `tensor_hash` only in the punctuation
    between names, dtypes and shapes. Checkpoints and caches hold digests of both functions, and
    reading compares them. Neither function may therefore ever change.

    Args:
        columns: A mapping from names to tensors. Its order does not change the hash.
        header: A text, for example a configuration.

    Returns:
        64 hexadecimal digits.

    >>> content_hash({"x": torch.zeros(2)}) == content_hash({"x": torch.zeros(2)}, "{}")
    False
    """
    return _digest(sorted(columns.items()), header, "{} {} {}\n")


def _digest(named: Iterable[tuple[str, Tensor]], header: str, label: str) -> str:
    """Compute the SHA-256 of a header, and of the label and the bytes of every tensor.

    ``label`` is a format of name, dtype and shape.
    """
    digest = hashlib.sha256(header.encode())
    for name, tensor in named:
        digest.update(label.format(name, tensor.dtype, tuple(tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def located(place: str | Path, name: str) -> tuple[str, bool]:
    """Return a folder, or what follows ``hub:``, and whether it is on the Hugging Face hub.

    Only ``hub:owner/name`` is looked for on the hub, so no mistyped path is downloaded.

    Args:
        place: A folder, or ``hub:owner/name``.
        name: Name of the argument, for the error.

    Raises:
        FileNotFoundError: If there is no such folder.

    >>> located("hub:owner/name", "path")
    ('owner/name', True)
    """
    text = str(place)
    if re.fullmatch(r"hub:[\w.-]+(/[\w.-]+)?", text):
        return text.removeprefix("hub:"), True
    if Path(text).is_dir():
        return text, False
    fix = f"a relative path counts from {Path.cwd()}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        fix += f"; on the hub it is {name}=hub:{text}"
    raise FileNotFoundError(f"{name} must be a folder or hub:owner/name, got {text}; {fix}")


def cache_folder() -> Path:
    """Return the user's folder for what can be computed again: classifiers, features, hashes."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flowkit"


def beside(root: Path, name: Any) -> Path:
    """Return a file of a folder, whose name comes from another file of this folder.

    Raises:
        ValueError: If the name leads out of the folder.

    >>> beside(Path("runs"), "../secret")
    Traceback (most recent call last):
    ...
    ValueError: files must lie in runs, got '../secret'
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ValueError(f"files must lie in {root}, got {name!r}")
    return root / name


LARGEST, DEEPEST, MOST = 2**26, 64, 10**6  # bytes of a text file, levels and values of its content


def read_json(file: str | Path) -> Any:
    """Read a JSON file of bounded size and depth.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not JSON, or is too large or too deep.
    """
    return parse_json(read_bounded(file), file)


def parse_json(text: str, file: str | Path) -> Any:
    """Parse JSON of bounded depth; ``file`` is the name of its file in errors.

    Raises:
        ValueError: If the text is not JSON, or is too deep.

    >>> parse_json("[1, 2]", "a.json")
    [1, 2]
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"file must be JSON, got {file}: {error}") from error
    return bounded(found, file)


def read_bounded(file: str | Path) -> str:
    """Read a text file of at most 64 MiB.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is larger, or not UTF-8.
    """
    with Path(file).open("rb") as opened:  # the size of a device or a pipe is not known before
        content = opened.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"file must have at most {LARGEST} bytes, got more in {file}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"file must be text in UTF-8, got {file}: {error}") from error


def bounded(value: Any, file: str | Path) -> Any:
    """Return a value of lists and mappings that has at most 64 levels and a million values.

    References of YAML count as often as they occur, so a few of them cannot stand for millions of
    values, and a list that holds itself is refused.

    Raises:
        ValueError: If the value is deeper or has more values. The error names the file.

    >>> bounded({"a": [1, 2]}, "a.yaml")
    {'a': [1, 2]}
    """
    count, level = 1, [value]
    for _ in range(DEEPEST):
        children: list[Any] = []
        for node in level:
            inner = node.values() if isinstance(node, dict) else node
            if isinstance(node, dict | list | tuple | set):
                count += len(node)
                if count > MOST:
                    raise ValueError(f"file must hold at most {MOST} values, got more in {file}")
                children.extend(inner)
        if not children:
            return value
        level = children
    raise ValueError(f"file must have at most {DEEPEST} levels, got more in {file}")


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, then rename it: no reader sees a half-written file.

    If the process or the machine stops at any moment, the file holds either its old content or all
    of its new content. The other name contains the machine, the number of the process and a random
    part, so that several processes and threads may write at once. If writing fails, the file of
    that name is removed; what a killed process left is removed by the next call for this file. A
    link stays a link, and an existing file keeps its permissions.

    Args:
        file: The file. Its folder must exist.
        write: A function that is called with the path to write to.

    Raises:
        OSError: If the folder does not exist, or the disk is full. The error names the file,
            whatever library was writing.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_atomically(file, lambda partial: partial.write_text("whole"))
    >>> file.read_text(), len(list(file.parent.iterdir()))
    ('whole', 1)
    """
    file = file.resolve()
    _remove_left(file)
    own = f"{_machine()}-{os.getpid()}-{secrets.token_hex(3)}"
    partial = file.with_name(f"{file.name}.{own}.partial")
    try:
        write(partial)
        if file.exists():
            partial.chmod(file.stat().st_mode)
        _flush(partial)
        os.replace(partial, file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if found := _of_the_system(error, partial):
            raise OSError(*found, str(file)) from error
        raise
    with suppress(OSError):  # some systems cannot flush a folder; the file itself is safe
        _flush(file.parent)


def _of_the_system(error: BaseException, partial: Path) -> tuple[int, str] | None:
    """Return number and text of an error of the system while writing a file; None for others."""
    if isinstance(error, OSError):
        if error.errno is None or str(error.filename) not in ("None", str(partial)):
            return None
        return error.errno, error.strerror or ""
    if found := re.search(r"(?:.*: )?(.*) \(os error (\d+)\)", str(error)):  # of safetensors
        return int(found[2]), found[1]
    if "inline_container" in str(error):  # of torch.save, which does not tell
        return errno.EIO, "a file that is not whole; is the disk full?"
    return None


def write_text(file: Path, text: str) -> None:
    """Write a text file by `write_atomically`."""
    write_atomically(file, lambda partial: partial.write_text(text, newline=""))


def write_json(file: Path, record: Any) -> None:
    """Write JSON values as a readable file by `write_atomically`."""
    write_text(file, json.dumps(record, indent=2) + "\n")


def _machine() -> str:
    """Return the name of this machine as a part of a file name."""
    return re.sub(r"[^\w]", "_", platform.node())[:40]


def _remove_left(file: Path) -> None:
    """Remove the files that killed processes of this machine left in `write_atomically`."""
    name = rf"{re.escape(file.name)}\.{_machine()}-(\d+)-\w+\.partial"
    for left in file.parent.glob(f"{glob.escape(file.name)}.*.partial"):
        found = re.fullmatch(name, left.name)
        if found and not _alive(int(found[1])):
            left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Return True if a process of this machine runs, or if the system does not tell."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def cached(
    file: Path, read: Callable[[Path], T], make: Callable[[], T], write: Callable[[Path, T], Any]
) -> T:
    """Return the content of a cache file. Without the file, make the content and keep it.

    Caches are optional. A warning names a damaged file, and its content is made again. A folder
    that cannot be written gives a warning, too, and the content is then not kept.

    Args:
        file: The file. Its folder is created if it does not exist.
        read: Reads the file.
        make: Makes the content.
        write: Is called with a path and the content, see `write_atomically`.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "cache" / "a.txt"
    >>> for made in ("first", "second"):
    ...     cached(file, Path.read_text, lambda: made, Path.write_text)
    'first'
    'first'
    """
    try:
        return read(file)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # a damaged file fails in a dozen ways
        warnings.warn(f"cache must be readable, got {file}: {error}; made again", stacklevel=2)
    found = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda partial: write(partial, found))
    except Exception as error:  # safetensors has its own error for a full disk
        reason = error.strerror if isinstance(error, OSError) else error
        # without the name of the file, so that Python shows the warning once
        warnings.warn(
            f"cache must be a writable folder, got {file.parent}: {reason}; what it would hold is "
            "made again in every call",
            stacklevel=2,
        )
    return found


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def versions() -> dict[str, str]:
    """Return the versions of Python, flowkit and the installed packages that results depend on.

    Packages that are not installed are left out.

    >>> sorted(versions())[:2]
    ['POT', 'diffusers']
    """
    found = {"python": platform.python_version(), "flowkit": __version__}
    for package in (
        "torch",
        "torchdiffeq",
        "torchmetrics",
        "lightning",
        "hydra-core",
        "diffusers",
        "POT",
        "scipy",
        "scikit-learn",
        "transformers",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
