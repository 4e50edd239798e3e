"""Samples in parts: shared by processes, and kept on disk so that what was stopped goes on."""

import hashlib
import json
import shutil
import time
from collections import Counter
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
    """Numbered parts of some work, each made once by one process and kept in a folder.

    Which process makes a part has no influence on it, so neither has their number. A part that is
    there already, of an earlier call that was stopped, is not made again.

    Args:
        folder: Where the parts' own folder is made; all processes see it.
        key: All that parts depend on, ready for JSON; another key has another folder.
        fabric: The processes.
    """

    def __init__(self, folder: Path, key: Any, fabric: Fabric):
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder, self.fabric = folder / f"parts-{digest[:16]}", fabric

    def make(self, count: int, make: Callable[[int], Columns]) -> list[Columns]:
        """Make parts ``0, …, count − 1``; the first process gets them all, the others none.

        Raises:
            RuntimeError: If a part cannot be read, naming the file.
        """
        rank, world = self.fabric.global_rank, self.fabric.world_size
        self.folder.mkdir(parents=True, exist_ok=True)
        files = [self.folder / f"{number:06}.safetensors" for number in range(count)]
        hidden = True if rank else None  # None: only where there is no terminal
        for number in tqdm(range(rank, count, world), "sampling", leave=False, disable=hidden):
            if not files[number].is_file():
                columns = {k: v.contiguous() for k, v in make(number).items()}
                write_atomically(files[number], partial(save_file, columns))
        self.fabric.barrier()
        return [] if rank else [_read(file) for file in files]

    def remove(self) -> None:
        """Delete the parts, once what they are for is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def draw_parts(
    run: "Run",
    x0: Sequence[Tensor],
    cond: Cond,
    sampler: ODESampler,
    finish: Callable[[Tensor], Columns] = lambda samples: {"samples": samples},
    parts: Parts | None = None,
) -> tuple[Columns, dict[str, Any]]:
    """Carry batches of source samples to data, and keep what ``finish`` makes of them.

    Args:
        run: The run, whose guidance leads.
        x0: Source samples, in batches of one size but the last.
        cond: Conditions of all samples.
        sampler: The solver and its grid.
        finish: From a batch of samples, on the CPU, to named tensors of as many rows.
        parts: Where batches are kept until all are done, and the processes that share them.

    Returns:
        The rows of all batches, and their cost: velocity evaluations and network rows per sample,
        seconds of all processes together and their number, and for a blockwise run see
        `block_cost`. Both are empty on other processes than the first.
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
    spent: Counter[str] = Counter()
    for part in made:
        for name in [name for name in part if name.startswith(COST)]:
            spent[name.removeprefix(COST)] += part.pop(name).item()
    columns = {name: torch.cat([part[name] for part in made]) for name in made[0]}
    count, flow = len(next(iter(columns.values()))), run.module.velocity
    if isinstance(flow, Blockwise):  # also what other processes did, and earlier calls
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


COST = "cost "  # what a batch took, kept beside its columns


def _drawn(
    run: "Run", x0: Tensor, cond: Cond, sampler: ODESampler, finish: Callable[[Tensor], Columns]
) -> Columns:
    """What is kept of one batch, and what it took."""
    flow = run.module.velocity
    if isinstance(flow, Blockwise):
        flow.usage.clear()
    began = time.perf_counter()
    solution = run.module.solve(x0, sampler, cond, run.guidance)
    spent = {"nfe": solution.nfe * len(x0), "rows": solution.rows}
    with torch.no_grad():
        samples = run.module.autoencoder.decode(solution.x).cpu()
        spent["seconds"] = time.perf_counter() - began  # of sampling, not of what follows
        columns = finish(samples)
    if isinstance(flow, Blockwise):
        spent |= {f"calls {part}": n for part, n in flow.usage.calls.items()}
        spent |= {f"rows {part}": n for part, n in flow.usage.rows.items()}
    costs = {COST + k: torch.tensor([v], dtype=torch.float64) for k, v in spent.items()}
    return {**columns, **costs}


def block_cost(module: FlowModule, x0: Tensor, cond: Cond, num_samples: int) -> dict[str, Any]:
    """What the parts of a blockwise run did for so many samples; nothing for another run.

    Returns:
        Feature mode, calls of its parts and FLOPs per sample: see `flowkit.blockwise.solve_cost`.
    """
    if not isinstance(module.velocity, Blockwise):
        return {}
    return solve_cost(module.velocity, x0, cond, num_samples)


def file_name(name: str) -> str:
    """What a user called something, fit for a file."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def hash_of(cond: Cond) -> str | None:
    """The hash of conditions, for a key of `Parts`."""
    return None if cond is None else tensor_hash(cast(Any, cond))


def _read(file: Path) -> Columns:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise RuntimeError(
            f"part must be readable, got {file}: {error}; delete it to have it made again"
        ) from error


def draw(
    run: "Run", x0: Sequence[Tensor], cond: Cond, sampler: ODESampler
) -> tuple[Tensor, dict[str, Any]]:
    """Carry batches of source samples to data, with a progress bar; the short `draw_parts`."""
    columns, cost = draw_parts(run, x0, cond, sampler)
    return columns["samples"], cost
