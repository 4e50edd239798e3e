"""Sampling-time grids: at which times a solver stops on its way.

A grid is a 1-D float64 tensor, strictly increasing within [0, 1]; ``n`` steps have ``n + 1``
times. A grid of a part of [0, 1] is fine: a partial solve.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit.checks import as_grid, check_at_least, check_positive

FORMAT, FORMAT_VERSION = "flowkit-grid", 1


def uniform(num_steps: int) -> Tensor:
    """Return ``t_k = k / n``.

    >>> uniform(4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    check_at_least(num_steps, 1, "num_steps")
    return as_grid(num_steps)


def power(num_steps: int, rho: float) -> Tensor:
    """Return ``t_k = (k/n)^rho``: ``rho > 1`` takes its smaller steps near the noise.

    >>> power(2, rho=2.0)
    tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    check_positive(rho, "rho")
    return as_grid(uniform(num_steps) ** rho)


def shifted(num_steps: int, shift: float) -> Tensor:
    """Return the uniform grid with its noise level shifted, ``σ ↦ shift σ / (1 + (shift−1) σ)``.

    ``σ = 1 − t``; ``shift > 1`` takes its smaller steps near the noise, as high resolutions want.
    Source: Esser et al., *Scaling Rectified Flow Transformers*, 2024 (arXiv 2403.03206),
    equation 23.

    >>> shifted(2, shift=3.0)
    tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    check_positive(shift, "shift")
    t = uniform(num_steps)
    return as_grid(t / (t + shift * (1 - t)))  # the same, without cancellation near t = 0


def blockwise(edges: Tensor | Sequence[float], steps: int | Sequence[int]) -> Tensor:
    """Return a grid that holds every edge, with uniform steps inside each segment.

    Args:
        edges: The ``M + 1`` ends of the ``M`` segments, increasing.
        steps: Steps of every segment: one number for all, or ``M`` numbers.

    Raises:
        ValueError: If ``steps`` are not ``M`` positive numbers.

    >>> blockwise([0.0, 0.5, 1.0], steps=[1, 2])
    tensor([0.0000, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    ends = as_grid(edges, "edges")
    counts = [steps] * (len(ends) - 1) if isinstance(steps, int) else list(steps)
    if len(counts) != len(ends) - 1:
        raise ValueError(
            f"steps must hold one number per segment, {len(ends) - 1}, got {len(counts)}"
        )
    for count in counts:
        check_at_least(count, 1, "steps")
    parts = [
        torch.linspace(a, b, n + 1, dtype=torch.float64)[:-1]
        for a, b, n in zip(ends[:-1].tolist(), ends[1:].tolist(), counts, strict=True)
    ]
    return as_grid(torch.cat([*parts, ends[-1:]]))


def save(grid: Tensor | Sequence[float], file: str | Path, **provenance: Any) -> None:
    """Write a grid, and whatever is to be remembered of its making, as small readable JSON.

    ``load(file)`` returns exactly the same times.

    Args:
        grid: The times.
        file: Where to write; its folder must exist.
        **provenance: JSON values such as ``model_hash``, ``method``, ``scores``.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "grid.json"
    >>> save(uniform(2), file, method="euler")
    >>> load(file)
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "grid": as_grid(grid).tolist(),
        "provenance": provenance,
    }
    Path(file).write_text(json.dumps(record, indent=2) + "\n")


def load(file: str | Path, expected: Mapping[str, Any] | None = None) -> Tensor:
    """Read the times written by `save`.

    A grid belongs to a model, a guidance and a solver.

    Args:
        file: The file.
        expected: What the grid is to be used with, under the names of its provenance, such as
            ``{"model_hash": ..., "guidance": 1.5}``. What the file says otherwise is warned of;
            what it does not say is not.

    Raises:
        ValueError: Naming the file and the field, if it is not such a file, is of another
            format version, or its times are not a grid.
    """
    record = _read(file)
    for name, value in (expected or {}).items():
        made = record["provenance"].get(name, value)
        if made != value:
            warnings.warn(
                f"grid of {file} should be used with {name} {_short(made)}, which it was made for, "
                f"got {_short(value)}; make another by `flowkit boss`",
                stacklevel=2,
            )
    return as_grid(record["grid"])


def provenance(file: str | Path) -> dict[str, Any]:
    """Read what `save` remembered of a grid's making.

    Raises:
        ValueError: As `load`.
    """
    return _read(file)["provenance"]


def _read(file: str | Path) -> dict[str, Any]:
    try:
        record = json.loads(Path(file).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"file must be a grid written by flowkit, got {file}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"file must be a grid written by flowkit, got {file} without its format")
    if record.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"version of {file} must be {FORMAT_VERSION}, got {record.get('version')!r}; "
            "write it again with this flowkit"
        )
    try:
        record["grid"] = as_grid(list(record["grid"])).tolist()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"grid in {file} must be a list of increasing times: {error}") from error
    if not isinstance(record.get("provenance"), dict):
        raise ValueError(
            f"provenance in {file} must be a mapping, got {record.get('provenance')!r}"
        )
    return record


def _short(value: Any) -> str:
    """A value in a message; a hash needs no more than its start."""
    return repr(value[:12] + "…" if isinstance(value, str) and len(value) == 64 else value)
