"""Compute the statistics of a reference once, for evaluations that need no images of it.

flowkit statistics data=fashion_mnist split=train metric=inception metric.weights=weights.pth \
    out=fashion.npz
flowkit statistics reference=photos metric=inception metric.weights=weights.pth out=photos.npz

Then: flowkit evaluate samples=images reference=photos.npz, with the same metric.

The file holds mu and sigma, for sFID also mu_s and sigma_s, as ADM, torch-fidelity, clean-fid and
pytorch-fid name them. A record with the settings lies beside it. The same command continues a
stopped call.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from flowkit.checks import check_at_least
from flowkit.metrics import Features, Statistics
from flowkit.provenance import versions
from flowkit.runs.judging import Watch, see, set_record
from flowkit.runs.processes import launch
from flowkit.runs.records import recording
from flowkit.runs.sources import Reading, channels_of, check_features, open_source


def statistics(cfg: DictConfig) -> Statistics | None:
    """Compute statistics as configured; write the ``.npz`` file and its record.

    Returns:
        The statistics; None on all processes but the first.
    """
    file, data = Path(cfg.out), cfg.get("data")
    if file.suffix != ".npz":
        raise ValueError(f"out must be a file with the suffix .npz, got {file}")
    if (data is None) == (cfg.reference is None):
        got = "neither" if data is None else "both"
        raise ValueError(
            f"one of data and reference must be given, as data=<data> or reference=<images>, got "
            f"{got}"
        )
    fabric, reading = launch(cfg), Reading.of(cfg)
    with fabric.rank_zero_first():  # one process trains the classifier, or writes an index
        place = cfg.reference if data is None else data
        source = open_source(place, "reference" if data is None else "data", reading)
        features: Features = instantiate(cfg.metric)(source.data)
    images = source.images
    if images is None:
        raise ValueError(f"reference must hold images, got statistics only in {source.name}")
    check_at_least(len(images), 4, "the number of images")
    own = channels_of([images], features) if source.data is None else images.shape[0]
    shape = (own, *images.shape[1:])
    check_features(features, shape, None, None)
    watch = Watch(features, fabric, file.parent, cfg.batch_size, own)
    seen = see(watch, images, torch.arange(len(images)), "reference", most=0)
    if seen is None or seen.moments is None:
        return None
    names = {"features_name": features.name, "features_hash": features.hash}
    found = replace(seen.moments, **names, reference_hash=seen.hash)
    resize = None if reading.resize is None else reading.resize.record()
    known = (shape, len(seen), seen.hash, seen.shares, resize)
    record: dict[str, Any] = {
        "reference": set_record(source.name, source.stored, *known),
        "features": {"name": features.name, "hash": features.hash},
        "versions": versions(),
    }
    files = [file.with_suffix(".json"), file]
    with recording(record, files):
        found.save(file)
    if seen.parts is not None:
        seen.parts.remove()
    print(
        f"images      {len(seen):,} of {source.name}\n"
        f"features    {len(found.mean):,} of {features.name}\n"
        f"statistics  {file}\nrecord      {files[0]}"
    )
    return found


@hydra.main(version_base="1.3", config_path="../conf", config_name="statistics")
def main(cfg: DictConfig) -> None:
    """Entry point of ``flowkit statistics``."""
    statistics(cfg)


if __name__ == "__main__":
    main()
