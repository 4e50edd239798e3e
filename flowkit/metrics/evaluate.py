"""Records of an evaluation: metrics with the features and the reference they depend on."""

from typing import Any, cast

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
    generated_features: Tensor | None = None,
) -> dict[str, Any]:
    """Compare generated images with held-out real images.

    The ``floor`` is the same comparison with ``n`` *training* images instead of the generated ones:
    the value of a perfect model. A model with smaller distances reproduces training images. If
    there are fewer than ``n`` training images, the floor has a smaller ``num_samples``, and its
    distance has a larger upward bias. All images are first rounded by `to_uint8`, so a sample has
    the values of its saved file.

    ``frechet_distance`` is the usual estimate, biased upwards at this number of samples.
    ``frechet_distance_unbiased`` and ``frechet_distance_unbiased_interval`` estimate the distance
    for infinitely many samples, see `frechet_unbiased`. They are ``None`` if there are too few
    samples for the dimension of the features.

    Args:
        real_train: Training images ``(N, C, H, W)`` in [-1, 1], for the floor; at least 4.
        real_test: Held-out images ``(M, C, H, W)`` in [-1, 1], the reference; at least 4.
        generated: Generated images ``(n, C, H, W)``, in [-1, 1] or 8-bit; at least 4.
        features: The feature space of all distances.
        labels: Requested classes ``(n,)`` of the generated images.
        test_labels: Classes ``(M,)`` of the held-out images, for the accuracy of the judge.
        judge: An independent classifier; needs ``labels`` and ``test_labels``.
        generator: Draws the images of the floor, subsets and groups; on the CPU.
        generated_features: Features ``(n, F)`` of the 8-bit generated images, if they are known.

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
    path: Solution | Tensor | None = None,
    grid: Tensor | int | None = None,
) -> dict[str, Any]:
    """Compare generated points with real points, and measure the straightness of a path.

    The normalized path energy compares the path energy with ``W2²`` between the source ``path[0]``
    and the real points. A path energy below this ``W2²`` means that the flow does not reach the
    data; it does not mean a straighter flow. ``path_energy_below_w2_squared`` is True in this case.

    Args:
        real: Real points ``(N, *)``.
        generated: Generated points ``(M, *)``.
        path: A solution with a path, or the path ``(n+1, B, *)``; None skips the path energy.
        grid: The times ``(n+1,)`` of the path, or ``n`` for uniform times.

    Returns:
        A record of plain types for JSON: ``w2`` and ``w2_squared`` between generated and real
        points. With a path also ``transport_w2`` and ``transport_w2_squared`` between source and
        real points, ``path_energy``, ``normalized_path_energy`` and
        ``path_energy_below_w2_squared``.

    Raises:
        ValueError: If a path is given without its grid, or shapes differ.

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
    states = path if isinstance(path, Tensor) else cast(Tensor, path.path)
    transport = wasserstein2(states[0], real)
    return record | {
        "transport_w2": transport,
        "transport_w2_squared": transport**2,
        "path_energy": energy,
        "normalized_path_energy": normalized_path_energy(energy, transport),
        "path_energy_below_w2_squared": energy < transport**2,
    }


def _compare(a: Tensor, b: Tensor, generator: torch.Generator | None) -> dict[str, Any]:
    """Compute all distances between features ``a (N, F)`` and reference features ``b (M, F)``."""
    count = min(len(a), len(b))
    unbiased, interval = None, None
    # The jackknife of frechet_unbiased leaves out one of 20 groups.
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
    """Return Wilson's 95 % interval of a proportion.

    If all values agree, its width is positive. The width of a bootstrap interval would be 0.
    """
    from scipy.stats import binomtest

    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]
