"""Draw samples from a run, and save them with a picture.

flowkit sample run=runs/quickstart                            every class in turn
flowkit sample run=runs/quickstart labels=[3,8] num_samples=20 guidance=2
flowkit sample run=runs/fashion labels=[Bag,Coat]               classes by name
flowkit sample run=runs/quickstart sampler=euler sampler.grid=8
flowkit sample run=runs/blocks feature_mode=cached            of blocks: the trunk once a segment
flowkit sample run=runs/quickstart num_samples=50000 device=cuda devices=8
flowkit sample run=runs/quickstart format=npz                 as ADM reads them; png: a file each

Every sample starts from the noise of its own seed. If the run was trained on source samples, or on
conditions other than labels, the samples take those of the test split. Their number is then at
most the size of the test split.
"""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from flowkit.metrics.pictures import save_picture
from flowkit.modules.card import recipe_of
from flowkit.places import check_writable
from flowkit.runs import Run
from flowkit.runs.drawing import draw_parts, say_plan, start
from flowkit.runs.known_data import place_of
from flowkit.runs.parts import Parts, hash_of
from flowkit.runs.processes import launch, say
from flowkit.runs.records import recording
from flowkit.runs.starts import choose_labels, choose_samples, given_source
from flowkit.runs.written import (
    FORMS,
    check_form,
    check_place,
    form_record,
    place_in,
    write_samples,
)

SHOWN = 100  # samples in the picture


def sample(cfg: DictConfig) -> Tensor:
    """Sample as configured; write the samples, ``samples.png`` and ``samples.json``.

    The samples are ``samples.pt``, ``samples.npz`` or the files of the folder ``samples``. The
    picture shows the first 100 of them.

    Returns:
        The samples; the tensor is empty on all processes but the first.
    """
    fabric = launch(cfg)
    run = Run.load(cfg.run, cfg.weights, fabric.device, cfg.guidance, cfg.trust, **place_of(cfg))
    if (recipe := recipe_of(run.config)) != "sample":
        does = f"is made to {recipe.replace('rollout', 'act')}, and samples alone say little of it"
        say(f"advice    {run.place} {does}; its command: flowkit {recipe} run={run.place}")
    folder = Path(cfg.out) if cfg.out else run.results / "drawn"
    check_writable(folder, "out")
    run.reuse_features(cfg.feature_mode, cfg.tolerance, cfg.seed, cfg.seeding)
    sampler = run.sampler(cfg.sampler)
    labels = cfg.labels
    if OmegaConf.is_list(labels):
        labels = [run.class_number(label) for label in labels]
    chosen = "all classes in turn" if cfg.labels is None else "the labels asked for, in turn"
    if run.brings_starts:
        batch = choose_samples(run.data, labels, cfg.num_samples)
        cond, size, chosen = batch.get("cond"), len(batch["x1"]), "of the test split"
        x0, source = start(run, cfg, size, given_source(batch, run.data))
    else:
        cond = choose_labels(labels, cfg.num_samples, run.num_classes)
        x0, source = start(run, cfg, cfg.num_samples)
    check_form(cfg.format, cfg.quantization, run.config.get("image_shape"))
    check_place(folder, cfg.format)
    used = {"weights": run.weights, **run.describe(sampler), **source}
    used |= {"mode": [cfg.feature_mode, cfg.tolerance], "cond": hash_of(cond)}
    parts = Parts(folder, used, fabric)
    say_plan(run, sampler, source["num_samples"])
    drawn, cost = draw_parts(run, x0, cond, sampler, parts=parts)
    if not fabric.is_global_zero:
        return torch.empty(0)

    samples = drawn["samples"]
    sampling = {
        **run.describe(sampler),
        **cost,
        **source,
        "conditions": None if cond is None else chosen,
        "labels": labels,
        "cond": hash_of(cond),
    }
    classes = run.num_classes if cond is not None and labels is None else None
    columns = 10 // classes * classes if classes and classes <= 10 else 10  # a class a column
    files = [folder / name for name in ("samples.json", "samples.png", place_in(cfg.format))]
    record = run.record(sampling, samples=form_record(cfg.format, cfg.quantization))
    others = [folder / place_in(form) for form in FORMS if form != cfg.format]
    with recording(record, [*files, *others]):
        write_samples(files[2], cfg.format, samples, cond, cfg.quantization)
        names = run.names_of(cond, SHOWN)
        save_picture(samples[:SHOWN], files[1], columns, captions=names)
    parts.remove()
    print(f"picture   {files[1]}\nsamples   {files[2]}")
    return samples


@hydra.main(version_base="1.3", config_path="../conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit sample``."""
    sample(cfg)


if __name__ == "__main__":
    main()
