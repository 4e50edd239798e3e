"""Inception score: closed forms, and the formula of ADM on numpy arrays."""

import numpy as np
import pytest
import torch

from flowkit.metrics import inception_score
from tests.metrics.samples import normal


def adm_score(logits, split_size):
    """The formula on probabilities, in parts of a given size in order."""
    values = np.exp(logits.numpy())
    probabilities, scores = values / values.sum(1, keepdims=True), []
    for i in range(0, len(values), split_size):
        part = probabilities[i : i + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(0)[None]))
        scores.append(np.exp(divergence.sum(1).mean()))
    return np.mean(scores), np.std(scores)


def test_score_in_parts_is_that_of_adm():
    logits = 2 * normal(600, 12) + torch.arange(600)[:, None] / 100 * normal(12, seed=1)
    assert inception_score(logits, splits=10) == pytest.approx(adm_score(logits, 60), rel=1e-12)
    assert inception_score(logits, splits=1) == pytest.approx(adm_score(logits, 600), rel=1e-12)
    assert inception_score(logits)[1] > 0.01


def test_score_of_sure_images_counts_their_classes():
    sure = torch.eye(5).repeat_interleave(2, 0) * 1000  # probabilities of exactly 0 and 1
    assert inception_score(sure, splits=1) == pytest.approx((5, 0))
    assert inception_score(sure, splits=5) == pytest.approx((1, 0))  # one class in each part
    # 7 images in 3 parts of 2, 2 and 3.
    logits = torch.eye(7) * 1000
    assert inception_score(logits, splits=3)[0] == pytest.approx(7 / 3)


def test_score_errors():
    with pytest.raises(ValueError, match=r"logits must have shape \(N, K\), got \(3,\)"):
        inception_score(torch.zeros(3))
    with pytest.raises(ValueError, match=r"splits must lie in \[1, 3\], got 10"):
        inception_score(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"logits must be finite, got 2 NaN .* in sample 1"):
        inception_score(torch.tensor([[0.0, 1.0], [torch.nan, torch.nan]]), 1)
