"""Drawing of samples from a run: starts like the test split, batches, and their cost."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from flowkit.blockwise import Blockwise, solve_cost
from flowkit.checks import check_at_least
from flowkit.data import SplitData
from flowkit.modules import FlowModule, SymmetricalFlowMatching
from flowkit.modules.flow import brings_start, labels_of
from flowkit.runs.parts import Bar, Columns, Parts
from flowkit.runs.processes import say
from flowkit.runs.run import Run
from flowkit.runs.starts import given_source, noise_batches
from flowkit.sampling import ADAPTIVE, ODESampler, Sampler, sample_seeds
from flowkit.sampling.ode import Callback
from flowkit.types import Batch, Cond, take


def start(
    run: Run, cfg: DictConfig, num_samples: int, x0: Tensor | None = None
) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Cut source samples into batches: given samples, or noise of ``cfg.seed``.

    Returns:
        The batches, of one size except for the last, and a record of their origin.

    Raises:
        RuntimeError: If the run has not seen a batch.
        ValueError: If ``num_samples`` or ``batch_size`` is below 1.
    """
    for name, number in (("num_samples", num_samples), ("batch_size", cfg.batch_size)):
        check_at_least(number, 1, name)
    shape, record = run.sample_shape, {"num_samples": num_samples, "batch_size": cfg.batch_size}
    if x0 is not None:
        return list(x0.split(cfg.batch_size)), {**record, "source": "test split", "seeds": None}
    seeds = sample_seeds(cfg.seed, 0, num_samples, cfg.seeding)
    batches = noise_batches(shape, seeds, cfg.batch_size)
    seeded = {"seeds": [seeds.start, seeds.stop], "seeding": cfg.seeding}
    return batches, {**record, "source": "noise", **seeded}


def like_test(run: Run, cfg: DictConfig) -> tuple[Sequence[Tensor], Cond, dict[str, Any], str]:
    """Return starts for samples that are compared with the test split.

    Returns:
        Batches of source samples, conditions of all samples, a record of the source samples, and
        the choice of conditions in words.
    """
    data, test = run.data, run.data.test[:]
    rows, chosen = _rows_like(test, data, cfg.num_samples)
    given = given_source(test, data)
    x0, source = start(run, cfg, len(rows), None if given is None else given[rows])
    return x0, take(test.get("cond"), rows), source, chosen


def _rows_like(test: Batch, data: SplitData, num_samples: int) -> tuple[Tensor, str]:
    """Return rows of the test split that give conditions (and starts), and the choice in words."""
    if brings_start(test, data):
        return torch.arange(min(num_samples, len(test["x1"]))), "of the test split"
    labels = labels_of(test, data.num_classes)
    if labels is None:  # then only the number of rows counts
        labels = torch.zeros(len(test["x1"]))
    return proportional_rows(labels, num_samples), "labels in the proportions of the test split"


def proportional_rows(labels: Tensor, num_samples: int) -> Tensor:
    """Return ``num_samples`` rows of ``labels (N,)`` in the proportions of ``labels``.

    Proportions are exact to within one sample. Between sets of different proportions a distance
    would also measure the difference in proportions.

    >>> labels = torch.tensor([1, 0, 0, 0])
    >>> labels[proportional_rows(labels, 8)]
    tensor([0, 0, 0, 0, 0, 0, 1, 1])
    """
    places = (torch.arange(num_samples, dtype=torch.float64) + 0.5) * len(labels) / num_samples
    return labels.argsort(stable=True)[places.long()]


def in_words(run: Run, sampler: Sampler) -> str:
    """Return solver, steps and guidance in words."""
    steps = len(sampler.times) - 1
    size = f"{steps} step{'' if steps == 1 else 's'}"
    if not _is_fixed(sampler) and isinstance(sampler, ODESampler):
        size = f"rtol {sampler.rtol:g}, atol {sampler.atol:g}"
    scale = run.describe(sampler)["guidance"]
    return (
        f"{sampler.method}, {size}, {'no guidance' if scale in (None, 1) else f'guidance {scale}'}"
    )


def say_plan(run: Run, sampler: Sampler, num_samples: int) -> None:
    """Print, once for all processes, how many samples are drawn, from which run, how and where."""
    how = f"{in_words(run, sampler)}, on {run.module.device}"
    say(f"drawing   {num_samples:,} samples of {run.place}: {how}")


def _is_fixed(sampler: Sampler) -> bool:
    """Return True for the solvers that take the steps of their grid, and call back after each."""
    return isinstance(sampler, ODESampler) and sampler.method not in ADAPTIVE


def draw_parts(
    run: Run,
    x0: Sequence[Tensor],
    cond: Cond,
    sampler: Sampler,
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
    fixed = _is_fixed(sampler)  # a callback would make an adaptive one stop at times of its grid
    bar = Bar("sampling", len(sampler.times) - 1 if fixed else 1)

    def make(number: int) -> Columns:
        batch = x0[number]
        conditions = take(cond, slice(number * size, number * size + len(batch)))
        return _drawn(run, batch, conditions, sampler, finish, bar.step if fixed else None)

    if parts is None:
        made = [make(number) for number in bar.over(range(len(x0)))]
    else:
        made = parts.make(len(x0), make, bar)
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
    run: Run,
    x0: Tensor,
    cond: Cond,
    sampler: Sampler,
    finish: Callable[[Tensor], Columns],
    callback: Callback | None,
) -> Columns:
    """Sample one batch; return its columns, and its cost under names with the prefix `COST`."""
    flow = run.module.velocity
    if isinstance(flow, Blockwise):
        flow.usage.clear()
    began = time.perf_counter()
    solution = run.module.solve(x0, sampler, cond, run.guidance, callback=callback)
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


def draw(
    run: Run, x0: Sequence[Tensor], cond: Cond, sampler: Sampler
) -> tuple[Tensor, dict[str, Any]]:
    """Carry batches of source samples to data in one process; return samples and cost.

    See `draw_parts` for the cost.
    """
    columns, cost = draw_parts(run, x0, cond, sampler)
    return columns["samples"], cost


def symmetrical(run: Run) -> SymmetricalFlowMatching:
    """Return the module of a symmetrical run, which can label images.

    Raises:
        TypeError: If the run has another method.
    """
    if not isinstance(run.module, SymmetricalFlowMatching):
        raise TypeError(
            "run must be a run of SymmetricalFlowMatching (module=symmetrical) to label images, "
            f"got {type(run.module).__name__}"
        )
    return run.module
