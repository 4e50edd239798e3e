"""Records of an evaluation: metrics with the features and the reference they depend on."""

from collections.abc import Mapping
from math import inf
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics.comparison import FeatureSet, feature_metrics, named
from flowkit.metrics.features import Features, outputs_of
from flowkit.metrics.intervals import Interval, around, wilson
from flowkit.metrics.judges import Judge, agreement
from flowkit.metrics.kernels import energy_distance
from flowkit.metrics.pictures import as_saved
from flowkit.metrics.straightness import (
    Transport,
    normalized_path_energy,
    path_energies,
    transport,
    transport_interval,
)
from flowkit.metrics.two_samples import FEWEST, c2st_interval
from flowkit.provenance import tensor_hash
from flowkit.sampling import Solution


def image_metrics(
    real_train: Tensor,
    real_test: Tensor,
    generated: Tensor,
    features: Features,
    *,
    labels: Tensor | None = None,
    test_labels: Tensor | None = None,
    judge: Judge | None = None,
    generator: torch.Generator | None = None,
    generated_features: Mapping[str, Tensor] | Tensor | None = None,
    neighbors: int | None = None,
    extrapolate: bool = False,
) -> dict[str, Any]:
    """Compare generated images with held-out real images.

    The ``floor`` is the same comparison with ``n`` *training* images instead of the generated ones:
    the value of a perfect model. A model with smaller distances reproduces training images. If
    there are fewer than ``n`` training images, the floor has a smaller ``num_samples``, and its
    distance has a larger upward bias. All images are first rounded by `to_uint8`, so a sample has
    the values of its saved file.

    ``frechet_distance`` is the usual estimate, biased upwards at this number of samples.
    ``frechet_distance_unbiased`` estimates the distance for infinitely many samples, see
    `frechet_unbiased`; it is ``None`` if there are fewer than two samples per feature, or if there
    are so many classes and features that it would take more than some minutes. The other values are
    those of `kernel_distance` and `prdc`.

    The ``…_interval`` of a value has a nominal coverage of 95 %. ``stratified`` says for which sets
    the numbers of samples of the classes count as fixed: those with given classes, if no class has
    only one sample. The images of the floor are drawn at random.

    ``unreliable`` lists the values that depend on the number of images so much that they say little
    if there are fewer than 100 images of a kind: the biased distance, precision, recall, density
    and coverage.

    Args:
        real_train: Training images ``(N, C, H, W)`` in [-1, 1], for the floor; at least 4.
        real_test: Held-out images ``(M, C, H, W)`` in [-1, 1], the reference; at least 4.
        generated: Generated images ``(n, C, H, W)``, in [-1, 1] or 8-bit; at least 4.
        features: The feature space of all distances.
        labels: Requested classes ``(n,)`` of the generated images; the numbers of images of the
            classes are fixed.
        test_labels: Classes ``(M,)`` of the held-out images, also fixed in number.
        judge: An independent classifier; needs ``labels`` and ``test_labels``.
        generator: Draws the images of the floor; on the CPU.
        generated_features: Features ``(n, F)`` of the 8-bit generated images, or all outputs of
            `flowkit.metrics.outputs_of`, if they are known.
        neighbors: Neighbor that defines the radius of precision, recall, density and coverage.
            None stands for 3 in the features of Inception, as ADM takes, and for 5 in others.
        extrapolate: Whether to measure ``frechet_distance_infinity``, see `frechet_infinity`.

    Returns:
        A record of plain types for JSON. ``reference["hash"]`` is the hash of the features of the
        held-out images.

    Raises:
        ValueError: If there are fewer than 4 images of a kind, or a judge has no labels.

    >>> from flowkit.metrics import Pixels
    >>> g = torch.Generator().manual_seed(0)
    >>> train, test, fake = torch.rand(3, 200, 1, 2, 2, generator=g) * 2 - 1
    >>> record = image_metrics(train, test, fake, Pixels(), generator=g)
    >>> record["num_samples"], record["features"]["name"], record["frechet_distance"] < 0.1
    (200, 'pixels', True)
    """
    for name, images in (
        ("real_train", real_train),
        ("real_test", real_test),
        ("generated", generated),
    ):
        check_at_least(len(images), 4, f"the number of {name} images")
    if judge is not None and (labels is None or test_labels is None):
        raise ValueError("labels must be given with a judge, got None; test_labels too")
    chosen = torch.randperm(len(real_train), generator=generator)[: len(generated)]
    train, test = as_saved(real_train[chosen.to(real_train.device)]), as_saved(real_test)
    if not isinstance(generated_features, Mapping):
        known = generated_features
        generated_features = (
            outputs_of(features, as_saved(generated)) if known is None else {"features": known}
        )
    sets = {"samples": (generated_features, labels)}
    sets["reference"] = (outputs_of(features, test), test_labels)
    sets["floor"] = (outputs_of(features, train), None)
    found = {
        name: FeatureSet.collect([outputs], features, classes)
        for name, (outputs, classes) in sets.items()
    }
    record = feature_metrics(
        found["samples"],
        found["reference"],
        features,
        floor=found["floor"],
        neighbors=neighbors,
        extrapolate=extrapolate,
    )
    if judge is not None and labels is not None and test_labels is not None:
        hits = agreement(judge, as_saved(generated), labels)
        right = agreement(judge, test, test_labels)
        record |= {
            **_share("class_agreement", hits),
            "judge": {
                "name": judge.name,
                **_share("test_accuracy", right),
            },
        }
    return record


