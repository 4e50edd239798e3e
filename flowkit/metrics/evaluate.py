"""Evaluation as a record: plain values beside what they were measured with."""

from typing import Any

import torch
from torch import Tensor

from flowkit.checks import check_at_least
from flowkit.metrics.features import Features
from flowkit.metrics.frechet import frechet_distance, frechet_unbiased
from flowkit.metrics.judges import Judge, agreement
from flowkit.metrics.neighbors import kid, prdc
from flowkit.metrics.pictures import as_saved
from flowkit.metrics.straightness import normalized_path_energy, path_energy, wasserstein2
from flowkit.provenance import tensor_hash


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
    generated_features: Tensor | None = None,
) -> dict[str, Any]:
    """Compare generated images with held-out real ones.

    Like with like: the same comparison, of as many *training* images with the same test images, is
    the ``floor`` that a perfect model would reach; a model below it remembers. With fewer training
    images than that, the floor's own ``num_samples`` tells, and its distance is biased upwards. All
    images pass through `to_uint8` first, so that samples are measured as they would be saved.

    ``frechet_distance`` is the usual, biased estimate at this sample count.
    ``frechet_distance_unbiased`` and ``frechet_distance_unbiased_interval`` are about infinitely
    many samples (see `frechet_unbiased`), and ``None`` when there are too few samples for the
    features.

    Args:
        real_train: Training images ``(N, C, H, W)`` in [-1, 1], for the floor.
        real_test: Held-out images ``(M, C, H, W)``, the reference.
        generated: Generated images ``(n, C, H, W)``, in [-1, 1] or 8-bit; at least 4.
        features: The feature space of all distances.
        labels: Classes ``(n,)`` that the generated images were asked to show.
        test_labels: Classes ``(M,)`` of the held-out images, for the judge's own accuracy.
        judge: An independent classifier; needs ``labels`` and ``test_labels``.
        generator: Draws the floor's images, subsets and resamples; on the CPU.
        generated_features: Those of the 8-bit ``generated``, where they are known already.

    Returns:
        A record of plain types, ready for JSON. The reference's hash is that of its features.

    Raises:
        ValueError: If there are fewer than 4 images of a kind, or a judge without labels.

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
    if generated_features is None:
        generated_features = features(as_saved(generated))
    reference = features(test)
    record: dict[str, Any] = {
        **_compare(generated_features, reference, generator),
        "floor": _compare(features(train), reference, generator),
        "features": {"name": features.name, "hash": features.hash},
        "reference": {"num_samples": len(test), "hash": tensor_hash(reference)},
    }
    if judge is not None and labels is not None and test_labels is not None:
        hits = agreement(judge, as_saved(generated), labels)
        record |= {
            "class_agreement": hits.double().mean().item(),
            "class_agreement_interval": _wilson(hits),
            "judge": {
                "name": judge.name,
                "test_accuracy": agreement(judge, test, test_labels).double().mean().item(),
            },
        }
    return record


def point_metrics(
    real: Tensor,
    generated: Tensor,
    path: Any = None,
    grid: Tensor | int | None = None,
) -> dict[str, Any]:
    """Compare generated points with real ones and, given their path, measure its straightness.

    The normalized path energy refers to the transport from the source, ``path[0]``, to the real
    points. A path energy below that ``W2²`` means a flow that misses the data, not a straighter
    one: ``path_energy_below_w2_squared`` says so.

    Args:
        real: Real points ``(N, *)``.
        generated: Generated points ``(M, *)``.
        path: A solution with its path, or the path ``(n+1, B, *)``.
        grid: The path's times.

    Returns:
        A record of plain types, ready for JSON: ``w2`` and ``w2_squared`` between generated and
        real points; with a path also ``transport_w2`` and ``transport_w2_squared`` between source
        and real points, ``path_energy`` and ``normalized_path_energy``.

    Raises:
        ValueError: If a path comes without its grid, or shapes differ.

    >>> x0 = torch.tensor([[0.0], [1.0]])
    >>> record = point_metrics(x0 + 2, x0 + 2, torch.stack([x0, x0 + 2]), 1)
    >>> record["w2"], record["path_energy"], round(record["normalized_path_energy"], 6)
    (0.0, 4.0, 0.0)
    """
    w2 = wasserstein2(generated, real)
    record: dict[str, Any] = {
        "w2": w2,
        "w2_squared": w2**2,
        "num_samples": len(generated),
        "reference": {"num_samples": len(real), "hash": tensor_hash(real)},
    }
    if path is None:
        return record
    if grid is None:
        raise ValueError("grid must be given with a path, got None")
    energy = path_energy(path, grid)
    states = path if isinstance(path, Tensor) else path.path
    transport = wasserstein2(states[0], real)
    return record | {
        "transport_w2": transport,
        "transport_w2_squared": transport**2,
        "path_energy": energy,
        "normalized_path_energy": normalized_path_energy(energy, transport),
        "path_energy_below_w2_squared": energy < transport**2,
    }


def _compare(a: Tensor, b: Tensor, generator: torch.Generator | None) -> dict[str, Any]:
    """All distances between two sets of features."""
    count = min(len(a), len(b))
    unbiased, interval = None, None
    # The jackknife leaves out one of 20 groups.
    if count - -(-count // 20) > a.shape[1]:
        unbiased, (low, high) = frechet_unbiased(a, b, generator=generator)
        interval = [low, high]
    neighbors = min(5, count - 1)
    kernel = kid(a, b, subsets=50, subset_size=min(1000, count // 2), generator=generator)
    return {
        "num_samples": len(a),
        "frechet_distance": frechet_distance(a, b),
        "frechet_distance_unbiased": unbiased,
        "frechet_distance_unbiased_interval": interval,
        "kernel_distance": kernel.mean,
        "kernel_distance_std": kernel.std,
        **prdc(b, a, k=neighbors)._asdict(),
        "neighbors": neighbors,
    }


def _wilson(hits: Tensor) -> list[float]:
    """Wilson's 95 % interval of a proportion: unlike a bootstrap, not empty when all agree."""
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]
