"""Lines on solves of a flow: order, steps, round trip, precision, samples, guidance."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from flowkit.diagnosis.examples import rms
from flowkit.diagnosis.findings import Finding, line, percent
from flowkit.sampling import ODESampler
from flowkit.types import Cond, take
from flowkit.velocity import Velocity

STEPS = (1, 2, 4, 8, 16, 32)
SOLVED, DRAWN = 32, 256  # samples of the lines on accuracy, of the lines on samples
DRAWS = (50, 950)  # of what chance gives: at first, and if these do not decide


@dataclass(frozen=True, eq=False)
class Solves:
    """Solves of one flow by Heun's method.

    Differences of end points are medians over samples of the RMS difference, in standard deviations
    of the data. The median stands for a typical sample: near the border between two modes of the
    data, any small difference ends in another mode.

    Args:
        velocity: The velocity.
        x0: Source samples ``(N, *)``.
        x1: Data ``(N, *)``.
        cond: Their conditions.
        span: First and last time.
    """

    velocity: Velocity
    x0: Tensor
    x1: Tensor
    cond: Cond
    span: tuple[float, float] = (0.0, 1.0)

    def sampler(self, steps: int) -> ODESampler:
        """Return a sampler with uniform steps."""
        return ODESampler(torch.linspace(*self.span, steps + 1, dtype=torch.float64), "heun")

    @cached_property
    def spread(self) -> float:
        """Return the standard deviation of the data, all elements together."""
        return self.x1.double().std().item()

    @cached_property
    def ends(self) -> dict[int, Tensor]:
        """Return the end points of 32 samples by the number of steps."""
        few = slice(SOLVED)
        x0, cond = self.x0[few], take(self.cond, few)
        return {n: self.sampler(n)(self.velocity, x0, cond) for n in STEPS}

    def change(self, a: Tensor, b: Tensor) -> float:
        """Return the difference of end points; infinite if one is not finite."""
        found = (rms(a.double() - b.double()).median() / self.spread).item()
        return found if math.isfinite(found) else math.inf

    def samples(self, velocity: Velocity) -> Tensor:
        """Draw up to 256 samples in 12 steps, of this or another velocity."""
        rows = slice(DRAWN)
        return self.sampler(12)(velocity, self.x0[rows], take(self.cond, rows))


def check_order(solves: Solves) -> Finding:
    """Look at how the end points change as steps are halved: to a quarter for Heun's method."""
    ends = solves.ends
    coarse, fine = (solves.change(ends[n], ends[2 * n]) for n in STEPS[-3:-1])
    if not math.isfinite(fine):
        return line("order", True, "end points are not finite", "the velocity is not bounded")
    order = math.inf if fine <= 1e-6 else math.log2(max(coarse, 1e-12) / fine)
    figure = f"solved up to rounding, {percent(fine)}"
    if math.isfinite(order):
        figure = f"{order:.1f} (Heun has 2); 16 and 32 steps differ by {percent(fine)}"
    return line(
        "order",
        fine > 0.01 and order < 0.7,
        figure,
        "more steps bring no more accuracy, since the velocity jumps in time or space (whole "
        "timesteps, a clamp, high frequencies of an untrained time embedding): make it smooth",
    )


def check_steps(solves: Solves) -> Finding:
    """Find the number of Heun steps with an end-point error of 1 %.

    The errors are those against an extrapolation of 16 and 32 steps (Richardson).
    """
    ends = solves.ends
    best = ends[32] + (ends[32] - ends[16]) / 3
    errors = {n: solves.change(ends[n], best) for n in STEPS}
    enough = next((n for n in STEPS if errors[n] <= 0.01), None)
    figure = f"{enough} Heun steps, {2 * enough} calls" if enough else "above 32 Heun steps"
    return line(
        "steps for 1 %",
        enough is None,
        f"{figure}; error of 8 steps {percent(errors[8])}",
        "the flow is stiff: find a grid with flowkit boss, straighten the flow, or bound the "
        "velocity near the ends",
    )


