"""Provenance of results: hashes of tensors, versions of packages, files written as a whole."""

import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Mapping
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
    """SHA-256 of a header and of tensors: identities of autoencoders, fingerprints of data.

    It differs from `tensor_hash` in its punctuation alone. Checkpoints and caches hold digests of
    either, and are compared with them when they are read: neither may ever change.

    Args:
        columns: A mapping from names to tensors; its order does not enter.
        header: A configuration, say.

    Returns:
        64 hexadecimal digits.

    >>> content_hash({"x": torch.zeros(2)}) == content_hash({"x": torch.zeros(2)}, "{}")
    False
    """
    return _digest(sorted(columns.items()), header, "{} {} {}\n")


def _digest(named: Iterable[tuple[str, Tensor]], header: str, label: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name, tensor in named:
        digest.update(label.format(name, tensor.dtype, tuple(tensor.shape)).encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then move it there: it is never seen half written.

    Whenever the process or the machine dies, the place holds what it held before, or all of the
    new. The file written beside bears the number of the process, so that several may write; it is
    removed if writing fails.

    Args:
        file: The place; its folder must exist.
        write: Called with the path to write to.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_atomically(file, lambda partial: partial.write_text("whole"))
    >>> file.read_text(), len(list(file.parent.iterdir()))
    ('whole', 1)
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        write(partial)
        _flush(partial)
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
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
