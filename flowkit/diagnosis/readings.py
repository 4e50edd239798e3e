"""The conventions of a network: its time, its output, and the scales of its noise and data.

The velocity ``E[u | x_t]`` has the smallest loss of all functions of ``x_t`` and ``t``. A reading
turns the network's output into another function of ``x_t`` and ``t``. So no reading of a network
that has learnt the velocity has a smaller loss than the network as it is. A reading with a clearly
smaller loss on the same examples tells how the network was trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from flowkit.checks import expand_like
from flowkit.diagnosis.examples import FIRST, LAST, SMALL, Examples, Watched, mean_of, squares
from flowkit.diagnosis.fits import fit_of
from flowkit.paths import Coefficients, Interpolant, Path
from flowkit.types import Cond

TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda t: t,
    "1 − t": lambda t: 1 - t,
    "1000 t": lambda t: 1000 * t,
    "1000 (1 − t)": lambda t: 1000 * (1 - t),
}
OUTPUTS = ("velocity", "negated velocity", "data", "noise")
SIGMAS, BETTER, CLOSE = 5.0, 0.9, 0.02
SCALES = [2.0**k for k in range(-5, 6) if k]
FEW, ROWS = 128, 256  # examples of the searches for scales and labels
MOST, EARLY = 20, 0.6  # labels that are all tried; times at which labels tell most
ENOUGH = 0.1  # of the loss that may be left to a correction of a scale
NEAR = 1.15  # scales nearer to 1 are not told from an imperfect network


@dataclass(frozen=True)
class Reading:
    """Convention of a network: time, output, scales of data and noise, and pairs of labels."""

    time: str = "t"
    output: str = "velocity"
    data_scale: float = 1.0
    noise_scale: float = 1.0
    labels: tuple[tuple[int, int], ...] = ()

    @property
    def scaled(self) -> bool:
        """True if noise or data of the network have another scale."""
        return (self.data_scale, self.noise_scale) != (1, 1)


class Read:
    """A network under a reading, as a velocity.

    Args:
        network: The network.
        reading: The reading.
        path: The path of the flow.
    """

    def __init__(self, network: Watched, reading: Reading, path: Path) -> None:
        self.network, self.reading, self.path = network, reading, path
        if reading == Reading():
            self.bind = network.bind

    def __call__(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """Return the velocity ``(B, *)``."""
        reading = self.reading
        if reading.labels:
            cond = relabel(cast(Tensor, cond), reading.labels)
        if not reading.scaled:
            output = self.network(x, TIMES[reading.time](t), cond)
            return as_velocity(reading.output, output, x, t, self.path)
        return self._rescaled(x, t, cond)

    def _rescaled(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the velocity by a network of noise ``s x0`` and data ``c x1``.

        The state ``x_t = a x1 + b x0`` is, but for a factor ``k``, that of the network at the time
        ``t'`` with ``a'/b' = a s / (b c)``. The network's velocity there gives the ends of the
        path, and these the velocity here.
        """
        path: Any = self.path
        c, s = self.reading.data_scale, self.reading.noise_scale
        t = t.clamp(FIRST, LAST)
        own = _time_of_ratio(path, t, s / c)
        here, there = (coefficients(path, value, x) for value in (t, own))
        state = x * (there.b * s / here.b)
        inner = Reading(self.reading.time, self.reading.output)
        v = Read(self.network, inner, path)(state.to(x.dtype), own, cond)
        divisor = there.da * there.b - there.a * there.db
        x1 = (there.b * v - there.db * state) / divisor / c
        x0 = (there.da * state - there.a * v) / divisor / s
        return (here.da * x1 + here.db * x0).to(x.dtype)


def as_velocity(output: str, value: Tensor, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """Return the velocity of an output, one of `OUTPUTS`; near an end the divisor is bounded."""
    if output == "velocity":
        return value
    if output == "negated velocity":
        return -value
    a, b, da, db = coefficients(path, t.clamp(FIRST, LAST), x)
    slope = da * b - a * db
    if output == "data":
        return ((slope * value + db * x) / b).to(x.dtype)
    return ((da * x - slope * value) / a).to(x.dtype)


def coefficients(path: Path, t: Tensor, x: Tensor) -> Coefficients:
    """Return the coefficients at ``t (B,)`` in the shape of ``x (B, *)``."""
    found = cast(Interpolant, path).coefficients(t)
    return Coefficients(*(expand_like(value, x) for value in found))


def _time_of_ratio(path: Any, t: Tensor, factor: float) -> Tensor:
    """Return the times at which ``a / b`` is ``factor`` times its value at ``t``."""
    here = path.coefficients(t.double())
    wanted = here.a / here.b * factor
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
    for _ in range(24):
        middle = (low + high) / 2
        now = path.coefficients(middle)
        below = now.a < wanted * now.b
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).to(t.dtype)


