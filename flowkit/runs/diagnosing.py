"""Networks for ``flowkit doctor``, with examples as in their training."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.autoencoders import Autoencoder, FrozenAutoencoder
from flowkit.couplings import Coupling, Independent
from flowkit.data import SplitData
from flowkit.diagnosis import Finding
from flowkit.diagnosis.diagnose import FEWEST
from flowkit.diagnosis.findings import line
from flowkit.guidance import replace_cond
from flowkit.hub import is_pushed
from flowkit.modules import MeanFlowMatching, SymmetricalFlowMatching, load_run
from flowkit.modules.flow import evaluating
from flowkit.paths import Linear, Path
from flowkit.runs.known_data import read_data_record
from flowkit.runs.run import Run
from flowkit.runs.splits import stored_data
from flowkit.types import Batch, Pairs, take, to_device
from flowkit.velocity import Velocity


@dataclass(frozen=True, eq=False)
class Subject:
    """Networks and held-out pairs, as arguments of `flowkit.diagnosis.diagnose`."""

    velocity: Velocity
    pairs: Pairs
    path: Path
    raw: Velocity | None = None
    guided: Velocity | None = None


def examine(run: Run, data: SplitData | None, count: int, seed: int) -> Subject:
    """Return the velocity of a run without guidance, and held-out pairs as its training has them.

    A network that has learnt guidance gets no condition: without one, it has learnt the velocity.

    Args:
        run: The run.
        data: Data with a test split, in place of those of the run; None takes the run's.
        count: Number of samples, at most.
        seed: Seed of the choice of samples, and of the noise.

    Raises:
        TypeError: If the training is not that of one velocity between noise and data.
    """
    module, generator = run.module, torch.Generator().manual_seed(seed)
    if isinstance(module, SymmetricalFlowMatching) or getattr(module, "masks", None):
        kind = (
            "joint states" if isinstance(module, SymmetricalFlowMatching) else "images with holes"
        )
        raise TypeError(
            f"run must be a flow between noise and data for flowkit doctor, got one of {kind}"
        )
    if data is None and run.config["data"].get("_target_") == "flowkit.data.Pairs":
        batch = chosen(_own_pairs(run), count, generator, "val")
    else:
        batch = chosen(run.data if data is None else data, count, generator)
    if "t0" in batch:
        raise TypeError(
            "run must have learnt the velocity at all times for flowkit doctor, got one that was "
            "straightened on segments, which knows its own grid alone"
        )
    if run.num_classes is None and _is_label(batch):
        batch = cast(Batch, {**batch, "cond": None})  # the network takes no labels
    coupling = getattr(module, "coupling", Independent())
    size = run.config.get("batch_size", 256)
    with evaluating(module):
        pairs = paired(_states(run, batch, generator), coupling, size, generator)
    raw = None
    if run.weights["kind"] == "averaged" and not is_pushed(run.folder):
        raw = load_run(run.folder, weights="raw", trust=run.trust).to(run.device).velocity
    guided = None if run.guidance in (None, 1) else run.velocity
    if learnt_guidance(run) is not None:
        null = cast(Any, module.drop_cond).null
        pairs = pairs._replace(cond=replace_cond(pairs.cond, null))
    return Subject(module.velocity, pairs, getattr(module, "path", Linear()), raw, guided)


def learnt_guidance(run: Run) -> float | None:
    """Return the scale of the guidance that a mean flow has learnt; None without."""
    module = run.module
    scale = module.guidance_scale if isinstance(module, MeanFlowMatching) else None
    return None if scale in (None, 1) else scale


def progress(run: Run) -> Finding | None:
    """Return the line on the steps of the training; None if their number was not limited."""
    done = run.weights.get("step")
    most = (run.config.get("trainer") or {}).get("max_steps", -1)
    if done is None or most < 1:
        return None
    return line(
        "progress",
        done < most,
        f"step {done} of {most}",
        f"the training was stopped: flowkit train resume={run.folder}",
    )


def chosen(data: SplitData, count: int, generator: torch.Generator, split: str = "test") -> Batch:
    """Return ``count`` random samples of a split, or all if there are fewer.

    Raises:
        ValueError: If the split has fewer than the lines need.
    """
    samples = data.split(split)
    check_enough(len(samples), split)
    return samples[torch.randperm(len(samples), generator=generator)[:count]]


def check_enough(count: int, split: str = "test") -> None:
    """Require a split with as many samples as the lines need.

    Raises:
        ValueError: If there are fewer.
    """
    if count < FEWEST:
        raise ValueError(
            f"the {split} split must hold at least {FEWEST} samples for flowkit doctor, got {count}"
            f"; give data=<data> with more samples, or train with a larger data.{split}_fraction"
        )


def check_recorded(place: str, changed: str) -> None:
    """Require enough test samples where the record of a run tells their number, before all work.

    Args:
        place: Folder or name of the run.
        changed: ``"accept"`` skips the check: the data may be more than those of the record.

    Raises:
        ValueError: If there are fewer.
    """
    record = read_data_record(place)
    if record is None or changed == "accept" or record["kind"] in ("Latents", "Pairs"):
        return  # test samples of caches are those of their images
    if (test := record["splits"].get("test")) is not None:
        check_enough(test["samples"])


def paired(batch: Batch, coupling: Coupling, size: int, generator: torch.Generator) -> Pairs:
    """Pair data with their own source samples or with noise, in batches as in training.

    Weighted pairs are drawn again by their weights, so that all weigh the same.

    Args:
        batch: States of the flow.
        coupling: The coupling of the training.
        size: Size of a batch of the training.
        generator: Draws the noise, on the CPU.
    """
    x1, x0, parts = batch["x1"], batch.get("x0"), []
    if x0 is None:
        x0 = torch.randn(x1.shape, generator=generator).to(x1)
    for k in range(0, len(x1), size):
        rows = slice(k, k + size)
        made = coupling.pair(x0[rows], x1[rows], take(batch.get("cond"), rows))
        if made.log_weight is not None:
            weight = made.log_weight.softmax(0).cpu()
            drawn = torch.multinomial(weight, len(weight), True, generator=generator)
            drawn = drawn.to(x1.device)
            made = Pairs(made.x0[drawn], made.x1[drawn], take(made.cond, drawn))
        parts.append(made)
    cond = parts[0].cond
    if isinstance(cond, Tensor):
        cond = torch.cat([cast(Tensor, part.cond) for part in parts])
    elif cond is not None:
        cond = {name: torch.cat([cast(Any, part.cond)[name] for part in parts]) for name in cond}
    x0, x1 = (torch.cat([getattr(part, end) for part in parts]) for end in ("x0", "x1"))
    return Pairs(x0, x1, cond)


@torch.no_grad()
def encoded(
    autoencoder: Autoencoder, x1: Tensor, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Encode data ``(N, *)``, at most ``batch_size`` samples at once."""
    drawn = {"generator": generator} if isinstance(autoencoder, FrozenAutoencoder) else {}
    return torch.cat([autoencoder.encode(part, **drawn) for part in x1.split(batch_size)])


def _own_pairs(run: Run) -> SplitData:
    """Return the pairs that a run was trained on."""
    place = (run.trust, run.folder, run.data_root, run.data_changed)
    return stored_data(run.config["data"], *place, through=False)


def _is_label(batch: Batch) -> bool:
    cond = batch.get("cond")
    return isinstance(cond, Tensor) and cond.ndim == 1


def _states(run: Run, batch: Batch, generator: torch.Generator) -> Batch:
    """Return the batch as states of the flow, on the device of the run."""
    moved: dict[str, Any] = {"x1": batch["x1"].to(run.device)}
    moved["cond"] = to_device(batch.get("cond"), run.device)
    if "encoded_by" in batch or "taught_by" in batch:
        moved["encoded_by"] = batch.get("encoded_by", getattr(run.module.autoencoder, "hash", None))
    encoded = run.module.encode(cast(Batch, moved), generator)
    states = {"x1": run.module.as_state(encoded["x1"]), "cond": moved["cond"]}
    if "x0" in batch:
        states["x0"] = run.module.as_state(batch["x0"])
    return cast(Batch, states)
