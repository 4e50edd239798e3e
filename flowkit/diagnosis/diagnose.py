"""The diagnosis: all lines, the cause before what follows from it."""

import torch
from torch import Tensor

from flowkit.checks import check_at_least, check_finite, check_same_shape, check_samples
from flowkit.diagnosis import conditions, fits, solves
from flowkit.diagnosis.conventions import conventions
from flowkit.diagnosis.examples import Examples, Watched, draw_examples, rms
from flowkit.diagnosis.findings import Finding, line, percent
from flowkit.diagnosis.readings import Read, Reading, Search
from flowkit.paths import Linear, Path
from flowkit.types import Cond, per_sample, take
from flowkit.velocity import Velocity

FEWEST = 32
# What may follow from an alarm.
FOLLOWING = {
    "progress": ("training", "conditions", "samples", "order", "steps for 1 %", "round trip"),
    "repeatable": ("training", "order", "steps for 1 %", "round trip", "bfloat16"),
    "data range": ("input scale", "training", "loss over t", "samples", "round trip"),
    "averaged weights": ("training", "loss over t", "samples"),
    "loss over t": ("samples", "order", "steps for 1 %", "round trip", "bfloat16"),
    "training": ("conditions", "samples", "order", "steps for 1 %", "round trip", "bfloat16"),
    "samples": ("round trip",),
    "order": ("steps for 1 %", "round trip"),
    "steps for 1 %": ("round trip",),
}


@torch.no_grad()
def diagnose(
    velocity: Velocity,
    x0: Tensor,
    x1: Tensor,
    cond: Cond = None,
    *,
    path: Path = Linear(),
    raw: Velocity | None = None,
    guided: Velocity | None = None,
    generator: torch.Generator | None = None,
) -> list[Finding]:
    """Look for what is wrong with a velocity: its convention, its training and its solves.

    The test of the convention rests on one fact. On the path ``x_t = a(t) x1 + b(t) x0`` with
    ``u = dx_t/dt``, the velocity ``E[u | x_t, cond]`` minimizes

        E ‖f(x_t, t, cond) − u‖²

    over all functions ``f``. So no reading of a trained network, with its time reversed, its output
    taken for data or noise, or its input scaled, is better than the network as it is. A reading
    that is better by more than 5 standard errors and a tenth of the loss tells what is wrong, and
    the lines that follow are those of the network so read. For the same reason, nothing that is
    known without the network may explain the residual ``u − f``; what does, training has missed.

    Alarms come first, and of these the cause before what follows from it. Errors are those of means
    over pairs; 192 sound networks had no alarm. The network sees 25 000 to 40 000 rows in 330 to
    450 calls, whatever the number of samples up to 500. Nothing is trained. Memory is about 6
    times that of 1024 to 1500 states, beside that of the network.

    Args:
        velocity: The network, called as ``velocity(x, t, cond)``.
        x0: Source samples ``(N, *)``, at least 32; row ``i`` belongs to ``x1[i]`` if training pairs
            them, else they are independent noise.
        x1: Data ``(N, *)`` that the training has not seen, as states of the flow.
        cond: Their conditions; labels ``(N,)`` are tested for shifts.
        path: The path of the training.
        raw: The velocity of the raw weights, if ``velocity`` has averaged ones.
        guided: The velocity under guidance.
        generator: Draws times and permutations, on the CPU. None stands for a fixed seed.

    Returns:
        The findings. Those on conditions, raw weights and guidance are there if these are given.

    Raises:
        TypeError: If samples are not tensors of floats.
        ValueError: If shapes differ, there are fewer than 32 samples, a value is not finite, all
            data are equal, or the network fails on such input.

    >>> from flowkit.exact import GaussianFlow
    >>> flow = GaussianFlow(2.0, 0.5)
    >>> x0 = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> x1 = flow.solution(x0[torch.arange(200) - 1])
    >>> [finding.name for finding in diagnose(flow, x0, x1) if not finding.ok]
    []
    >>> wrong = diagnose(lambda x, t, cond: flow(x, 1 - t), x0, x1)
    >>> wrong[0].name, wrong[0].ok
    ('time direction', False)
    """
    network = Watched(velocity)
    cond = _checked(network, x0, x1, cond)
    generator = generator or torch.Generator().manual_seed(0)
    examples = draw_examples(x0, x1, cond, path, generator)
    plain = network.outputs(examples.x_t, examples.t, examples.cond)
    values, span = _values(network, examples, plain)
    if not values.ok and span == (0, 0):
        return [values]
    found = [values, _repeatable(network, examples), _range(x0, x1)]
    search = Search(network, examples, path, generator, plain, x1)
    reading = search.best()
    found += conventions(search, reading)
    read = Read(network, reading, path)

    if conditions.differs(cond):
        found.append(conditions.check_conditions(read, examples, x1, cond, generator))

    v = search.velocities(reading)
    if raw is not None and reading == Reading():
        other = Watched(raw).outputs(examples.x_t, examples.t, examples.cond)
        raw_fit = fits.fit_of(other.nan_to_num(), examples, x1, path, generator)
        learnt = fits.check_training(raw_fit).ok
        found.append(fits.check_averaged(v, other, examples, learnt))
    fit = fits.fit_of(v, examples, x1, path, generator)
    found += [fits.check_times(fit), fits.check_training(fit)]

    flow = solves.Solves(read, x0, x1, cond, span)
    drawn = flow.samples(read)
    found.append(solves.check_samples(drawn, flow, generator))
    if guided is not None and reading == Reading():
        found.append(solves.check_guidance(flow.samples(guided), drawn, x1))
    checks = (solves.check_order, solves.check_steps, solves.check_round_trip)
    found += [check(flow) for check in (*checks, solves.check_precision)]
    return ordered(found)


