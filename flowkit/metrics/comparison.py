"""Comparison of two sets in a feature space: all distances, as a record."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics.extrapolation import FEWEST, fewest_samples, frechet_infinity
from flowkit.metrics.features import Features, distance_name, family
from flowkit.metrics.frechet import Gaussian, check_rows, gaussian_distance
from flowkit.metrics.intervals import Interval, Strata
from flowkit.metrics.kernels import cmmd, gaussian, kernel_distance
from flowkit.metrics.neighbors import PRDC, prdc, prdc_intervals
from flowkit.metrics.scores import inception_score
from flowkit.metrics.statistics import Moments, Statistics
from flowkit.metrics.unbiased import enough, frechet_unbiased
from flowkit.provenance import tensor_hash

FEW = 100  # images; values that depend on their number are unreliable below it, see docs
UNRELIABLE = ("frechet_distance", "precision", "recall", "density", "coverage")
SPLITS = 10  # of the Inception score
MOST_PAIRED = 10_000  # samples of a set in kernel distances
MOST_WORK = 1e12  # decompositions of covariances, one a class, times features cubed: minutes


@dataclass(frozen=True)
class FeatureSet:
    """Outputs of a feature network for a set of images, or their statistics.

    Attributes:
        features: Features ``(N, F)``; None if only their statistics are known.
        statistics: Statistics of all images. They may be of more images than ``features``: the
            reference files of ADM hold statistics of all images and 10 000 images. None with
            features alone.
        logits: Logits ``(N, K)`` for the Inception score.
        labels: Classes ``(N,)``. Their numbers count as fixed.

    Raises:
        ValueError: If there are neither features nor statistics, or the widths of features and
            statistics or the numbers of features, logits and labels differ.

    >>> FeatureSet(torch.zeros(5, 2)).count
    5
    """

    features: Tensor | None = None
    statistics: Statistics | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features is None and self.statistics is None:
            raise ValueError("features must be given without statistics, got neither")
        if self.features is not None:
            check_rows(self.features, "features")
            width = self.features.shape[1]
            if self.statistics is not None and len(self.statistics.mean) != width:
                raise ValueError(
                    f"statistics must be of the {width} features, got {len(self.statistics.mean)}"
                )
            for name, column in {"logits": self.logits, "labels": self.labels}.items():
                if column is not None and len(column) != len(self.features):
                    raise ValueError(
                        f"{name} must be of the {len(self.features)} features, got {len(column)}"
                    )

    @classmethod
    def collect(
        cls,
        outputs: Iterable[Mapping[str, Tensor]],
        network: Features,
        labels: Tensor | None = None,
    ) -> "FeatureSet":
        """Join the outputs of batches, see `flowkit.metrics.outputs_of`.

        Spatial features are not kept but accumulated: they are as large as the features.

        Raises:
            ValueError: If there is no batch, or a value is not finite; the message has the number
                of the image.
        """
        kept: dict[str, list[Tensor]] = {"features": [], "logits": []}
        moments, spatial, count = Moments(), Moments(), 0
        for found in outputs:
            for name in found.keys() & kept.keys():
                check_rows(found[name], name, count)
                kept[name].append(found[name].cpu())
            if "spatial" in found:
                moments.update(found["features"])
                spatial.update(found["spatial"])
            count += len(found["features"])
        check_at_least(count, 2, "the number of images")
        statistics = None
        if spatial.count:
            names = {"features_name": network.name, "features_hash": network.hash}
            statistics = moments.statistics(spatial, **names)
        joined = {name: torch.cat(parts) for name, parts in kept.items() if parts}
        return cls(statistics=statistics, labels=labels, **joined)

    @property
    def count(self) -> int | None:
        """Number of images of the Fréchet distance; None if a file of statistics does not say."""
        if self.statistics is not None:
            return self.statistics.count
        return len(self._known)

    @property
    def dim(self) -> int:
        """Number of features."""
        return self._known.shape[1] if self.statistics is None else len(self.statistics.mean)

    @property
    def sampled(self) -> bool:
        """True if the Fréchet distance is that of the features, not of statistics of a file."""
        return self.features is not None and self.count == len(self.features)

    @property
    def hash(self) -> str | None:
        """Hash of the features, or the one that a file of statistics holds."""
        if self.sampled:
            return tensor_hash(self._known)
        return None if self.statistics is None else self.statistics.reference_hash

    def gaussian(self) -> Gaussian:
        """Return the Gaussian of the Fréchet distance."""
        if self.sampled or self.statistics is None:
            return Gaussian.fit(self._known)
        return Gaussian(self.statistics.mean, self.statistics.cov)

    @property
    def _known(self) -> Tensor:
        """The features, where they are known."""
        if self.features is None:
            raise ValueError("features must be given, got statistics only")
        return self.features


def feature_metrics(
    samples: FeatureSet,
    reference: FeatureSet,
    network: Features,
    *,
    floor: FeatureSet | None = None,
    neighbors: int | None = None,
    extrapolate: bool = False,
) -> dict[str, Any]:
    """Compare the features of samples with those of a reference, see `image_metrics`.

    With statistics of a file in the place of reference features, they count as those of the
    population, and metrics that need the features are None. ``left_out`` says why.

    Kernel distances take at most 10 000 samples of a set, of more a random choice; ``paired`` then
    has their numbers. Precision, recall, density and coverage take all features. If the statistics
    of the reference are of other images than its features, ``num_reference_features`` has the
    number of the features.

    Args:
        samples: Features of the samples.
        reference: Features or statistics of the reference.
        network: The feature network of both.
        floor: Features of as many training images.
        neighbors: Neighbor that defines the radius of precision, recall, density and coverage.
            None stands for 3 in the features of Inception, as ADM takes, and for 5 in others.
        extrapolate: Whether to extrapolate the Fréchet distance to infinitely many samples.

    Returns:
        A record of plain types for JSON.

    Raises:
        ValueError: If the reference is of another feature network, or has another number of
            features.

    >>> from flowkit.metrics import Pixels
    >>> a, b = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(0))
    >>> record = feature_metrics(FeatureSet(a), FeatureSet(b + 1), Pixels())
    >>> 2 < record["frechet_distance"] < 4, record["num_samples"], record["num_reference"]
    (True, 200, 200)
    """
    if samples.features is None:
        raise ValueError("samples must have features, got statistics only")
    check_network(network.name, network.hash, samples.dim, reference)
    if neighbors is None:
        neighbors = 3 if family(network) == "inception" else 5
    record = _compare(samples, reference, network, neighbors, extrapolate)
    if floor is not None:
        record["floor"] = _compare(floor, reference, network, neighbors, extrapolate)
    return record | {
        "distance_name": distance_name(network),
        "features": {"name": network.name, "hash": network.hash},
        "reference": {"num_samples": reference.count, "hash": reference.hash},
    }


def check_network(name: str, hash: str, dim: int, reference: FeatureSet) -> None:
    """Require a reference of the same feature network, as far as it says its network.

    Raises:
        ValueError: If name, hash or the number of features differ.
    """
    if reference.statistics is not None:
        reference.statistics.check_features(name, hash, dim)
    elif reference.dim != dim:
        raise ValueError(f"reference must have {dim} features, got {reference.dim}")


def named(name: str, value: float | None, interval: Interval | None) -> dict[str, Any]:
    """Return a value and its interval under their names in records."""
    return {name: value, f"{name}_interval": None if interval is None else list(interval)}


def _compare(
    a: FeatureSet, b: FeatureSet, network: Features, neighbors: int, extrapolate: bool
) -> dict[str, Any]:
    """Measure all that is known of samples ``a`` and a reference ``b``."""
    features = a.features
    if features is None:
        raise ValueError("samples must have features, got statistics only")
    # A class with one sample says nothing about its spread: then the draws count as independent.
    strata = (_several(a.labels), _several(b.labels))
    left_out: dict[str, str] = {}
    record: dict[str, Any] = {
        "num_samples": len(features),
        "num_reference": b.count,
        "stratified": {"samples": strata[0] is not None, "reference": strata[1] is not None},
        "frechet_distance": gaussian_distance(a.gaussian(), b.gaussian()),
        "frechet_distance_unbiased": None,
        "frechet_distance_unbiased_interval": None,
    }
    known = b.features if b.sampled else b.statistics
    given = (strata[0], strata[1] if b.sampled else None)
    sets = {"samples": features}
    if isinstance(known, Tensor):
        sets["reference images"] = known
    classes = max((len(labels.unique()) for labels in strata if labels is not None), default=1)
    quick = classes * a.dim**3 <= MOST_WORK
    if all(map(enough, sets.values())) and quick and known is not None:
        record |= named(
            "frechet_distance_unbiased", *frechet_unbiased(features, known, strata=given)
        )
    if extrapolate and known is not None:
        few = [
            *_few({name: len(x) for name, x in sets.items()}, given, a.dim),
            *([] if quick else [f"{classes:,} classes of {a.dim:,} features take too long"]),
        ]
        if few:
            left_out["frechet_distance_infinity"] = "; ".join(few)
        else:
            generator = torch.Generator().manual_seed(0)  # records repeat
            found = frechet_infinity(features, known, strata=given, generator=generator)
            record |= named("frechet_distance_infinity", *found)
    if a.statistics is not None and a.statistics.spatial_mean is not None:
        if b.statistics is None or b.statistics.spatial_mean is None:
            left_out["spatial_frechet_distance"] = "the reference lacks the fields mu_s, sigma_s"
        else:
            distance = a.statistics.spatial.distance(b.statistics.spatial)
            record["spatial_frechet_distance"] = distance
    if a.logits is not None:
        score = inception_score(a.logits, min(SPLITS, len(a.logits)))
        record |= dict(zip(("inception_score", "inception_score_std"), score, strict=True))
    if b.features is None:
        names = ("kernel_distance", *PRDC._fields)
        left_out |= dict.fromkeys(names, "the reference has statistics, no images or features")
    else:
        if not b.sampled:
            record["num_reference_features"] = len(b.features)
        record |= _by_pairs(features, b.features, strata, neighbors, family(network))
    return record | {"left_out": left_out, **_trust(record, a, b, network.name)}


def _few(counts: Mapping[str, int], strata: Strata, dim: int) -> list[str]:
    """Say which sets are too small for `frechet_infinity`."""
    least, said = fewest_samples(dim), []
    for (name, count), labels in zip(counts.items(), strata, strict=False):
        if count < least:
            said.append(f"{count:,} {name}, and it needs {least:,}")
        elif labels is not None and int(labels.unique(return_counts=True)[1].min()) < FEWEST:
            said.append(f"fewer than {FEWEST} {name} of a class")
    return said


def _by_pairs(a: Tensor, b: Tensor, strata: Strata, neighbors: int, kind: str) -> dict[str, Any]:
    """Measure what compares samples ``a (N, F)`` with each of ``b (M, F)``."""
    record: dict[str, Any] = {}
    (some, own), (others, classes) = _some(a, strata[0]), _some(b, strata[1])
    if len(some) < len(a) or len(others) < len(b):
        record["paired"] = {"samples": len(some), "reference": len(others)}
    fixed = (_several(own), _several(classes))
    record |= named("kernel_distance", *kernel_distance(some, others, strata=fixed))
    if kind == "clip":
        units = F.normalize(some.double()), F.normalize(others.double())
        value, ends = kernel_distance(*units, kernel=gaussian, strata=fixed)
        record["cmmd"] = cmmd(*units)
        record |= named("cmmd_unbiased", 1000 * value, Interval(*(1000 * end for end in ends)))
    count = min(len(a), len(b))
    # With the farthest sample as neighbor, noise is precise.
    k = max(1, min(neighbors, count // 4))
    if count >= 4 * neighbors:
        found, intervals = prdc_intervals(b, a, k, strata=(strata[1], strata[0]))
    else:
        found, intervals = prdc(b, a, k), dict[str, Interval]()
    for name, value in found._asdict().items():
        record |= named(name, value, intervals.get(name))
    return record | {"neighbors": k}


def _some(x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a random choice of at most `MOST_PAIRED` rows, always the same, and their classes."""
    if len(x) <= MOST_PAIRED:
        return x, labels
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:MOST_PAIRED]
    return x[rows], None if labels is None else labels[rows]


