"""The lines on the convention of a network, by the reading that explains it best."""

from flowkit.diagnosis.findings import Finding, line, percent
from flowkit.diagnosis.readings import Reading, Search, is_labels
from flowkit.paths import Interpolant


def conventions(search: Search, reading: Reading) -> list[Finding]:
    """Return the lines on time, output, scales and labels."""
    lines = [_time(search, reading), _output(reading)]
    if isinstance(search.path, Interpolant):
        lines.append(_scale(reading))
    if is_labels(search.examples.cond):
        lines.append(_labels(search, reading))
    return lines


def _time(search: Search, reading: Reading) -> Finding:
    """Return the line on the time that the network is told."""
    plain = search.shares[Reading()]
    of_time = [share for one, share in search.shares.items() if one.time == "1 − t"]
    figure = f"explained {plain:.2f} as it is"
    if reading.time != "t":
        figure += f", {_share(search, reading):.2f} as {reading.output} at time {reading.time}"
    elif of_time:
        figure += f", {max(of_time):.2f} with time reversed"
    advice = f"tell the network {reading.time} as its time"
    if _turned(reading):
        scale = ", time_scale=1000" if "1000" in reading.time else ""
        advice = f"wrap it: flowkit.adapters.from_reversed_time(network{scale})"
    return line("time direction", reading.time != "t", figure, advice)


def _share(search: Search, reading: Reading) -> float:
    """Return the explained share of the targets' energy under a reading."""
    energy = search.mean(search.examples.u.double().square().flatten(1).mean(1))
    return 1 - search.mean(search.losses(reading)) / energy


def _turned(reading: Reading) -> bool:
    """Return True for the convention of ``noise − data`` over the noise level ``1 − t``."""
    return reading.output == "negated velocity" and reading.time in ("1 − t", "1000 (1 − t)")


def _output(reading: Reading) -> Finding:
    """Return the line on the output."""
    advice = "negate the output: flowkit's velocity goes from noise to data"
    if reading.output in ("data", "noise"):
        adapter = f"flowkit.adapters.{reading.output.title()}Prediction"
        advice = f"it predicts the {reading.output}: wrap it in {adapter}"
    wrong = reading.output != "velocity" and not _turned(reading)
    return line("output", wrong, reading.output if wrong else "velocity", advice)


def _scale(reading: Reading) -> Finding:
    """Return the line on the scales of noise and data."""
    c, s = reading.data_scale, reading.noise_scale
    figure, advice = "that of noise and data", ""
    if c != 1:
        figure = f"fits data times {c:.2g}, not these"
        advice = "scale the data before the flow (latents: the scale of the autoencoder), and "
        advice += "divide samples by it"
    elif s != 1:
        figure = f"fits noise times {s:.2g}, not this"
        advice = f"start from noise of std {s:.2g}, or train with noise of std 1"
    return line("input scale", (c, s) != (1, 1), figure, advice)


def _labels(search: Search, reading: Reading) -> Finding:
    """Return the line on labels."""
    figure = f"other labels would lower the loss by {percent(search.label_gain)}"
    advice = f"the network knows the classes by other numbers: {_words(dict(reading.labels))}"
    return line("labels", bool(reading.labels), figure, advice)


def _words(mapped: dict[int, int]) -> str:
    """Describe a map of labels: a shift, or the first labels that change."""
    labels, others = list(mapped), list(mapped.values())
    for by in (1, -1):
        if others == [labels[(k + by) % len(labels)] for k in range(len(labels))]:
            return f"each is {'the next' if by == 1 else 'the one before'}; count from the same 0"
    changed = [f"{label} is {other}" for label, other in mapped.items() if label != other]
    return f"{', '.join(changed[:4])}{' ...' if len(changed) > 4 else ''}; compare the class lists"
