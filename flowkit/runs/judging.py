"""The features of a set of samples, seen once and in order, in memory for the features alone."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowkit.checks import check_labels
from flowkit.data.pixels import equal_channels, through_jpeg, with_channels
from flowkit.data.sample_sets import SampleSet
from flowkit.metrics import (
    Features,
    FeatureSet,
    Judge,
    Moments,
    Statistics,
    from_uint8,
    outputs_of,
    wilson,
)
from flowkit.metrics.comparison import named
from flowkit.provenance import cache_folder, cached
from flowkit.runs.parts import Bar, Columns, Parts

KEPT = 50_000  # images of a reference whose features stay in memory; of all others the moments do
PART = 1024  # images in a file that a stopped call leaves: fewer would wait for the disk
JUDGED = 10_000  # images of a set that a judge sees, whose time is that of many networks


@dataclass(frozen=True)
class Seen:
    """The features of a set, and what else was seen of its images.

    Attributes:
        features: Features ``(n, F)`` of the images, or of a random choice of them.
        count: Number of all images.
        moments: Mean and covariance of the features of all images, also of the spatial features if
            the network has them. None if ``features`` are of all images and there are no spatial
            ones, since then they say all.
        others: Further columns of the same rows, where there are: ``logits (n, K)``, ``labels
            (n,)``, and the classes ``judged (n,)`` that a judge found, or −1 where it did not see
            the image.
        classes: Classes and their numbers of images ``(2, K)``, of all images; None without
            classes.
        hash: A hash of the pixels, the same for the same images in any format and order.
        parts: What a stopped call goes on with, to remove when the record is written; None if the
            features are in the user's cache.
    """

    features: Tensor
    count: int
    moments: Statistics | None
    others: Mapping[str, Tensor]
    classes: Tensor | None
    hash: str
    parts: Parts | None = None

    def __len__(self) -> int:
        """Return the number of all images."""
        return self.count

    @property
    def shares(self) -> dict[str, float] | None:
        """Share of each class in all images, or None."""
        if self.classes is None:
            return None
        return {str(int(k)): int(n) / len(self) for k, n in self.classes.T}

    def features_of(self, network: Features, statistics: Statistics | None = None) -> FeatureSet:
        """Return the features for `flowkit.metrics.feature_metrics`.

        Args:
            network: The feature network.
            statistics: Statistics of a file, which stand for those of the images.
        """
        if statistics is None and self.moments is not None:
            statistics = replace(
                self.moments, features_name=network.name, features_hash=network.hash
            )
        return FeatureSet(
            self.features, statistics, self.others.get("logits"), self.others.get("labels")
        )


@dataclass(frozen=True)
class Watch:
    """Settings with which sets of samples are seen.

    Attributes:
        features: The feature network.
        fabric: The processes that share the images.
        folder: The parent of the folder of parts.
        batch_size: Images in a batch.
        channels: 1 or 3; gray images take three equal channels if others are in color.
        judge: A classifier of the images, or None. It sees `JUDGED` images of a set at most.
        judge_key: What the judge depends on, as a text.
        num_classes: Number of classes, or None if any is allowed.
    """

    features: Features
    fabric: Fabric
    folder: Path
    batch_size: int
    channels: int
    judge: Judge | None = None
    judge_key: str = ""
    num_classes: int | None = None

    def key(self, images: SampleSet, rows: Tensor, jpeg: int | None) -> list[Any]:
        """Return everything that the features of a set depend on."""
        chosen = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        own = [self.features.name, self.features.hash, self.channels, self.judge_key]
        return [*own, images.state, chosen, jpeg, self.batch_size]


def see(
    watch: Watch,
    images: SampleSet,
    rows: Tensor,
    argument: str,
    jpeg: int | None = None,
    keep: bool = False,
    most: int | None = None,
) -> Seen | None:
    """See the images at increasing positions; None on all processes but the first.

    A stopped call goes on where it was. Memory holds a batch of images, and the features.

    Args:
        watch: How the images are seen.
        images: The set.
        rows: Positions ``(n,)``.
        argument: Name of the option, for errors.
        jpeg: Quality of JPEG files that the images pass, or None.
        keep: Whether to keep the result in the user's cache for later calls, as of a reference,
            with the features of at most `KEPT` images.
        most: Images whose features stay in memory, of more a random choice; None: all of them.

    Raises:
        ValueError: If a feature is not finite, or a class is out of range.
    """
    key = watch.key(images, rows, jpeg)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    file = cache_folder() / f"reference-{digest[:32]}.safetensors"
    if keep and _is_whole(file):
        watch.fabric.barrier()
        return None if watch.fabric.global_rank else _read(file)
    parts = Parts(watch.folder, ["features", *key], watch.fabric)
    judged = torch.zeros(len(rows), dtype=torch.bool)
    judged[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:JUDGED]] = True
    size = max(PART // watch.batch_size, 1) * watch.batch_size
    batches = _Batches(watch, images, rows.split(size), judged.split(size), argument, jpeg)
    made = parts.stream(len(batches.rows), batches.make, Bar(f"features of {argument}"))
    found = _gathered(made, len(rows), KEPT if keep else most)
    if found is None:
        return None
    if not keep:
        return replace(found, parts=parts)
    stored = cached(file, _read, lambda: found, _write)
    parts.remove()
    return stored


@dataclass(frozen=True)
class _Batches:
    """Parts of a set, whose columns are made by number."""

    watch: Watch
    images: SampleSet
    rows: tuple[Tensor, ...]
    judged: tuple[Tensor, ...]
    argument: str
    jpeg: int | None

    def make(self, number: int) -> Columns:
        """Return the columns of a part, batch by batch."""
        size = self.watch.batch_size
        batches = zip(self.rows[number].split(size), self.judged[number].split(size), strict=True)
        made = [self._batch(rows, judged) for rows, judged in batches]
        return {name: torch.cat([columns[name] for columns in made]) for name in made[0]}

    @torch.no_grad()
    def _batch(self, rows: Tensor, judged: Tensor) -> Columns:
        """Read a batch; return features, classes, and a digest of the pixels of each image."""
        watch = self.watch
        pixels, labels = self.images.read(rows)
        pixels = with_channels(pixels, watch.channels, self.argument)
        pixels = pixels if self.jpeg is None else through_jpeg(pixels, self.jpeg)
        pixels = pixels.contiguous()
        shown = from_uint8(pixels)
        columns = {k: x.cpu() for k, x in outputs_of(watch.features, shown).items()}
        if not bool(columns["features"].sum().isfinite()):  # much faster than each value
            self._check(columns["features"], rows)
        if labels is not None:
            if watch.num_classes is not None:
                check_labels(labels, watch.num_classes, f"classes of {self.argument}")
            columns["labels"] = labels
        if watch.judge is not None:
            columns["judged"] = torch.full((len(rows),), -1)
            if bool(judged.any()):
                columns["judged"][judged] = watch.judge.predict(shown[judged])
        return {**columns, "digests": digests(pixels)}

    def _check(self, features: Tensor, rows: Tensor) -> None:
        """Require finite features; the error names the first image of others."""
        finite = features.isfinite().all(1)
        if not bool(finite.all()):
            row = int(rows[~finite][0])
            name = getattr(self.images, "names", {row: f"image {row}"})[row]
            raise ValueError(
                f"features of {self.argument} must be finite, got NaN or infinity for {name} of "
                f"{self.images.name}"
            )


def _gathered(parts: Iterable[Columns], count: int, most: int | None) -> Seen | None:
    """Join the columns of batches that come one after the other; keep ``most`` rows of them."""
    kept = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values
    columns: Columns = {}
    moments, spatial, found, start = Moments(), Moments(), [], 0
    classes: Counter[int] = Counter()
    for part in parts:
        stop = start + len(part["features"])
        further = part.pop("spatial", None)
        if further is not None or len(kept) < count:
            moments.update(part["features"])
        if further is not None:
            spatial.update(further)
        found.append(part.pop("digests").clone())  # the part may be a file in memory
        classes.update(part["labels"].tolist() if "labels" in part else ())
        first, last = torch.searchsorted(kept, torch.tensor([start, stop])).tolist()
        for name, column in part.items():
            if name not in columns:
                columns[name] = column.new_empty(len(kept), *column.shape[1:])
            columns[name][first:last] = column[kept[first:last] - start]
        start = stop
    if not columns:
        return None
    return Seen(
        columns.pop("features"),
        count,
        moments.statistics(spatial if spatial.count else None) if moments.count else None,
        columns,
        torch.tensor(sorted(classes.items())).T if classes else None,
        hash_of_set(torch.cat(found)),
    )


def digests(pixels: Tensor) -> Tensor:
    """Return the SHA-256 ``(B, 32)`` of each image ``(B, C, H, W)`` of uint8, with its shape.

    Three equal channels have the hash of one, as formats differ in how they store gray images.
    """
    found = []
    for one, gray in zip(pixels, equal_channels(pixels).tolist(), strict=True):
        own = one[:1] if gray else one
        head = repr(tuple(own.shape)).encode()
        found.append(hashlib.sha256(head + own.contiguous().numpy().tobytes()).digest())
    return torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).reshape(-1, 32)


def hash_of_set(digests: Tensor) -> str:
    """Return the hash of a set from the digests ``(N, 32)`` of its images, whatever their order.

    >>> images = torch.arange(8).byte().reshape(2, 1, 2, 2)
    >>> hash_of_set(digests(images)) == hash_of_set(digests(images.flip(0)))
    True
    """
    return hashlib.sha256(b"".join(sorted(map(bytes, digests.numpy())))).hexdigest()


# --- records ----------------------------------------------------------------------------------


def agreement_of(judge: Judge, generated: Seen, reference: Seen) -> dict[str, Any]:
    """Return the shares of images that a judge gives their class, of samples also by class.

    A reference without classes leaves out the judge's accuracy.
    """
    hits, labels = _hits(generated)
    known = "labels" in reference.others
    accuracy = _share("test_accuracy", _hits(reference)[0]) if known else {}
    return {
        **_share("class_agreement", hits),
        "class_agreement_by_class": {
            str(int(label)): hits[labels == label].double().mean().item()
            for label in labels.unique()
        },
        "judge": {"name": judge.name, **accuracy},
    }


def _hits(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return where the judge found the class, for the images that it saw, and their classes."""
    judged, labels = seen.others["judged"], seen.others["labels"]
    return (judged == labels)[judged >= 0], labels[judged >= 0]


