"""Samples that the tests of metrics share."""

import torch

F64 = torch.float64


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Mixture:
    """Mixture of Gaussians in equal proportions, with known moments."""

    def __init__(self, classes, dim, seed=0, shift=0.0, scale=1.0):
        self.means = normal(classes, dim, seed=seed) + shift * normal(classes, dim, seed=seed + 1)
        self.stds = scale * (normal(classes, dim, seed=seed + 2).abs() / 2 + 0.5)

    def moments(self):
        mean = self.means.mean(0)
        spread = (self.means - mean).T @ (self.means - mean) + self.stds.square().sum(0).diag()
        return mean, spread / len(self.means)

    def draw(self, count, generator, fixed):
        """Return points, and their classes in fixed or random numbers."""
        labels = torch.arange(count) % len(self.means)
        if not fixed:
            labels = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=F64)
        return self.means[labels] + self.stds[labels] * noise, labels


def brute_jackknife(distance, sets, labels):
    """Leave out one sample at a time; the others of its class share its weight.

    ``distance`` maps two weights; the result is its value, and for each set and class the values
    without one sample.
    """
    whole = [torch.full((len(x),), 1 / len(x), dtype=F64) for x in sets]
    found = []
    for side, classes in enumerate(labels):
        for k in classes.unique():
            rows = (classes == k).nonzero()[:, 0]
            values = []
            for row in rows:
                weights = list(whole)
                changed = whole[side].clone()
                changed[rows] *= len(rows) / (len(rows) - 1)
                changed[row] = 0
                weights[side] = changed
                values.append(distance(*weights))
            found.append(values)
    return distance(*whole), found
