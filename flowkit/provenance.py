"""Provenance of results: hashes of tensors and versions of packages."""

import hashlib
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

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
        named = sorted(tensors.items())
    else:
        named = [(str(i), tensor) for i, tensor in enumerate(tensors)]
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
