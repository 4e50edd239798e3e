"""Lines on the fit of a network: the loss over time, averaged against raw weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.checks import expand_like
from flowkit.diagnosis.examples import Examples, Mean, mean_of, squares
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
    pair, u = examples.pair, examples.u
    half = (torch.randperm(examples.pairs, generator=generator) < examples.pairs / 2).to(u.device)
    simple = _gaussian(examples, x1, half, path)
    part = (examples.t * BINS).long().clamp(0, BINS - 1)
    residual, gain = u.double() - v.double(), u.new_zeros(len(u), dtype=torch.float64)
    features = torch.stack([v, examples.x_t, simple, torch.ones_like(v)]).double().flatten(2)
    for k in range(BINS):
        for side in (half[pair], ~half[pair]):
            fitted, tested = (part == k) & side, (part == k) & ~side
            if not (bool(fitted.any()) and bool(tested.any())):
                continue
            a, b = features[:, fitted].flatten(1), residual[fitted].flatten()
            weights = torch.linalg.lstsq((a @ a.T).cpu(), (a @ b)[:, None].cpu(), driver="gelsd")
            found = torch.einsum("k,kmd->md", weights.solution[:, 0].to(a), features[:, tested])
            left = residual[tested].flatten(1) - found
            gain[tested] = squares(residual[tested]) - squares(left)
    energy, loss, other = squares(u), squares(residual), squares(u.double() - simple)

    def means(values: Tensor, scale: Tensor) -> list[Mean]:
        there = [part == k for k in range(BINS)]
        sizes = [scale[rows].mean().clamp_min(1e-12) for rows in there]
        return [mean_of(values[r] / s, pair[r]) for r, s in zip(there, sizes, strict=True)]

    factor = ((u.double() * v).sum() / v.double().square().sum().clamp_min(1e-300)).item()
    scaled = squares(u.double() - factor * v.double())
    return Fit(
        means(energy - loss, energy),
        means(loss - other, energy),
        means(gain, loss),
        mean_of(gain / loss.mean().clamp_min(1e-12), pair),
        factor,
        1 - (scaled.mean() / loss.mean().clamp_min(1e-12)).item(),
    )


def _gaussian(examples: Examples, x1: Tensor, half: Tensor, path: Path) -> Tensor:
    """Return the velocities of a Gaussian with the moments of the other half of the data."""
    if not isinstance(path, Interpolant):
        return torch.zeros_like(examples.u)
    a, b, da, db = (expand_like(c, examples.u) for c in path.coefficients(examples.t))
    flat, sides = x1.double(), (~half, half)  # a row of the first half sees the second
    mean, var = (torch.stack([f(flat[s]) for s in sides]) for f in (_mean, _var))
    own = (~half).long()[examples.pair]
    mean, var = mean[own].to(examples.u), var[own].to(examples.u)
    slope = (a * da * var + b * db) / (a**2 * var + b**2 + path.sigma**2)
    return da * mean + slope * (examples.x_t - a * mean)


def _mean(x: Tensor) -> Tensor:
    return x.mean(0)


def _var(x: Tensor) -> Tensor:
    return x.var(0)


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
