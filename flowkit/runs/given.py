"""Evaluation of given samples, in files or of a run, against a reference."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from flowkit.checks import check_at_least, check_between
from flowkit.data import SplitData
from flowkit.data.sample_sets import OfSplit, Resized, SampleSet
from flowkit.metrics import Features, FeatureSet, Judge, Statistics, feature_metrics
from flowkit.metrics.pictures import as_saved
from flowkit.modules.flow import labels_of
from flowkit.provenance import versions
from flowkit.runs.features import judge_of
from flowkit.runs.judging import JUDGED, Seen, Watch, agreement_of, see, set_record, through
from flowkit.runs.parts import Parts
from flowkit.runs.sources import (
    Reading,
    Source,
    check_features,
    common_channels,
    data_of_run,
    is_run,
    open_source,
    width_of,
    with_classes_of,
)

MOST_NUMBERS = 2**28  # of the pixels that a judge is fitted to


class Measured(NamedTuple):
    """Metrics, the rest of the record, and samples for the picture with its number of columns.

    Real points are shown beside generated ones, and images have their classes as captions. The
    parts are removed when the record is written.
    """

    metrics: dict[str, Any]
    record: dict[str, Any]
    shown: Tensor
    columns: int = 10
    beside: Tensor | None = None
    parts: Parts | None = None
    captions: list[str] | None = None


def of_samples(cfg: DictConfig, fabric: Fabric, out: Path) -> Measured | None:
    """Measure given samples against a reference; None on all processes but the first.

    Args:
        cfg: The configuration of ``flowkit evaluate``.
        fabric: The processes that share the images.
        out: The folder of the results.

    Raises:
        FileNotFoundError, TypeError, ValueError: If samples, reference, feature network and options
            do not fit each other; before the work.
    """
    with fabric.rank_zero_first():  # one process trains the classifier, or writes an index
        samples, reference, statistics = _opened(cfg)
        data = reference.data
        if data is None and is_run(cfg.samples):  # for its classifier
            data = data_of_run(cfg.samples, Reading.of(cfg))
        features: Features = instantiate(cfg.metric)(data)
    images, real = cast(SampleSet, samples.images), reference.images
    images = images if data is None else with_classes_of(data, images)
    rows = _rows(cfg, images)
    if real is not None:
        _check_enough(real, "reference")
    shape, statistics, warnings = _common(images, reference, data, features, statistics)
    check_features(features, shape, len(rows) if cfg.extrapolate else None, statistics)
    resized = data is not None and tuple(shape[1:]) != tuple(data.shape[1:])
    labels = None if real is None or resized else images.read(rows[:1]).labels
    judge = _judge(cfg, data, labels)
    watch = Watch(features, fabric, out, cfg.batch_size, shape[0])
    if data is not None:
        key = "" if judge is None else f"{data.fingerprint('train')} {cfg.seed}"
        watch = replace(watch, judge=judge, judge_key=key, num_classes=data.num_classes)
    known = None  # it comes first: its features stay in the cache, whatever stops the samples
    if real is not None:
        known = see(watch, real, torch.arange(len(real)), "reference", keep=True)
    floor = _floor(cfg, watch, data, len(rows))
    generated = see(watch, images, rows, "samples", cfg.jpeg)
    if generated is None:
        return None
    if known is None:
        theirs = FeatureSet(statistics=statistics)
    else:
        theirs = known.features_of(features, statistics)
    metrics = feature_metrics(
        generated.features_of(features),
        theirs,
        features,
        floor=None if floor is None else floor.features_of(features),
        extrapolate=cfg.extrapolate,
    )
    metrics["warnings"] = [*warnings, *metrics["warnings"]]
    if floor is None and data is not None:
        metrics["left_out"]["floor"] = "the reference is the training images"
    if resized:
        metrics["left_out"]["class_agreement"] = "the judge sees images of the size of the data"
    if judge is not None and known is not None:
        metrics |= agreement_of(judge, generated, known)
    seed = cfg.seed if len(rows) < len(images) else None
    record = {
        "samples": _record(cfg, samples, shape, generated, None, seed) | through(cfg.jpeg),
        "reference": _record(cfg, reference, shape, known, statistics),
        **{key: value for key, value in (samples.made or {}).items() if key != "samples"},
        "versions": versions(),
    }
    if data is not None:
        record["data"] = {"name": type(data).__name__, "test": data.fingerprint("test")}
    picture = _picture(images, rows, generated.others.get("labels"))
    return Measured(metrics, record, *picture, parts=generated.parts)


def _opened(cfg: DictConfig) -> tuple[Source, Source, Statistics | None]:
    """Open samples and reference, and check them."""
    reading = Reading.of(cfg)
    place = cfg.reference
    if place is None and is_run(cfg.samples):
        place = cfg.samples
    if place is None:
        raise ValueError(
            "reference must be given, as reference=<images, statistics, run or data>, got null"
        )
    samples = open_source(cfg.samples, "samples", reading)
    if samples.images is None:
        raise ValueError(f"samples must hold images, got statistics only in {samples.name}")
    if samples.stored["kind"] != "pt" and cfg.quantization != "round":
        raise ValueError(
            f"quantization must be round for samples that are bytes already, got {cfg.quantization}"
        )
    reference = open_source(place, "reference", replace(reading, quantization="round"))
    if reference.data is None and cfg.split != "test":
        raise ValueError(
            f"split must be absent for a reference that is no data with splits, got {cfg.split}"
        )
    moments = None if reference.moments is None else Statistics.load(reference.moments.file)
    return samples, reference, moments


def _common(
    images: SampleSet,
    reference: Source,
    data: SplitData | None,
    features: Features,
    statistics: Statistics | None,
) -> tuple[tuple[int, ...], Statistics | None, list[str]]:
    """Return the shape in which images are compared, the statistics that count, and warnings.

    Statistics beside images do not count if they are of other features or of other sizes: then the
    images of the reference do.
    """
    shape = (common_channels(images, reference, data, features, statistics), *images.shape[1:])
    real = reference.images
    if real is None or statistics is None:
        return shape, statistics, []
    before = real.images.shape if isinstance(real, Resized) else real.shape
    own, reason = len(statistics.mean), None
    if before[1:] != real.shape[1:]:
        reason = f"they are of images of {before[2]}x{before[1]}, before the resize"
    elif width_of(features, shape) != own:
        reason = f"they are of {own:,} features, other than those of {features.name}"
    if reason is None:
        return shape, statistics, []
    shape = (common_channels(images, reference, data, features, None), *images.shape[1:])
    return shape, None, [f"mu and sigma of {reference.name} are not used: {reason}"]


def _record(
    cfg: DictConfig,
    source: Source,
    shape: tuple[int, ...],
    seen: Seen | None,
    statistics: Statistics | None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Return the record of samples or reference.

    Of statistics nobody knows the shape and the resize of their images.
    """
    images = None if source.images is None else shape
    resize = None if source.images is None else Reading.of(cfg).resize
    count, known_hash, shares = None, None, None
    if seen is not None:
        count, known_hash, shares = len(seen), seen.hash, seen.shares
    elif statistics is not None:
        count, known_hash = statistics.count, statistics.reference_hash
    return set_record(
        source.name,
        source.stored,
        images,
        count,
        known_hash,
        shares,
        None if resize is None else resize.record(),
        seed,
    )