def check_round_trip(solves: Solves) -> Finding:
    """Carry data to noise and back, in 16 steps each."""
    few, sampler = slice(SOLVED), solves.sampler(16)
    x1, cond = solves.x1[few], take(solves.cond, few)
    noise = back = sampler.invert(solves.velocity, x1, cond).x
    if bool(noise.isfinite().all()):
        back = sampler(solves.velocity, noise, cond)
    error = solves.change(back, x1)
    return line(
        "round trip",
        error > 0.1,
        f"error {percent(error)}, noise of std {noise.double().std().item():.2f}",
        "inversion, edits and likelihoods are not to be trusted: take more steps, or a grid that "
        "ends before t = 1 if the velocity is steep there",
    )


def check_precision(solves: Solves) -> Finding:
    """Solve in bfloat16, and compare the end points with those in float32."""
    few = slice(SOLVED)
    x0, cond, sampler = solves.x0[few], take(solves.cond, few), solves.sampler(16)
    with torch.autocast(x0.device.type, torch.bfloat16):
        try:
            half = sampler(solves.velocity, x0.bfloat16(), cond)
        except (RuntimeError, TypeError):  # some layers take only the type of their weights
            half = sampler(solves.velocity, x0, cond)
    change = solves.change(half, solves.ends[16])
    error = solves.change(solves.ends[8], solves.ends[16])
    return line(
        "bfloat16",
        change > 0.05,
        f"moves samples by {percent(change)}; 8 in place of 16 steps by {percent(error)}",
        "keep float32: a layer loses digits (large sums, times or states far from 1); compute that "
        "layer in float32",
    )


class Distance(NamedTuple):
    """Energy distance of two sets as a share of its largest value, with what chance gives."""

    share: float
    mean: float
    most: float


def distance_of(a: Tensor, b: Tensor, generator: torch.Generator) -> Distance:
    """Return the energy coefficient ``(2 E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖) / (2 E‖a − b‖)``.

    It lies in [0, 1]. Chance is 1000 random exchanges between both sets: two sets of one population
    exceed the largest of these once in 1001 times.

    Source: Székely & Rizzo 2013, *Energy statistics: a class of statistics based on distances*.
    """
    points = torch.cat([a, b]).flatten(1).double()
    far = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    sign = far.new_full((len(points),), 1 / len(a))
    sign[len(a) :] = -1 / len(b)
    between = 2 * far[: len(a), len(a) :].mean()

    def shares(draws: int) -> Tensor:
        orders = torch.rand(draws, len(points), generator=generator).argsort(1)
        signs = sign[orders.to(sign.device)]
        return -((signs @ far) * signs).sum(1) / between

    found, chance = (-(sign @ far @ sign) / between).item(), shares(DRAWS[0])
    if found > chance.max():  # else more draws cannot change the answer
        chance = torch.cat([chance, shares(DRAWS[1])])
    return Distance(found, chance.mean().item(), chance.max().item())


def check_samples(drawn: Tensor, solves: Solves, generator: torch.Generator) -> Finding:
    """Compare samples with the data: standard deviation and energy distance."""
    real = solves.x1[:DRAWN]
    if not bool(drawn.isfinite().all()):
        bad = (~drawn.isfinite()).flatten(1).any(1).double().mean().item()
        return line(
            "samples", True, f"{percent(bad)} are not finite", "the velocity is not bounded"
        )
    found = distance_of(drawn, real, generator)
    excess = found.share - found.mean
    ratio = drawn.double().std().item() / real.double().std().item()
    return line(
        "samples",
        found.share > found.most and excess > 0.01,
        f"std {ratio:.2f} of the data's; energy distance {percent(found.share)} of its largest, "
        f"{percent(found.mean)} by chance",
        # The lines on the loss see neither, and their alarms come before.
        "train longer, or look at what the network does at the ends of the time",
    )


def check_guidance(guided: Tensor, plain: Tensor, x1: Tensor) -> Finding:
    """Compare guided samples with plain ones: spread, and the share of elements out of range."""
    low, high = x1.min(), x1.max()
    margin = 0.1 * (high - low)

    def outside(x: Tensor) -> float:
        within = (x >= low - margin) & (x <= high + margin)  # false for NaN
        return 1 - within.double().mean().item()

    most, before = outside(guided), outside(plain)
    ratio = (guided.double().std() / plain.double().std()).item()
    return line(
        "guidance",
        most > before + 0.02 or not ratio < 1.5,
        f"{percent(most)} of the numbers leave the data's range, {percent(before)} without "
        f"guidance; std {ratio:.2f} of that without",
        "the scale is too large: lower it, or guide in an interval of times",
    )