class Search:
    """Search for the reading that explains examples best.

    Losses weigh times by ``(t (1 − t))²``, so that divisions near the ends do not decide. Another
    reading must be better by more than 5 standard errors and by a tenth of the loss.

    Args:
        network: The network.
        examples: The examples.
        path: The path of the flow.
        generator: Draws the halves of the search for labels.
        plain: Outputs of the network for the examples.
        x1: The data ``(N, *)``.

    Attributes:
        shares: Explained shares of the targets' energy by readings of time and output.
    """

    def __init__(
        self,
        network: Watched,
        examples: Examples,
        path: Path,
        generator: torch.Generator,
        plain: Tensor,
        x1: Tensor,
    ) -> None:
        self.network, self.examples, self.path = network, examples, path
        self.plain, self.x1 = plain, x1
        self.generator = generator
        self.weight = (examples.t * (1 - examples.t)).square()
        self.shares: dict[Reading, float] = {}
        self.label_gain = 0.0

    def best(self) -> Reading:
        """Return the best reading.

        Each round takes the one change that lowers the loss most: of time and output, of a scale,
        or of labels. So a fault of labels is not taken for one of time.
        """
        reading, searches = Reading(), [self._convention, self._scale, self._labels]
        for _ in range(3):
            losses = self.losses(reading)
            found = [search(reading, losses) for search in searches]
            changed = [one for one in found if one != reading]
            if not changed:
                break
            reading = min(changed, key=lambda one: self.mean(self.losses(one)))
        return reading

    def losses(self, reading: Reading, rows: slice = slice(None)) -> Tensor:
        """Return the losses of the first examples under a reading; infinite for NaN."""
        part = self.examples.some(rows)
        return squares(self.velocities(reading, rows) - part.u).nan_to_num(nan=torch.inf)

    def velocities(self, reading: Reading, rows: slice = slice(None)) -> Tensor:
        """Return the velocities of the first examples under a reading."""
        if reading == Reading():
            return self.plain[rows]
        part = self.examples.some(rows)
        read = Read(self.network, reading, self.path)
        return Watched(read).outputs(part.x_t, part.t, part.cond)

    def mean(self, loss: Tensor) -> float:
        """Return the weighted mean of the losses of the first examples."""
        weight = self.weight[: len(loss)].double()
        return ((weight * loss).sum() / weight.sum()).item()

    def _is_better(self, loss: Tensor, now: Tensor) -> bool:
        if not bool(loss.isfinite().all()):
            return False
        gain = mean_of(now - loss, self.examples.pair, self.weight)
        return gain.z > SIGMAS and self.mean(loss) < BETTER * self.mean(now)

    def _convention(self, reading: Reading, now: Tensor) -> Reading:
        """Return the reading with the best time and output.

        Of several with nearly the same loss the first of the list is taken: they differ in nothing
        that the examples could show.
        """
        if reading.scaled or (reading.time, reading.output) != ("t", "velocity"):
            return reading
        x, t, u, cond, _ = self.examples
        cond = relabel(cast(Tensor, cond), reading.labels) if reading.labels else cond
        noiseless = isinstance(self.path, Interpolant) and not self.path.sigma
        losses: dict[Reading, Tensor] = {}
        for name, change in TIMES.items():
            try:
                known = name == "t" and not reading.labels
                value = self.plain if known else self.network.outputs(x, change(t), cond)
            except Exception:
                continue  # the network refuses such times: it was not trained on them
            for kind in OUTPUTS if noiseless else OUTPUTS[:2]:
                loss = self._loss_of(kind, value)
                losses[replace(reading, time=name, output=kind)] = loss.nan_to_num(nan=torch.inf)
        means = {one: self.mean(loss) for one, loss in losses.items()}
        energy = self.mean(squares(u))
        self.shares = {one: 1 - loss / energy for one, loss in means.items()} | self.shares
        best = next(one for one in means if means[one] <= (1 + CLOSE) * min(means.values()))
        return best if self._is_better(losses[best], now) else reading

    def _loss_of(self, kind: str, value: Tensor) -> Tensor:
        """Return the losses of all outputs ``value`` of a kind, few rows at once."""
        x, t, u, _, _ = self.examples
        rows = zip(*(each.split(SMALL) for each in (value, x, t, u)), strict=True)
        return torch.cat(
            [squares(as_velocity(kind, v, x, t, self.path) - u) for v, x, t, u in rows]
        )

    def _scale(self, reading: Reading, now: Tensor) -> Reading:
        """Return the reading with the best scales of data or noise.

        The network may have seen data ``c x1`` or noise ``s x0``. Scales from 1/32 to 32 are tried,
        an octave apart, then finer ones around the best. A scale within 15 % of 1 counts as 1. And
        the scale must explain all: if a simple correction still removes a tenth of the loss, the
        network has learnt badly, and another scale only damps that.
        """
        if reading.scaled or not isinstance(self.path, Interpolant) or self.path.sigma:
            return reading

        def of(scales: tuple[float, float]) -> Reading:
            return replace(reading, data_scale=scales[0], noise_scale=scales[1])

        def pair(scale: float, place: int) -> tuple[float, float]:
            return (1.0, scale) if place else (scale, 1.0)

        def loss(scales: tuple[float, float], rows: slice) -> float:
            return self.mean(self.losses(of(scales), rows))

        def refined(best: tuple[float, float], rows: slice) -> tuple[float, float]:
            place = int(best[0] == 1)  # the scale of data, or that of noise
            for step in (2**0.5, 2**0.25, 2**0.125, 2**0.0625):
                near = [pair(best[place] * factor, place) for factor in (1, step, 1 / step)]
                best = min(near, key=lambda scales: loss(scales, rows))
            return best

        few, everything = slice(FEW), slice(None)
        starts = [min((pair(s, k) for s in SCALES), key=lambda one: loss(one, few)) for k in (0, 1)]
        best = min((refined(one, few) for one in starts), key=lambda one: loss(one, everything))
        far = max(max(scale, 1 / scale) for scale in best) > NEAR
        if not (far and self._is_better(self.losses(of(best)), now)):
            return reading
        found = of(refined(best, everything))
        v = self.velocities(found)
        left = fit_of(v, self.examples, self.x1, self.path, self.generator).total
        return found if left.value < ENOUGH else reading

    def _labels(self, reading: Reading, now: Tensor) -> Reading:
        """Return the reading with the best labels.

        All labels of an example are tried, or for more than 20 labels the next and the one before.
        One half of the pairs chooses the best label of each class, the other half measures it.
        """
        cond = self.examples.cond
        if reading.labels or not is_labels(cond):
            return reading
        early = (self.examples.t < EARLY).nonzero()[:ROWS, 0]
        part, pair = self.examples.some(early), self.examples.pair[early]
        given, network = cast(Tensor, part.cond), Read(self.network, reading, self.path)
        labels = cast(Tensor, cond).unique()
        place = torch.searchsorted(labels, given)

        def loss(cond: Tensor) -> Tensor:
            return squares(Watched(network).outputs(part.x_t, part.t, cond) - part.u)

        plain = loss(given)
        if len(labels) <= MOST:
            losses = torch.stack([loss(torch.full_like(given, int(k))) for k in labels], 1)
            order = torch.randperm(self.examples.pairs, generator=self.generator).to(pair.device)
            tested = (order < self.examples.pairs / 2)[pair]
            sums = losses.new_zeros(len(labels), len(labels))
            better = sums.index_add(0, place[~tested], losses[~tested]).argmin(1)
            found = losses.gather(1, better[place][:, None])[:, 0]
        else:
            shifts = [torch.arange(len(labels), device=pair.device).roll(by) for by in (-1, 1)]
            tries = [(loss(labels[shift[place]]), shift) for shift in shifts]
            found, better = min(tries, key=lambda one: one[0].mean().item())
            tested = torch.ones_like(pair, dtype=torch.bool)
        gain = mean_of((plain - found)[tested], pair[tested])
        share = gain.value / plain.mean().item()
        self.label_gain = max(share, 0.0) if reading == Reading() else self.label_gain
        if not (gain.z > SIGMAS and share > 0.01):
            return reading
        pairs = zip(labels.tolist(), labels[better].tolist(), strict=True)
        return replace(reading, labels=tuple((int(a), int(b)) for a, b in pairs))


def is_labels(cond: Cond) -> bool:
    """Return True for integer labels ``(B,)`` with at least two different values."""
    if not isinstance(cond, Tensor) or cond.ndim != 1 or cond.dtype == torch.bool:
        return False
    return not (cond.is_floating_point() or cond.is_complex()) and len(cond.unique()) > 1


def relabel(labels: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """Return labels ``(B,)`` replaced by others; those without a new one stay."""
    found = labels.clone()
    for label, other in pairs:
        found[labels == label] = other
    return found
