"""Scores of images by the logits of a classifier: the Inception score."""

import torch
from torch import Tensor

from flowkit.checks import check_between
from flowkit.metrics.frechet import check_rows


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
