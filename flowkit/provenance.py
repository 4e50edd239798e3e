"""Provenance of results: hashes of tensors, versions of packages, atomic writing of files."""

import hashlib
import os
import platform
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from flowkit._version import __version__


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


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, then rename it: no reader sees a half-written file.

    If the process or the machine stops at any moment, the file holds either its old content or all
    of its new content. The other name contains the number of the process and a random part, so that
    several processes and threads may write at once. If writing fails, the file of that name is
    removed. A link stays a link, and an existing file keeps its permissions.

    Args:
        file: The file. Its folder must exist.
        write: A function that is called with the path to write to.

    Raises:
        OSError: If the folder does not exist or the disk is full.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_atomically(file, lambda partial: partial.write_text("whole"))
    >>> file.read_text(), len(list(file.parent.iterdir()))
    ('whole', 1)
    """
    file = file.resolve()
    partial = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(3)}.partial")
    try:
        write(partial)
        if file.exists():
            partial.chmod(file.stat().st_mode)
        _flush(partial)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some systems cannot flush a folder; the file itself is safe
        _flush(file.parent)


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
        "torch-fidelity",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