def ordered(found: list[Finding]) -> list[Finding]:
    """Return findings with the alarms first, and before others those that they may follow from.

    The advice of an alarm that may follow from another one is to mend that one first.

    >>> found = ordered([Finding("order", False, "", "a"), Finding("training", False, "", "b")])
    >>> [(one.name, one.advice) for one in found]
    [('training', 'b'), ('order', 'may follow from training: mend that first')]
    """
    alarms = {one.name for one in found if not one.ok}
    causes = {
        one.name: next((c for c in FOLLOWING if c in alarms and one.name in FOLLOWING[c]), None)
        for one in found
    }

    def place(one: Finding) -> int:
        return 2 if one.ok else int(causes[one.name] is not None)

    return sorted(
        (
            one._replace(advice=f"may follow from {causes[one.name]}: mend that first")
            if place(one) == 1
            else one
            for one in found
        ),
        key=place,
    )


def _checked(network: Watched, x0: Tensor, x1: Tensor, cond: Cond) -> Cond:
    """Check the input, and call the network once; return a row of conditions per sample."""
    for name, x in (("x0", x0), ("x1", x1)):
        check_samples(x, name, floating=True)
    check_same_shape(x0, x1)
    check_at_least(len(x1), FEWEST, "the number of samples")
    for name, x in (("x0", x0), ("x1", x1)):
        check_finite(x, name)
    if not bool((x1 != x1[:1]).any()):
        raise ValueError(f"x1 must hold different samples, got {len(x1)} equal ones")
    cond = per_sample(cond, len(x1))
    t = torch.full((2,), 0.5, dtype=x1.dtype, device=x1.device)
    try:
        found = network(x1[:2], t, take(cond, slice(2)))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"velocity must be callable as velocity(x, t, cond) with x {_shape(x1)}, t (B,) and "
            f"cond {_kind(cond)}, got {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(found, Tensor):
        raise TypeError(f"velocity must return a tensor, got {type(found).__name__}")
    check_same_shape(found, x1[:2], ("velocity(x, t, cond)", "x"))
    return cond


def _shape(x: Tensor) -> str:
    return f"(B, {', '.join(map(str, x.shape[1:]))})"


def _kind(cond: Cond) -> str:
    if isinstance(cond, Tensor):
        return f"of {cond.dtype} in shape {tuple(cond.shape)}"
    return "None" if cond is None else f"of {', '.join(cond)}"


def _values(
    network: Watched, examples: Examples, inside: Tensor
) -> tuple[Finding, tuple[float, float]]:
    """See whether the velocity is finite, also at the very ends of the time.

    Returns:
        The finding, and the times between which solves are possible; (0, 0) if there are none.
    """
    x, t, _, cond, _ = examples
    bad = (~inside.isfinite()).flatten(1).any(1)
    advice = "look at divisions by t or 1 − t, logarithms and roots in the network"
    if bool(bad.any()):
        low, high = t[bad].min().item(), t[bad].max().item()
        figure = f"{percent(bad.double().mean().item())} of {len(t)} velocities are not finite, "
        return line("values", True, f"{figure}at t from {low:.2f} to {high:.2f}", advice), (0, 0)
    span, wrong = [0.0, 1.0], []
    for k, end in enumerate((0.0, 1.0)):
        few = slice(32)
        try:
            fine = network(x[few], torch.full_like(t[few], end), take(cond, few)).isfinite().all()
        except Exception:
            fine = False
        if not bool(fine):
            wrong.append(f"t = {end:g}")
            span[k] = abs(end - 1e-3)
    figure = f"finite in {len(t)} states" + (f", not at {' and '.join(wrong)}" if wrong else "")
    more = f"{advice}; the lines on solves here use {span[0]:g} to {span[1]:g}"
    return line("values", bool(wrong), figure, more), (span[0], span[1])


def _repeatable(network: Watched, examples: Examples) -> Finding:
    """Call the network twice with the same input."""
    part = examples.some(torch.arange(min(64, len(examples.t)), device=examples.t.device))
    first, second = (network(part.x_t, part.t, part.cond).double() for _ in range(2))
    change = (rms(first - second).mean() / rms(first).mean().clamp_min(1e-12)).item()
    return line(
        "repeatable",
        change > 1e-3,
        f"two equal calls differ by {percent(change)}",
        "the network draws random numbers: call velocity.eval(), which turns off dropout",
    )


def _range(x0: Tensor, x1: Tensor) -> Finding:
    """Compare the spread of the data with that of the source."""
    mean, std = x1.double().mean().item(), x1.double().std().item()
    ratio = (mean**2 + std**2) ** 0.5 / x0.double().std().item()
    return line(
        "data range",
        not 1 / 20 < ratio < 20,
        f"mean {mean:.3g}, std {std:.3g}, from {x1.min():.3g} to {x1.max():.3g}; "
        f"noise of std {x0.double().std().item():.3g}",
        "scale the data to a std near 1 (images to [-1, 1]): with this ratio r of noise and data, "
        "nearly all is decided while t is of the order of r, or 1 − t is",
    )
