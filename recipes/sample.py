"""Draw samples from a run and save them, with a picture.

flowkit sample run=runs/quickstart                        every class in turn
flowkit sample run=runs/quickstart labels=[3,8] num_samples=20 guidance=2
flowkit sample run=runs/quickstart sampler=euler sampler.grid=8
flowkit sample run=runs/blocks feature_mode=cached            of blocks: the trunk once a segment
flowkit sample run=runs/quickstart num_samples=50000 device=cuda devices=8

Samples start from noise, one seed each. Where the data of the run bring source samples, or
conditions that are no labels, they start from those of the test split, and are at most as many.
"""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from flowkit.metrics.pictures import save_picture
from flowkit.modules.checkpoints import read_config
from flowkit.provenance import versions
from flowkit.runs.parts import Parts, draw_parts, hash_of, launch
from flowkit.runs.records import describe, make_sampler, weights, write_record
from flowkit.runs.run import loaded
from flowkit.runs.starts import choose_labels, choose_samples, given_source, start, test_data


def sample(cfg: DictConfig) -> Tensor:
    """Sample as configured; writes ``samples.pt``, ``samples.png`` and ``samples.json``.

    Returns:
        The samples; none on other processes than the first.
    """
    run, fabric = Path(cfg.run), launch(cfg)
    trained, module = read_config(run), loaded(cfg, fabric.device, cfg.guidance)
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
    used |= {"mode": [cfg.feature_mode, cfg.tolerance], "cond": hash_of(cond)}
    parts = Parts(folder, used, fabric)
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


# --- records -----------------------------------------------------------------------------------


@hydra.main(version_base="1.3", config_path="../conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit sample``."""
    sample(cfg)


if __name__ == "__main__":
    main()