def point_metrics(
    real: Tensor,
    generated: Tensor,
    path: Solution | Tensor | None = None,
    grid: Tensor | int | None = None,
    *,
    train: Tensor | None = None,
) -> dict[str, Any]:
    """Compare generated points with real points, and measure the straightness of a path.

    ``w2``, ``energy_distance`` and ``c2st`` compare the points. The ``floor`` is the same
    comparison of two real sets: a perfect model has these values, and ``w2`` is never near 0. With
    fewer than 20 points of a set ``c2st`` is None.

    The normalized path energy compares the path energy with ``W2²`` between the source ``path[0]``
    and the real points. A path energy below this ``W2²`` means that the flow does not reach the
    data; it does not mean a straighter flow. ``path_energy_below_w2_squared`` is True in this case.

    The ``…_interval`` of a value has a nominal coverage of 95 % for the mean of the value over
    draws of this many points, see `wasserstein2_interval`. The interval of the normalized path
    energy regards that each trajectory has a part in the path energy and in ``W2²``.

    Args:
        real: Real points ``(N, *)``, ``N >= 2``.
        generated: Generated points ``(M, *)``, ``M >= 2``.
        path: A solution with a path, or the path ``(n+1, B, *)``; None skips the path energy.
        grid: The times ``(n+1,)`` of the path, or ``n`` for uniform times.
        train: Other real points ``(K, *)``, for the floor; as many as there are generated points
            are taken.

    Returns:
        A record of plain types for JSON: ``w2``, ``w2_squared``, ``energy_distance`` and ``c2st``
        between generated and real points. With a path also ``transport_w2`` and
        ``transport_w2_squared`` between source and real points, ``path_energy``,
        ``normalized_path_energy`` and ``path_energy_below_w2_squared``.

    Raises:
        ValueError: If a path is given without its grid, shapes differ, or there are fewer than 2
            points or trajectories.

    >>> x0 = torch.tensor([[0.0], [1.0]])
    >>> record = point_metrics(x0 + 2, x0 + 2, torch.stack([x0, x0 + 2]), 1)
    >>> record["w2"], record["path_energy"], round(record["normalized_path_energy"], 6)
    (0.0, 4.0, 0.0)
    """
    check_at_least(min(len(real), len(generated)), 2, "the number of points")
    record: dict[str, Any] = {
        **_compare_points(generated, real),
        "reference": {"num_samples": len(real), "hash": tensor_hash(real)},
    }
    if train is not None:
        check_at_least(len(train), 2, "the number of points of train")
        record["floor"] = _compare_points(train[: len(generated)], real)
    if path is None:
        return record
    if grid is None:
        raise ValueError("grid must be given with a path, got None")
    energies = path_energies(path, grid)
    check_at_least(len(energies), 2, "the number of trajectories of path")
    energy, count = energies.mean().item(), len(energies)
    states = path if isinstance(path, Tensor) else cast(Tensor, path.path)
    found = transport(states[0], real)
    normalized = normalized_path_energy(energy, found.squared**0.5)
    ratio = energy / found.squared
    # The first-order changes of ratio − 1, by a trajectory and by a real point.
    slopes = (energies - ratio * found.potential_a) / found.squared
    others = ratio * found.potential_b / found.squared
    std = (slopes.var().item() / count + others.var().item() / len(others)) ** 0.5
    low, high = around(ratio - 1, std, (-1.0, inf), freedom=count - 1)
    below = 0.0 if low < 0 < high else min(abs(low), abs(high))
    std_energy = (energies.var().item() / count) ** 0.5
    return record | {
        **_distances("transport_w2", found),
        **named("path_energy", energy, around(energy, std_energy, (0.0, inf), freedom=count - 1)),
        **named("normalized_path_energy", normalized, Interval(below, max(abs(low), abs(high)))),
        "path_energy_below_w2_squared": energy < found.squared,
    }


def _compare_points(points: Tensor, real: Tensor) -> dict[str, Any]:
    """Measure all distances of two sets of points."""
    enough = min(len(points), len(real)) >= FEWEST
    value, interval = c2st_interval(points, real) if enough else (None, None)
    return {
        "num_samples": len(points),
        "num_reference": len(real),
        **_distances("w2", transport(points, real)),
        **named("energy_distance", *energy_distance(points, real)),
        **named("c2st", value, interval),
    }


def _distances(name: str, found: Transport) -> dict[str, Any]:
    """Return ``W2`` and ``W2²`` with their intervals under their names in records."""
    value, (low, high) = transport_interval(found)
    squares = Interval(low**2, high**2)
    return {
        **named(name, value, Interval(low, high)),
        **named(f"{name}_squared", value**2, squares),
    }


def _share(name: str, hits: Tensor) -> dict[str, Any]:
    """Return the share of hits ``(N,)`` and its interval under their names in records."""
    share = hits.double().mean().item()
    return named(name, share, wilson(share, len(hits)))
