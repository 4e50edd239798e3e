"""The features of a set of samples, seen once and in order, in memory for the features alone."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowkit.checks import check_labels
from flowkit.data.pixels import through_jpeg, with_channels
from flowkit.data.sample_sets import SampleSet
from flowkit.metrics import Features, Judge, Moments, Statistics, from_uint8, outputs_of
from flowkit.provenance import cache_folder, cached
from flowkit.runs.parts import Columns, Parts

KEPT = 50_000  # images of a reference whose features stay in memory; of all others the moments do


@dataclass(frozen=True)
class Seen:
    """The features of a set, and what else was seen of its images.

    Attributes:
        features: Features ``(n, F)`` of the images, or of a random choice of them.
        moments: Mean and covariance of the features of all images, also of the spatial features if
            the network has them.
        others: Further columns of the same rows, where there are: ``logits (n, K)``, ``labels
            (n,)``, and the classes ``judged (n,)`` that a judge found.
        classes: Classes and their numbers of images ``(2, K)``, of all images; None without
            classes.
        hash: A hash of the pixels, the same for the same images in any format and order.
    """

    features: Tensor
    moments: Statistics
    others: Mapping[str, Tensor]
    classes: Tensor | None
    hash: str

    def __len__(self) -> int:
        """Return the number of all images."""
        return self.moments.count or 0

    @property
    def labels(self) -> Tensor | None:
        """Classes of the images whose features are kept, or None."""
        return self.others.get("labels")

    @property
    def shares(self) -> dict[str, float] | None:
        """Share of each class in all images, or None."""
        if self.classes is None:
            return None
        return {str(int(k)): int(n) / len(self) for k, n in self.classes.T}


@dataclass(frozen=True)
class Watch:
    """How sets of samples are seen.

    Attributes:
        features: The feature network.
        fabric: The processes that share the images.
        folder: The parent of the folder of parts.
        batch_size: Images in a batch.
        channels: 1 or 3; gray images take three equal channels if others are in color.
        judge: A classifier of the images, or None.
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
    watch: Watch, images: SampleSet, rows: Tensor, argument: str, jpeg: int | None = None
) -> Seen | None:
    """See the images at increasing positions; None on all processes but the first.

    A stopped call goes on where it was. Memory holds a batch of images and all features.

    Args:
        watch: How the images are seen.
        images: The set.
        rows: Positions ``(n,)``.
        argument: Name of the option, for errors.
        jpeg: Quality of JPEG files that the images pass, or None.

    Raises:
        ValueError: If a feature is not finite, or a class is out of range.
    """
    parts, batches = _parts(watch, images, rows, argument, jpeg)
    found = _gathered(
        parts.stream(len(batches), batches.make, f"features of {argument}"), len(rows)
    )
    if found is not None:
        parts.remove()
    return found


def see_reference(watch: Watch, images: SampleSet, argument: str = "reference") -> Seen | None:
    """See all images of a reference; keep the result in the user's cache for later calls.

    The features of at most `KEPT` images are kept, of more a random choice.
    """
    rows = torch.arange(len(images))
    digest = hashlib.sha256(repr(watch.key(images, rows, None)).encode()).hexdigest()
    file = cache_folder() / f"reference-{digest[:32]}.safetensors"
    if _is_whole(file):
        watch.fabric.barrier()
        return None if watch.fabric.global_rank else _read(file)
    found = see(watch, images, rows, argument)
    if found is None:
        return None
    return cached(file, _read, lambda: found, _write)


