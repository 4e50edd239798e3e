"""Draw samples from a run and save them, with a picture.

flowkit sample run=runs/quickstart                        every class in turn
flowkit sample run=runs/quickstart labels=[3,8] num_samples=20 guidance=2
flowkit sample run=runs/quickstart sampler=euler sampler.grid=8
flowkit sample run=runs/blocks feature_mode=cached            of blocks: the trunk once a segment
flowkit sample run=runs/quickstart num_samples=50000 device=cuda devices=8

Samples start from noise, one seed each. Where the data of the run bring source samples, or
conditions that are no labels, they start from those of the test split, and are at most as many.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit import grids
from flowkit.checks import check_at_least
from flowkit.data import SplitData
from flowkit.metrics import tensor_hash, versions
from flowkit.metrics.pictures import save_picture
from flowkit.modules import FlowModule, load_run
from flowkit.modules.flow import labels_of
from flowkit.modules.runs import build, read_config
from flowkit.nn.blockwise import Blockwise
from flowkit.recipes._parts import Parts, draw_parts, hash_of, launch, say
from flowkit.sampling import ODESampler, seeded_noise
from flowkit.types import Batch, Cond


def sample(cfg: DictConfig) -> Tensor:
    """Sample as configured; writes ``samples.pt``, ``samples.png`` and ``samples.json``.

    Returns:
        The samples; none on other processes than the first.
    """
    run, fabric = Path(cfg.run), launch(cfg)
    trained, module = read_config(run), loaded(cfg, fabric.device)
    sampler = make_sampler(cfg.sampler, module, cfg.guidance)
    chosen = "all classes in turn" if cfg.labels is None else "the labels asked for, in turn"
    if trained.get("needs_data"):
        data = test_data(trained)
        batch = choose_samples(data, cfg.labels, cfg.num_samples)
        cond, size, chosen = batch.get("cond"), len(batch["x1"]), "of the test split"
        x0, source = start(module, cfg, size, given_source(batch, data))
    else:
        cond = choose_labels(cfg.labels, cfg.num_samples, trained["num_classes"])
        x0, source = start(module, cfg, cfg.num_samples)
    folder = Path(cfg.out) if cfg.out else run / "drawn"
    used = {"weights": weights(module), **describe(sampler, cfg.guidance), **source}
    parts = Parts(folder, {**used, "cond": hash_of(cond), "mode": cfg.feature_mode}, fabric)
    drawn, cost = draw_parts(module, x0, cond, sampler, cfg.guidance, parts=parts)
    if not fabric.is_global_zero:
        return torch.empty(0)

    samples = drawn["samples"]
    record = {
        "weights": used["weights"],
        "sampling": {
            **describe(sampler, cfg.guidance),
            **cost,
            **source,
            "conditions": None if cond is None else chosen,
            "labels": None if cfg.labels is None else list(cfg.labels),
            "cond": hash_of(cond),
        },
        "versions": versions(),
    }
    files = [folder / f"samples.{kind}" for kind in ("json", "png", "pt")]
    write_record(record, files)
    torch.save({"samples": samples, "cond": cond}, files[2])
    save_picture(samples, files[1])
    parts.remove()
    print(f"picture   {files[1]}\nsamples   {files[2]}")
    return samples


def loaded(cfg: DictConfig, device: torch.device) -> FlowModule:
    """Load a run; a blockwise one samples in the feature mode asked for, or its own, and says so.

    Raises:
        ValueError: If a feature mode is asked of a run without blocks, or of one that lacks the
            part for it.
    """
    module = load_run(cfg.run).to(device)
    flow = module.velocity
    if isinstance(flow, Blockwise):
        flow.feature_mode = cfg.feature_mode or flow.feature_mode
        say(f"features  {flow.feature_mode}")
    elif cfg.feature_mode is not None:
        raise ValueError(
            f"feature_mode must be null for a run without blocks, got {cfg.feature_mode}"
        )
    return module


# --- where samples start -----------------------------------------------------------------------


def choose_labels(labels: Any, num_samples: int, num_classes: int | None) -> Tensor | None:
    """Cycle through the labels asked for, or through all classes.

    Raises:
        ValueError: If labels are asked of a run without classes, or are out of range.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError(f"labels must be null for a run without classes, got {labels}")
        return None
    if labels is not None and not (
        isinstance(labels, Sequence) and all(isinstance(label, int) for label in labels)
    ):
        raise ValueError(f"labels must be a list of classes, such as [0,1], got {labels}")
    wanted = torch.tensor(range(num_classes) if labels is None else list(labels))
    if wanted.numel() == 0 or wanted.min() < 0 or wanted.max() >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes - 1}], got {wanted.tolist()}")
    return wanted.repeat(-(-num_samples // len(wanted)))[:num_samples]


def test_data(trained: dict[str, Any]) -> SplitData:
    """Read the data that a run was trained on, from its configuration; of latents, their images."""
    data = build(trained["data"])
    data.prepare_data()
    data.setup("test")
    images = getattr(data, "source", None)
    return test_data({"data": images}) if isinstance(images, dict) else data


def choose_samples(data: SplitData, labels: Any, num_samples: int) -> Batch:
    """Return the first samples of the test split, or the first with the labels asked for.

    Raises:
        ValueError: If labels are asked of data without, or the split holds none of them.
    """
    if labels is None:
        return data.test[:num_samples]
    wanted = choose_labels(labels, num_samples, data.num_classes)
    known = labels_of(data.test[:], data.num_classes)
    if known is None or wanted is None or not torch.isin(known, wanted).any():
        raise ValueError(f"labels must be among those of the test split, got {labels}")
    return data.test[torch.isin(known, wanted).nonzero()[:num_samples, 0]]


def given_source(batch: Batch, data: SplitData) -> Tensor | None:
    """Return source samples ``(N, *)`` that samples have to start from; None is any noise."""
    return None if data.x0_is_noise else batch.get("x0")


def start(
    module: FlowModule, cfg: DictConfig, num_samples: int, x0: Tensor | None = None
) -> tuple[Sequence[Tensor], dict[str, Any]]:
    """Cut source samples into batches: those given, or noise of seeds ``cfg.seed, …``.

    Returns:
        The batches, of one size but the last, and a record of how they were made.

    Raises:
        RuntimeError: If the run has not seen a batch.
        ValueError: If a number of samples is not positive.
    """
    for name, number in (("num_samples", num_samples), ("batch_size", cfg.batch_size)):
        check_at_least(number, 1, name)
    if module.sample_shape is None:
        raise RuntimeError("run must have trained at least one step, got no sample shape")
    record = {"num_samples": num_samples, "batch_size": cfg.batch_size}
    if x0 is not None:
        return list(x0.split(cfg.batch_size)), {**record, "source": "test split", "seeds": None}
    seeds = range(cfg.seed, cfg.seed + num_samples)
    batches = noise_batches(module.sample_shape, seeds, cfg.batch_size)
    return batches, {**record, "source": "noise", "seeds": [seeds.start, seeds.stop]}


def noise_batches(shape: tuple[int, ...], seeds: range, batch_size: int) -> Sequence[Tensor]:
    """Noise of consecutive seeds, in batches; a seed's noise does not depend on the batches."""
    return _Noise(shape, seeds, batch_size)


@dataclass(frozen=True)
class _Noise(Sequence):
    """Batches of noise, drawn when asked for."""

    shape: tuple[int, ...]
    seeds: range
    batch_size: int

    def __len__(self) -> int:
        return math.ceil(len(self.seeds) / self.batch_size)

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)
        first = number * self.batch_size
        return seeded_noise(self.shape, self.seeds[first : first + self.batch_size])


def make_sampler(cfg: DictConfig, module: FlowModule, guidance: float | None) -> ODESampler:
    """Build a sampler; a grid from a file that was made for something else is warned about."""
    sampler = instantiate(cfg)
    if OmegaConf.is_dict(cfg.grid) and (file := cfg.grid.get("file")):
        used = {
            "model_hash": weights(module)["hash"],
            "method": sampler.method,
            "guidance": None if guidance == 1 else guidance,
        }
        grids.load(file, used)
    return sampler


def draw(
    module: FlowModule,
    x0: Sequence[Tensor],
    cond: Cond,
    sampler: ODESampler,
    guidance: float | None,
) -> tuple[Tensor, dict[str, Any]]:
    """Carry batches of source samples to data, with a progress bar; the short `draw_parts`."""
    columns, cost = draw_parts(module, x0, cond, sampler, guidance)
    return columns["samples"], cost


# --- records -----------------------------------------------------------------------------------


def weights(module: FlowModule | Path) -> dict[str, Any]:
    """Return which weights a loaded module or a run holds: averaged or raw, their step and hash."""
    if isinstance(module, Path):
        module = load_run(module)
    return {**(module.weights or {}), "hash": tensor_hash(module.state_dict())}


def describe(sampler: ODESampler, guidance: float | None) -> dict[str, Any]:
    """Return what a sample depends on besides weights and start."""
    return {
        "method": sampler.method,
        "grid": sampler.times.tolist(),
        "rtol": sampler.rtol,
        "atol": sampler.atol,
        "guidance": guidance,
    }


def write_record(record: dict[str, Any], files: list[Path]) -> None:
    """Write a record to the first of its files, setting aside an earlier one that says otherwise.

    Then ``metrics.json`` becomes ``metrics-1.json`` (or the next number that is free), and its
    other files move likewise.
    """
    file, text = files[0], json.dumps(record, indent=2) + "\n"
    if file.is_file() and _timeless(file.read_text()) != _timeless(text):
        number = next(n for n in count(1) if not file.with_stem(f"{file.stem}-{n}").exists())
        for earlier in filter(Path.is_file, files):
            earlier.rename(earlier.with_stem(f"{earlier.stem}-{number}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _timeless(text: str) -> str:
    """A record without how long it took."""
    return re.sub(r'"seconds": [\d.]+', "", text)


@hydra.main(version_base="1.3", config_path="../conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit sample``."""
    sample(cfg)


if __name__ == "__main__":
    main()
