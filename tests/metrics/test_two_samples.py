"""Classifier two-sample test: against scikit-learn's classifier, and on known sets."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from flowkit.metrics import c2st, c2st_interval
from tests.metrics.samples import normal


def test_c2st_is_the_share_of_scikit_learns_hits():
    a, b = normal(60, 3) * torch.tensor([1.0, 9.0, 0.1]), normal(60, 3, seed=1) + 0.7
    generator = torch.Generator().manual_seed(0)
    sets = [x[torch.randperm(60, generator=generator)] for x in (a, b)]
    points = torch.cat(sets)
    points = (points / points.std(0)).numpy()
    labels, fold, hits = np.repeat([0, 1], 60), np.tile(np.arange(60) % 5, 2), 0
    for k in range(5):
        fit = KNeighborsClassifier(9).fit(points[fold != k], labels[fold != k])  # √96
        hits += (fit.predict(points[fold == k]) == labels[fold == k]).sum()
    assert c2st(a, b) == hits / 120
    # In any unit and shape; a constant dimension tells nothing.
    constant = torch.ones(60, 1, dtype=a.dtype)
    wide = [torch.cat([1000 * x, constant], 1).reshape(60, 2, 2) for x in (a, b)]
    assert c2st(*wide) == hits / 120


def test_c2st_of_equal_and_of_far_sets():
    a, b = normal(300, 2), normal(200, 2, seed=1)
    value, (low, high) = c2st_interval(a, b)
    assert low < 0.5 < high
    assert low < value < high
    assert c2st_interval(a, b + 30) == (1.0, pytest.approx((1.0, 1.0), abs=0.02))
    # The Bayes classifier of two normals at distance 2 is right in 84 %.
    low, high = c2st_interval(a, torch.cat([b, b]) + torch.tensor([2.0, 0]))[1]
    assert 0.75 < low < high < 0.9


def test_c2st_errors():
    with pytest.raises(ValueError, match="the number of points must be at least 10, got 9"):
        c2st(normal(9, 2), normal(30, 2))
    with pytest.raises(ValueError, match="the number of points must be at least 20, got 19"):
        c2st_interval(normal(30, 2), normal(19, 2))
