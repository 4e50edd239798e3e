"""Conditions that change nothing."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from flowkit.diagnosis.examples import Examples, Mean, Watched, mean_of, squares
from flowkit.diagnosis.findings import Finding, line, percent
from flowkit.diagnosis.readings import EARLY, is_labels
from flowkit.types import Cond, take
from flowkit.velocity import Velocity

SIGMAS, TINY, SHARE = 4.0, 1e-3, 0.1


def differs(cond: Cond) -> bool:
    """Return True if at least two samples have different conditions."""
    values = cond.values() if isinstance(cond, Mapping) else [] if cond is None else [cond]
    return any(bool((value != value[:1]).any()) for value in values)


def check_conditions(
    velocity: Velocity, examples: Examples, x1: Tensor, cond: Cond, generator: torch.Generator
) -> Finding:
    """Exchange the conditions among the samples, and see what that changes.

    Labels tell the mean of their class. So early in time, a network that uses them loses twice the
    variance ``B`` between classes if they are exchanged. ``B`` is measured with one half of the
    data on the other.
    """
    early = (examples.t < EARLY / 2).nonzero()[:, 0]
    part, pair = examples.some(early), examples.pair[early]
    network = Watched(velocity)
    order = torch.randperm(len(early), generator=generator).to(early.device)
    other = take(part.cond, order)
    plain, changed = (network.outputs(part.x_t, part.t, c) for c in (part.cond, other))
    size = (squares(changed - plain).mean() / squares(plain).mean()).sqrt().item()
    loss = mean_of(squares(changed - part.u) - squares(plain - part.u), pair)
    alarm, could = size < TINY, ""
    if is_labels(cond):
        known = between_classes(x1, cast(Tensor, cond), generator)
        most = 2 * known.value
        if known.z > SIGMAS:
            could = f"; labels tell about {percent(known.value / squares(part.u).mean().item())}"
            alarm = alarm or loss.value + 3 * loss.error < SHARE * most
    lost = percent(loss.value / squares(part.u).mean().item())
    figure = f"exchanged, they change the velocity by {percent(size)}, which costs {lost} of the "
    figure += f"targets' energy{could}"
    return line(
        "conditions",
        alarm,
        figure,
        "the network ignores its condition: see that cond reaches it in training, that not every "
        "condition is dropped, and that labels lie beside their own samples",
    )


def between_classes(x1: Tensor, labels: Tensor, generator: torch.Generator) -> Mean:
    """Return the variance between classes per element, by the means of one half on the other."""
    flat = x1.flatten(1).double()
    order = torch.randperm(len(x1), generator=generator).to(x1.device)
    gains = flat.new_zeros(len(x1))
    for mine, other in (order.chunk(2), order.chunk(2)[::-1]):
        total, spread = flat[other].mean(0), flat[other].var(0) / len(other)
        for label in labels.unique():
            rows, seen = mine[labels[mine] == label], other[labels[other] == label]
            if len(seen) > 1:
                center = flat[seen].mean(0)
                noise = flat[seen].var(0) / len(seen) - spread  # of both estimated means
                gain = (flat[rows] - total).square() - (flat[rows] - center).square() + noise
                gains[rows] = gain.mean(1)
    return mean_of(gains, torch.arange(len(x1), device=x1.device))
