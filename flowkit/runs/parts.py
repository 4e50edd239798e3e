"""Sampling in parts: processes share the parts, and a stopped command continues from the disk."""

import hashlib
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from flowkit.blockwise import Blockwise, solve_cost
from flowkit.modules import FlowModule
from flowkit.provenance import tensor_hash, write_atomically
from flowkit.sampling import ODESampler
from flowkit.types import Cond, take

if TYPE_CHECKING:
    from flowkit.runs.run import Run

Columns = dict[str, Tensor]


class Parts:
    """Numbered parts of a computation. One process makes each part once and keeps it in a folder.

    The content of a part does not depend on the process that makes it, nor on the number of
    processes. A part that a stopped call has left in the folder is not made again.

    Args:
        folder: Parent of the folder of parts. All processes see this folder.
        key: Everything that the parts depend on, as JSON values. Each key has its own folder.
        fabric: The processes.
    """

    def __init__(self, folder: Path, key: Any, fabric: Fabric) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder, self.fabric = folder / f"parts-{digest[:16]}", fabric

    def make(self, count: int, make: Callable[[int], Columns]) -> list[Columns]:
        """Make parts ``0, …, count − 1``.

        Returns:
            All parts on the first process, an empty list on the others.

        Raises:
            RuntimeError: If the file of a part cannot be read.
        """
        rank, world = self.fabric.global_rank, self.fabric.world_size
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [self.folder / f"{number:06}.safetensors" for number in range(count)]
        hidden = True if rank else None  # with None, tqdm hides the bar if there is no terminal
        for number in tqdm(range(rank, count, world), "sampling", leave=False, disable=hidden):
            if not files[number].is_file():
                columns = {k: v.contiguous() for k, v in make(number).items()}
                write_atomically(files[number], partial(save_file, columns))
        self.fabric.barrier()
        return [] if rank else [_read(file) for file in files]

    def remove(self) -> None:
        """Delete the folder of parts after its use."""
        shutil.rmtree(self.folder, ignore_errors=True)


def draw_parts(
    run: "Run",
    x0: Sequence[Tensor],
    cond: Cond,
    sampler: ODESampler,
    finish: Callable[[Tensor], Columns] = lambda samples: {"samples": samples},
    parts: Parts | None = None,
) -> tuple[Columns, dict[str, Any]]:
    """Carry batches of source samples to data, and keep the result of ``finish`` on each batch.

    Args:
        run: The run, with its guidance.
        x0: Source samples in batches of one size; the last batch may be smaller.
        cond: Conditions of all samples.
        sampler: The solver and its grid.
        finish: Maps a batch of samples, on the CPU, to named tensors with one row per sample.
        parts: Storage of the batches until all are done, and the processes that share them.

    Returns:
        The rows of all batches, and their cost: velocity evaluations and network rows per sample,
        seconds of all processes together, number of processes, and the values of `block_cost`.
        Both are empty on all processes but the first.
    """
    size = len(x0[0])

    def make(number: int) -> Columns:
        batch = x0[number]
        conditions = take(cond, slice(number * size, number * size + len(batch)))
        return _drawn(run, batch, conditions, sampler, finish)

    if parts is None:
        numbers = tqdm(range(len(x0)), desc="sampling", leave=False, disable=None)
        made = [make(number) for number in numbers]
    else:
        made = parts.make(len(x0), make)
    if not made:
        return {}, {}
    spent: dict[str, float] = defaultdict(float)
    for part in made:
        for name in [name for name in part if name.startswith(COST)]:
            spent[name.removeprefix(COST)] += part.pop(name).item()
    columns = {name: torch.cat([part[name] for part in made]) for name in made[0]}
    count, flow = len(next(iter(columns.values()))), run.module.velocity
    if isinstance(flow, Blockwise):  # add the work of other processes and of earlier calls
        flow.usage.clear()
        for kind, counter in (("calls ", flow.usage.calls), ("rows ", flow.usage.rows)):
            used = {k.removeprefix(kind): int(n) for k, n in spent.items() if k.startswith(kind)}
            counter.update(used)
    return columns, {
        "nfe": spent["nfe"] / count,
        "network_rows_per_sample": spent["rows"] / count,
        "seconds": round(spent["seconds"], 3),
        "world_size": 1 if parts is None else parts.fabric.world_size,
        **block_cost(run.module, x0[0], cond, count),
    }


COST = "cost "  # prefix of the cost of a batch among its columns


def _drawn(
    run: "Run", x0: Tensor, cond: Cond, sampler: ODESampler, finish: Callable[[Tensor], Columns]
) -> Columns:
    """Sample one batch; return its columns, and its cost under names with the prefix `COST`."""
    flow = run.module.velocity
    if isinstance(flow, Blockwise):
        flow.usage.clear()
    began = time.perf_counter()
    solution = run.module.solve(x0, sampler, cond, run.guidance)
    spent: dict[str, float] = {"nfe": solution.nfe * len(x0), "rows": solution.rows}
    with torch.no_grad():
        samples = run.module.autoencoder.decode(solution.x).cpu()
        spent["seconds"] = time.perf_counter() - began  # without the time of finish()
        columns = finish(samples)
    if isinstance(flow, Blockwise):
        spent |= {f"calls {part}": n for part, n in flow.usage.calls.items()}
        spent |= {f"rows {part}": n for part, n in flow.usage.rows.items()}
    costs = {COST + k: torch.tensor([v], dtype=torch.float64) for k, v in spent.items()}
    return {**columns, **costs}


def block_cost(module: FlowModule, x0: Tensor, cond: Cond, num_samples: int) -> dict[str, Any]:
    """Return the cost of the parts of a blockwise run for ``num_samples`` samples.

    Returns:
        Feature mode, calls of the parts and FLOPs per sample, see `flowkit.blockwise.solve_cost`.
        For a run without blocks the result is empty.
    """
    if not isinstance(module.velocity, Blockwise):
        return {}
    return solve_cost(module.velocity, x0, cond, num_samples)


def file_name(name: str) -> str:
    """Return a name for a file: all characters but letters, digits and ``-_.`` become ``-``.

    >>> file_name("W-CFM 0.5")
    'W-CFM-0.5'
    """
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def hash_of(cond: Cond) -> str | None:
    """Return the hash of conditions, for a key of `Parts`."""
    return None if cond is None else tensor_hash(cast(Any, cond))


def _read(file: Path) -> Columns:
    """Read one part."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise RuntimeError(
            f"part must be readable, got {file}: {error}; delete the file to have it made again"
        ) from error


def draw(
    run: "Run", x0: Sequence[Tensor], cond: Cond, sampler: ODESampler
) -> tuple[Tensor, dict[str, Any]]:
    """Carry batches of source samples to data in one process; return samples and cost.

    See `draw_parts` for the cost.
    """
    columns, cost = draw_parts(run, x0, cond, sampler)
    return columns["samples"], cost
