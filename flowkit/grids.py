"""Grids of sampling times: the times at which a solver evaluates its steps.

A grid is a 1-D float64 tensor, strictly increasing within [0, 1]. A grid of ``n`` steps has
``n + 1`` times. A grid may cover a part of [0, 1]; the solve is then partial.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowkit.checks import as_grid, check_at_least, check_positive
from flowkit.provenance import read_json, write_json

FORMAT, FORMAT_VERSION = "flowkit-grid", 1


def uniform(num_steps: int) -> Tensor:
    """Return the uniform grid ``t_k = k / n``.

    Args:
        num_steps: Number of steps ``n``, at least 1.

    Raises:
        ValueError: If ``num_steps`` is below 1.

    >>> uniform(4)
    tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64)
    """
    check_at_least(num_steps, 1, "num_steps")
    return as_grid(num_steps)


def power(num_steps: int, rho: float) -> Tensor:
    """Return the power grid ``t_k = (k/n)^rho``.

    Args:
        num_steps: Number of steps ``n``, at least 1.
        rho: Positive exponent. Above 1, the steps near the noise are smaller; below 1, the steps
            near the data.

    Raises:
        ValueError: If an argument is out of its range.

    >>> power(2, rho=2.0)
    tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    check_positive(rho, "rho")
    return as_grid(uniform(num_steps) ** rho)


def shifted(num_steps: int, shift: float) -> Tensor:
    """Return the uniform grid with a shifted noise level ``σ ↦ shift σ / (1 + (shift−1) σ)``.

    The noise level is ``σ = 1 − t``.

    Args:
        num_steps: Number of steps, at least 1.
        shift: Positive. Above 1, the steps near the noise are smaller, which helps at high
            resolutions.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Esser et al., *Scaling Rectified Flow Transformers*, 2024 (arXiv 2403.03206), equation
    23.

    >>> shifted(2, shift=3.0)
    tensor([0.0000, 0.2500, 1.0000], dtype=torch.float64)
    """
    check_positive(shift, "shift")
    t = uniform(num_steps)
    # This is the same formula for t, without cancellation at t = 0.
    return as_grid(t / (t + shift * (1 - t)))


def blockwise(edges: Tensor | Sequence[float], steps: int | Sequence[int]) -> Tensor:
    """Return a grid that contains all edges of segments, with uniform steps in each segment.

    Args:
        edges: The ``M + 1`` ends of ``M`` segments, strictly increasing within [0, 1].
        steps: Number of steps per segment: one number for all segments, or ``M`` numbers.

    Raises:
        ValueError: If ``steps`` are not ``M`` positive numbers or ``edges`` do not increase.

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
    """Write a grid and its provenance as a small, readable JSON file.

    ``load(file)`` returns exactly the same times.

    Args:
        grid: The times.
        file: Path of the new file; its folder must exist.
        **provenance: JSON values that describe the origin of the grid, such as ``model_hash``,
            ``method`` and ``scores``.

    Raises:
        ValueError: If the times are not a grid.

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
    write_json(Path(file), record)


def load(file: str | Path, expected: Mapping[str, Any] | None = None) -> Tensor:
    """Read the times of a grid that `save` wrote.

    A grid belongs to a model, a guidance and a solver. With ``expected``, a warning appears for
    each value that differs from the provenance in the file.

    Args:
        file: Path of the file.
        expected: Values of the current model, guidance and solver, under the names of the
            provenance, such as ``{"model_hash": ..., "guidance": 1.5}``. Names that the file does
            not hold are ignored.

    Returns:
        Times ``(n + 1,)`` in float64.

    Raises:
        ValueError: If the file is not a grid of flowkit, has another format version, or its times
            are not a grid. The message names the file and the field.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "grid.json"
    >>> save([0.0, 0.3, 1.0], file)
    >>> load(file)
    tensor([0.0000, 0.3000, 1.0000], dtype=torch.float64)
    """
    record = _read(file)
    for name, value in (expected or {}).items():
        made = record["provenance"].get(name, value)
        if made != value:
            warnings.warn(
                f"grid in {file} should be used with {name} {_short(made)}, for which the grid was "
                f"made, got {_short(value)}; make a new grid with `flowkit boss`",
                stacklevel=2,
            )
    return as_grid(record["grid"])


def provenance(file: str | Path) -> dict[str, Any]:
    """Read the provenance of a grid that `save` wrote.

    Raises:
        ValueError: As for `load`.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "grid.json"
    >>> save(uniform(2), file, method="euler")
    >>> provenance(file)
    {'method': 'euler'}
    """
    return _read(file)["provenance"]


def _read(file: str | Path) -> dict[str, Any]:
    """Read and check the record in a file."""
    try:
        record = read_json(file)
    except ValueError as error:
        raise ValueError(f"file must be a grid written by flowkit, got {file}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(
            f"file must be a grid written by flowkit, got {file} without the format field"
        )
    if record.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"version of {file} must be {FORMAT_VERSION}, got {record.get('version')!r}; "
            "write the file again with this version of flowkit"
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
    """Return a value as text for a message; of a hash, only the first 12 characters."""
    return repr(value[:12] + "…" if isinstance(value, str) and len(value) == 64 else value)