def _share(name: str, hits: Tensor) -> dict[str, Any]:
    """Return the share of hits ``(N,)`` and its interval under their names in records."""
    share = hits.double().mean().item()
    return named(name, share, wilson(share, len(hits)))


def shares_of(labels: Tensor | None) -> dict[str, float] | None:
    """Return the share of each class in labels ``(N,)``, or None without labels.

    >>> shares_of(torch.tensor([3, 3, 8, 3]))
    {'3': 0.75, '8': 0.25}
    """
    if labels is None:
        return None
    classes, counts = labels.unique(return_counts=True)
    return {str(int(k)): int(n) / len(labels) for k, n in zip(classes, counts, strict=True)}


def through(jpeg: int | None) -> dict[str, Any]:
    """Return what the record of samples says if they passed JPEG files of a quality."""
    return {} if jpeg is None else {"file_format": "jpeg", "jpeg_quality": jpeg}


def set_record(
    name: str,
    stored: Mapping[str, Any],
    shape: Sequence[int] | None,
    count: int | None,
    pixels_hash: str | None,
    shares: Mapping[str, float] | None,
    resize: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Return the record of a set of images: all that its features depend on beside the network.

    Args:
        name: Path, run or data.
        stored: See `flowkit.data.sample_sets.SampleSet`. The rule of ``quantization`` is None where
            it is not known; the ``file_format`` is None for arrays.
        shape: Shape of an image as it was seen, or None for statistics.
        count: Number of images.
        pixels_hash: See `hash_of_set`.
        shares: Share of each class, or None.
        resize: See `flowkit.data.pixels.Resize`, or None.
        seed: Seed of the random choice of the images; None if all were taken.
    """
    return {
        "name": name,
        **stored,
        "resize": resize,
        "shape": None if shape is None else list(shape),
        "num_samples": count,
        "seed": seed,
        "classes": shares,
        "hash": pixels_hash,
    }


# --- cache ------------------------------------------------------------------------------------


def _write(file: Path, seen: Seen) -> None:
    """Write what was seen of a reference."""
    named: dict[str, Tensor | None] = {"features": seen.features, "classes": seen.classes}
    named |= seen.others
    if (stats := seen.moments) is not None:
        named |= {"mu": stats.mean, "sigma": stats.cov}
        named |= {"mu_s": stats.spatial_mean, "sigma_s": stats.spatial_cov}
    columns = {name: x.contiguous() for name, x in named.items() if x is not None}
    save_file(columns, file, metadata={"hash": seen.hash, "count": str(seen.count)})


def _read(file: Path) -> Seen:
    """Read what was seen of a reference."""
    columns: dict[str, Any] = load_file(file)
    with safe_open(file, framework="pt") as opened:
        known = opened.metadata()
    count, stats = int(known["count"]), None
    mu, sigma, mu_s, sigma_s = (columns.pop(k, None) for k in ("mu", "sigma", "mu_s", "sigma_s"))
    if mu is not None:
        stats = Statistics(mu, sigma, count, spatial_mean=mu_s, spatial_cov=sigma_s)
    features, classes = columns.pop("features"), columns.pop("classes", None)
    return Seen(features, count, stats, columns, classes, known["hash"])


def _is_whole(file: Path) -> bool:
    """Return True if a file of the cache exists and is whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            return "hash" in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False
