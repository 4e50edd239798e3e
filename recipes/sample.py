"""Draw samples from a run and save them, with a picture.

flowkit sample run=runs/quickstart                        every class in turn
flowkit sample run=runs/quickstart labels=[3,8] num_samples=20 guidance=2
flowkit sample run=runs/quickstart sampler=euler sampler.grid=8
"""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from flowkit.metrics.pictures import save_picture
from flowkit.modules import FlowModule, load_run
from flowkit.modules.runs import CONFIG
from flowkit.sampling import ODESampler, seeded_noise


def sample(cfg: DictConfig) -> Tensor:
    """Sample as configured; writes ``samples.pt``, ``samples.png`` and ``samples.json``."""
    run = Path(cfg.run)
    module = load_run(run).to(cfg.device)
    num_classes = OmegaConf.load(run / CONFIG)["num_classes"]
    cond = choose_labels(cfg.labels, cfg.num_samples, num_classes)
    seeds = range(cfg.seed, cfg.seed + cfg.num_samples)
    sampler = instantiate(cfg.sampler)
    noise = noise_batches(module.sample_shape, seeds, cfg.batch_size)
    samples, cost = draw(module, noise, cond, sampler, cfg.guidance)

    folder = Path(cfg.out) if cfg.out else run / "drawn"
    picture = save_picture(samples, folder / "samples.png")
    torch.save({"samples": samples, "cond": cond}, folder / "samples.pt")
    record = {
        "num_samples": cfg.num_samples,
        "seeds": [seeds.start, seeds.stop],
        **describe(sampler, cfg.guidance),
        **cost,
    }
    (folder / "samples.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"picture   {picture}\nsamples   {folder / 'samples.pt'}")
    return samples


def choose_labels(labels: Any, num_samples: int, num_classes: int | None) -> Tensor | None:
    """Cycle through the labels asked for, or through all classes.

    Raises:
        ValueError: If labels are asked of a run without classes, or are out of range.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError(f"labels must be null for a run without classes, got {labels}")
        return None
    wanted = torch.tensor(range(num_classes) if labels is None else list(labels))
    if wanted.numel() == 0 or wanted.min() < 0 or wanted.max() >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes - 1}], got {wanted.tolist()}")
    return wanted.repeat(-(-num_samples // len(wanted)))[:num_samples]


def draw(
    module: FlowModule,
    x0: Iterable[Tensor],
    cond: Tensor | None,
    sampler: ODESampler,
    guidance: float | None,
) -> tuple[Tensor, dict[str, Any]]:
    """Carry batches of source samples to data, with a progress bar.

    Returns:
        The samples, and their cost: velocity evaluations and network rows per sample, seconds.
    """
    parts, done, nfe, rows, start = [], 0, 0, 0, time.perf_counter()
    for batch in tqdm(list(x0), desc="sampling", leave=False, disable=None):
        labels = None if cond is None else cond[done : done + len(batch)]
        solution = module.solve(batch, sampler, labels, guidance)
        parts.append(module.autoencoder.decode(solution.x).cpu())
        done, nfe, rows = done + len(batch), nfe + solution.nfe * len(batch), rows + solution.rows
    cost = {
        "nfe": nfe / done,
        "network_rows_per_sample": rows / done,
        "seconds": round(time.perf_counter() - start, 3),
    }
    return torch.cat(parts), cost


def noise_batches(shape: tuple[int, ...], seeds: range, batch_size: int) -> Iterator[Tensor]:
    """Noise of consecutive seeds, in batches; a seed's noise does not depend on the batches."""
    for start in range(0, len(seeds), batch_size):
        yield seeded_noise(shape, seeds[start : start + batch_size])


def describe(sampler: ODESampler, guidance: float | None) -> dict[str, Any]:
    """Return what a sample depends on besides weights and seeds."""
    return {
        "method": sampler.method,
        "grid": sampler.times.tolist(),
        "rtol": sampler.rtol,
        "atol": sampler.atol,
        "guidance": guidance,
    }


@hydra.main(version_base="1.3", config_path="../conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit sample``."""
    sample(cfg)


if __name__ == "__main__":
    main()