def unreliable(*counts: int) -> list[str]:
    """Return the names of the values that say little over sets of so many images.

    >>> unreliable(1000, 100), unreliable(1000, 99)[:2]
    ([], ['frechet_distance', 'precision'])
    """
    return list(UNRELIABLE) if min(counts) < FEW else []


def _trust(record: dict[str, Any], a: FeatureSet, b: FeatureSet, network: str) -> dict[str, Any]:
    """Say which values of a record depend too much on the number of images, and why."""
    sets = {"samples": record["num_samples"], "reference images": record["num_reference"]}
    counts = {name: count for name, count in sets.items() if count is not None}
    depend, warnings = [], []
    if unreliable(*counts.values()):
        depend.append(UNRELIABLE[0])
    if b.features is not None:
        depend += unreliable(record["num_samples"], len(b.features))[1:]
    if b.statistics is not None and b.statistics.features_name is None:
        warnings.append(
            "the reference statistics do not name their feature network: the distance is that of "
            f"{network} only if they are of the same network"
        )
    for name, count in counts.items():
        if count <= a.dim:
            warnings.append(
                f"{count:,} {name} for {a.dim:,} features: the covariance has rank {count - 1:,}, "
                "and the Fréchet distance is far too large"
            )
            depend.append("frechet_distance")
    if a.logits is not None and len(a.logits) < SPLITS * a.logits.shape[1]:
        depend.append("inception_score")
    measured = [name for name in dict.fromkeys(depend) if name in record]
    return {"unreliable": measured, "warnings": warnings}


def _several(labels: Tensor | None) -> Tensor | None:
    """Return the classes, or None if a class has only one sample."""
    if labels is None or int(labels.unique(return_counts=True)[1].min()) < 2:
        return None
    return labels.cpu()
