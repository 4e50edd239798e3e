"""Lines on the fit of a network: the loss over time, averaged against raw weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import expand_like
from flowkit.diagnosis.examples import SMALL, Examples, Mean, mean_of, squares
from flowkit.diagnosis.findings import Finding, line, percent
from flowkit.paths import Interpolant, Path

BINS, SIGMAS = 8, 4.0
AVOIDABLE = (0.15, 0.05)  # share that a correction may remove of a part's loss, and of all
FACTOR = 0.9  # of what a correction removes, if a factor of the output is all that is wrong
RAW, AVERAGED = 1.1, 1.02  # loss of one over the other that is an alarm


class Fit(NamedTuple):
    """The loss of a network in parts of the time, and what would lower it."""

    explained: list[Mean]
    """Explained share of the targets' energy in each part."""
    worse: list[Mean]
    """Loss above that of mean and std alone, as a share of the energy."""
    avoidable: list[Mean]
    """Share of the loss that a simple correction removes."""
    total: Mean
    """Share of the whole loss that a simple correction removes."""
    factor: float
    """Factor of the velocity that removes most of the loss."""
    by_factor: float
    """Share of the whole loss that this factor removes."""


def fit_of(
    v: Tensor, examples: Examples, x1: Tensor, path: Path, generator: torch.Generator
) -> Fit:
    """Measure the loss in 8 parts of the time.

    The velocity ``E[u | x_t]`` leaves a residual ``u − v`` that no function of ``x_t`` and ``t``
    can predict. Here ``v``, ``x_t`` and the velocity of a Gaussian with the mean and the std of
    each element of the data try to: their best combination on one half of the pairs is measured on
    the other half. What it removes, the network could have learnt.

    Args:
        v: Velocities of the examples ``(M, *)``.
        examples: The examples.
        x1: The data ``(N, *)``.
        path: The path of the flow.
        generator: Draws the halves.
    """
    pair, count = examples.pair, examples.u[0].numel()
    half = torch.randperm(examples.pairs, generator=generator) < examples.pairs / 2
    half = half.to(pair.device)
    moments = _moments(x1, half)
    group = 2 * (examples.t * BINS).long().clamp(0, BINS - 1) + half[pair]  # of time and half
    chunks = [
        (k, rows)
        for k in range(2 * BINS)
        for rows in (group == k).nonzero()[:, 0].split(SMALL)  # to hold few rows in float64
    ]

    def terms(k: int, rows: Tensor) -> tuple[Tensor, Tensor]:  # features, residual; targets
        part, own = examples.some(rows), v[rows].double()
        mean, var = (moment[k % 2] for moment in moments)
        simple = _gaussian(part, mean, var, path)
        found = torch.stack([own, part.x_t, simple, torch.ones_like(own), part.u - own])
        return found.flatten(2), part.u.flatten(1)

    products = pair.new_zeros(2 * BINS, 5, 5, dtype=torch.float64)
    for k, rows in chunks:  # normal equations
        flat = terms(k, rows)[0].flatten(1)
        products[k] += flat @ flat.T
    found = torch.linalg.lstsq(products[:, :4, :4].cpu(), products[:, :4, 4:].cpu(), driver="gelsd")
    weights = found.solution[..., 0].to(pair.device)
    energy, loss, other, gain = pair.new_zeros(4, len(pair), dtype=torch.float64)
    for k, rows in chunks:
        (*features, residual), u = terms(k, rows)
        energy[rows], loss[rows], other[rows] = map(squares, (u, residual, u - features[2]))
        for weight, feature in zip(weights[k ^ 1], features, strict=True):  # of the other half
            residual -= weight * feature
        gain[rows] = loss[rows] - squares(residual)

    def means(values: Tensor, scale: Tensor) -> list[Mean]:
        there = [group // 2 == k for k in range(BINS)]
        sizes = [scale[rows].mean().clamp_min(1e-12) for rows in there]
        return [mean_of(values[r] / s, pair[r]) for r, s in zip(there, sizes, strict=True)]

    total = products.sum(0)
    factor = (total[0, 4] / total[0, 0].clamp_min(1e-300)).item()  # of v in the residual
    return Fit(
        means(energy - loss, energy),
        means(loss - other, energy),
        means(gain, loss),
        mean_of(gain / loss.mean().clamp_min(1e-12), pair),
        1 + factor,
        factor * total[0, 4].item() / count / (len(pair) * loss.mean().clamp_min(1e-12).item()),
    )


def _gaussian(examples: Examples, mean: Tensor, var: Tensor, path: Path) -> Tensor:
    """Return the velocities of a Gaussian with a mean and a variance of each element."""
    if not isinstance(path, Interpolant):
        return torch.zeros_like(examples.u)
    a, b, da, db = (expand_like(c, examples.u) for c in path.coefficients(examples.t))
    mean, var = mean.to(examples.u), var.to(examples.u)
    slope = (a * da * var + b * db) / (a**2 * var + b**2 + path.sigma**2)
    return da * mean + slope * (examples.x_t - a * mean)


def _moments(x1: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance ``(2, *)`` of the data that rows of each half do not see.

    A row of the second half (0) takes those of the first half (1), and the other way round.
    """
    means, variances = [], []
    for side in (half, ~half):
        chunks = x1[side].split(SMALL)
        count = int(side.sum())
        zero = torch.zeros_like(x1[0], dtype=torch.float64)
        mean = sum((x.sum(0, dtype=torch.float64) for x in chunks), zero) / count
        square = sum(((x - mean).square().sum(0) for x in chunks), zero)
        means.append(mean)
        variances.append(square / (count - 1))
    return torch.stack(means), torch.stack(variances)


def check_times(fit: Fit) -> Finding:
    """Look for parts of the time in which the network fits badly, in 1 or 2 parts of 8."""
    bad = bad_parts(fit)
    k = min(range(BINS), key=lambda k: fit.explained[k].value) if not bad else bad[0]
    lowest, highest = (f(m.value for m in fit.explained) for f in (min, max))
    figure = f"explained {lowest:.2f} to {highest:.2f} in {BINS} parts of the time"
    if 0 < len(bad) <= 2:
        figure += (
            f"; at t from {k / BINS:g} to {(k + 1) / BINS:g} only {fit.explained[k].value:.2f}"
        )
    return line(
        "loss over t",
        0 < len(bad) <= 2,
        figure,
        "the network is bad at these times only: train there (times=...), or see what it is told "
        "and what it divides by there",
    )


def bad_parts(fit: Fit) -> list[int]:
    """Return the parts in which mean and std alone fit better, or a correction removes 15 %."""
    return [
        k
        for k, (worse, gain) in enumerate(zip(fit.worse, fit.avoidable, strict=True))
        if (worse.z > SIGMAS and worse.value > 0.01)
        or (gain.z > SIGMAS and gain.value > AVOIDABLE[0])
    ]


def check_training(fit: Fit) -> Finding:
    """See whether a simple correction would lower the loss at all times."""
    bad, total = bad_parts(fit), fit.total
    alarm = len(bad) > 2 or (total.z > SIGMAS and total.value > AVOIDABLE[1] and not bad)
    worse = sum(w.z > SIGMAS and w.value > 0.01 for w in fit.worse)
    figure = (
        f"a simple correction removes {percent(max(total.value, 0))} of the loss; mean and std "
    )
    figure += f"alone are better in {worse} of {BINS} parts of the time"
    advice = (
        "the network has not learnt what its data tell: train longer, look at the learning rate"
    )
    if fit.by_factor > FACTOR * total.value > 0:
        figure += f"; the factor {fit.factor:.3g} alone removes {percent(fit.by_factor)}"
        advice = f"multiply the output by {fit.factor:.3g}: see what it is divided by"
    return line("training", alarm, figure, advice)


def check_averaged(averaged: Tensor, raw: Tensor, examples: Examples, learnt: bool) -> Finding:
    """Compare the losses of averaged and of raw weights, by their velocities ``(M, *)``.

    An average lags behind also early in a training. So it is an alarm only if the raw weights have
    learnt what their data tell.
    """
    first, second = (squares(v - examples.u) for v in (averaged, raw))
    if not bool(second.isfinite().all()):
        ratio, z = torch.inf, torch.inf
    else:
        ratio = (second.mean() / first.mean()).item()
        z = mean_of(second - first, examples.pair).z
    diverged, lags = z > SIGMAS and ratio > RAW, learnt and z < -SIGMAS and 1 / ratio > AVERAGED
    advice = "the raw weights have diverged: lower the learning rate, clip gradients; sample with "
    advice += "the averaged weights, or from an earlier checkpoint"
    if lags:
        advice = "the average lags behind: shorten it (callback.ema.decay), or train longer"
    return line("averaged weights", diverged or lags, f"loss of raw weights {ratio:.3g} x", advice)