def _picture(images: SampleSet, rows: Tensor, labels: Tensor | None) -> tuple[Tensor, int]:
    """Return up to 100 samples for the picture, and its number of columns."""
    chosen, columns = torch.arange(min(100, len(rows))), 10
    if labels is not None:
        chosen, columns = picture_rows(labels)
    order = chosen.argsort()
    shown = torch.empty(len(chosen), *images.shape)
    shown[order] = as_saved(images.read(rows[chosen[order]]).pixels)
    return shown, columns


def _rows(cfg: DictConfig, images: SampleSet) -> Tensor:
    """Return the positions of the samples that are measured: all, or a random choice."""
    _check_enough(images, "samples")
    count = len(images) if cfg.num_samples is None else cfg.num_samples
    check_between(count, 4, len(images), "num_samples")
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(cfg.seed))
    return shuffled[:count].sort().values


def _check_enough(images: SampleSet, argument: str) -> None:
    """Require as many images as the metrics need.

    Raises:
        ValueError: If there are fewer than 4.
    """
    check_at_least(len(images), 4, f"the number of images in {argument}={images.name}")


def _judge(cfg: DictConfig, data: SplitData | None, labels: Tensor | None) -> Judge | None:
    """Return a judge fitted to training images, if data and samples have classes."""
    if data is None or labels is None or labels_of(data.train[:1], data.num_classes) is None:
        return None
    most = min(JUDGED, MOST_NUMBERS // math.prod(data.shape))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(cfg.seed))
    train = data.train[order[:most]]
    return judge_of(train["x1"], labels_of(train, data.num_classes))


def _floor(cfg: DictConfig, watch: Watch, data: SplitData | None, count: int) -> Seen | None:
    """See as many training images as there are samples, unless they are the reference."""
    if data is None or cfg.split == "train":
        return None
    train = OfSplit(data.train, "training images", data.num_classes, data.class_names)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(cfg.seed))
    resize, rows = Reading.of(cfg).resize, order[:count].sort().values
    images = train if resize is None else Resized(train, resize)
    return see(replace(watch, judge=None, judge_key=""), images, rows, "the floor", keep=True)


def picture_rows(labels: Tensor) -> tuple[Tensor, int]:
    """Return rows for a picture with a column per class, up to ten, and the number of columns."""
    classes, counts = labels.unique(return_counts=True)
    height = min(10, int(counts[:10].min()))
    columns = [(labels == label).nonzero()[:height, 0] for label in classes[:10]]
    return torch.stack(columns, 1).flatten(), len(columns)
