"""Scores of images in published feature networks: Inception score and CMMD."""

import torch
from torch import Tensor

from flowkit.checks import check_between
from flowkit.metrics.frechet import as_features, check_rows


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    r"""Inception score: how sure a classifier is of each image, and how many classes it finds.

    ``exp(E_x KL(p(y|x) ‖ p(y)))`` in each of ``splits`` parts of the images in their order; mean
    and standard deviation over the parts. It lies between 1 and the number of classes, and has no
    reference. It grows with the number of images in a part: compare it at equal numbers. ADM takes
    parts of 5000 images, which are 10 parts of its 50 000.

    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4; Dhariwal & Nichol 2021 (arXiv
    2105.05233) for parts in order and the logits without bias of `inception`.

    Args:
        logits: Logits ``(N, K)``.
        splits: Number of parts, in [1, N]. The sizes differ by one at most.

    Returns:
        Mean and standard deviation over the parts (divided by their number).

    Raises:
        ValueError: If the shape is wrong, a value is not finite, or ``splits`` is out of range.

    >>> round(inception_score(torch.eye(4).repeat(5, 1) * 100, splits=5)[0], 6)   # all 4 classes
    4.0
    >>> inception_score(torch.zeros(20, 4), splits=5)
    (1.0, 0.0)
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (N, K), got {tuple(logits.shape)}")
    check_rows(logits, "logits")
    check_between(splits, 1, len(logits), "splits")
    scores = []
    logs, count = logits.double().log_softmax(1), len(logits)
    for k in range(splits):
        part = logs[k * count // splits : (k + 1) * count // splits]
        own = part.exp()
        entropy = -torch.special.xlogy(own.mean(0), own.mean(0)).sum()
        scores.append((entropy + (own * part).sum(1).mean()).exp())
    found = torch.stack(scores)
    return found.mean().item(), found.std(correction=0).item()


SIGMA, SCALE, ROWS = 10.0, 1000.0, 1000


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD: 1000 times the squared MMD with the kernel ``exp(−‖x − y‖² / (2 · 10²))``.

    It is the biased estimate, the mean kernel over all pairs, as its authors publish. The name is
    for features of `clip_features`, which have length 1: then the bias at ``N`` samples is below
    ``20 / N``.

    Source: Jayasumana et al. 2024, *Rethinking FID* (arXiv 2401.09603); Gretton et al. 2012,
    *A kernel two-sample test*, equation 5.

    Args:
        a: Features ``(N, F)``.
        b: Features ``(M, F)``.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: If the shapes differ, a set has fewer than 2 samples or a value is not finite.

    >>> a = torch.eye(4)
    >>> cmmd(a, a), round(cmmd(a, -a), 4)
    (0.0, 9.9008)
    """
    a, b = as_features(a=a, b=b)
    value = _mean_gauss(a, a) + _mean_gauss(b, b) - 2 * _mean_gauss(a, b)
    return SCALE * max(value, 0.0)


def _mean_gauss(a: Tensor, b: Tensor) -> float:
    """Return the mean kernel of all pairs of ``a (N, F)`` and ``b (M, F)``, in blocks."""
    norms, total = b.square().sum(1), 0.0
    for rows in a.split(ROWS):
        squares = rows.square().sum(1)[:, None] + norms - 2 * rows @ b.T
        total += (squares / (-2 * SIGMA**2)).exp().sum().item()
    return total / (len(a) * len(b))