@dataclass(frozen=True)
class _Batches:
    """Batches of a set, whose columns are made by number."""

    watch: Watch
    images: SampleSet
    rows: tuple[Tensor, ...]
    argument: str
    jpeg: int | None

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.rows)

    @torch.no_grad()
    def make(self, number: int) -> Columns:
        """Read a batch; return features, classes, and a digest of the pixels of each image."""
        watch, rows = self.watch, self.rows[number]
        pixels, labels = self.images.read(rows)
        pixels = with_channels(pixels, watch.channels, self.argument)
        pixels = pixels if self.jpeg is None else through_jpeg(pixels, self.jpeg)
        pixels = pixels.contiguous()
        shown = from_uint8(pixels)
        columns = {k: x.cpu() for k, x in outputs_of(watch.features, shown).items()}
        finite = columns["features"].isfinite().all(1)
        if not bool(finite.all()):
            row = int(rows[~finite][0])
            name = getattr(self.images, "names", {row: f"image {row}"})[row]
            raise ValueError(
                f"features of {self.argument} must be finite, got NaN or infinity for {name} of "
                f"{self.images.name}"
            )
        if labels is not None:
            if watch.num_classes is not None:
                check_labels(labels, watch.num_classes, f"classes of {self.argument}")
            columns["labels"] = labels
        if watch.judge is not None:
            columns["judged"] = watch.judge.predict(shown)
        return {**columns, "digests": digests(pixels)}


def _parts(
    watch: Watch, images: SampleSet, rows: Tensor, argument: str, jpeg: int | None
) -> tuple[Parts, _Batches]:
    """Return the storage of the batches of a set, and the batches."""
    parts = Parts(watch.folder, ["features", *watch.key(images, rows, jpeg)], watch.fabric)
    return parts, _Batches(watch, images, rows.split(watch.batch_size), argument, jpeg)


def _gathered(parts: Iterable[Columns], count: int) -> Seen | None:
    """Join the columns of batches that come one after the other."""
    kept = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:KEPT].sort().values
    columns: Columns = {}
    moments, spatial, found, start = Moments(), None, [], 0
    classes: Counter[int] = Counter()
    for part in parts:
        stop = start + len(part["features"])
        moments.update(part["features"])
        if (further := part.pop("spatial", None)) is not None:
            spatial = spatial or Moments()
            spatial.update(further)
        found.append(part.pop("digests"))
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
        moments.statistics(spatial),
        columns,
        torch.tensor(sorted(classes.items())).T if classes else None,
        hash_of_set(torch.cat(found)),
    )


def digests(pixels: Tensor) -> Tensor:
    """Return the SHA-256 ``(B, 32)`` of each image ``(B, C, H, W)`` of uint8, with its shape."""
    head = repr(tuple(pixels.shape[1:])).encode()
    rows = pixels.contiguous().numpy()
    found = [hashlib.sha256(head + row.tobytes()).digest() for row in rows]
    return torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).reshape(-1, 32)


def hash_of_set(digests: Tensor) -> str:
    """Return the hash of a set from the digests ``(N, 32)`` of its images, whatever their order.

    >>> images = torch.arange(8).byte().reshape(2, 1, 2, 2)
    >>> hash_of_set(digests(images)) == hash_of_set(digests(images.flip(0)))
    True
    """
    return hashlib.sha256(b"".join(sorted(map(bytes, digests.numpy())))).hexdigest()


# --- cache ------------------------------------------------------------------------------------


def _write(file: Path, seen: Seen) -> None:
    """Write what was seen of a reference."""
    stats = seen.moments
    named = {"features": seen.features, "mu": stats.mean, "sigma": stats.cov, **seen.others}
    named |= {"mu_s": stats.spatial_mean, "sigma_s": stats.spatial_cov, "classes": seen.classes}
    columns = {name: x.contiguous() for name, x in named.items() if x is not None}
    save_file(columns, file, metadata={"hash": seen.hash, "count": str(stats.count)})


def _read(file: Path) -> Seen:
    """Read what was seen of a reference."""
    columns: dict[str, Any] = load_file(file)
    with safe_open(file, framework="pt") as opened:
        known = opened.metadata()
    stats = Statistics(
        columns.pop("mu"),
        columns.pop("sigma"),
        int(known["count"]),
        spatial_mean=columns.pop("mu_s", None),
        spatial_cov=columns.pop("sigma_s", None),
    )
    features, classes = columns.pop("features"), columns.pop("classes", None)
    return Seen(features, stats, columns, classes, known["hash"])


def _is_whole(file: Path) -> bool:
    """Return True if a file of the cache exists and is whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            return "hash" in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False
