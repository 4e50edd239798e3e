"""Why two records of evaluations differ: their settings, and the size of what each setting does."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flowkit.runs.effects import EFFECTS, FEATURES, Range

Record = Mapping[str, Any]
CHANCE = "chance"


class Setting(NamedTuple):
    """A setting of an evaluation.

    Attributes:
        name: Its name in the table.
        find: Returns its value in a record; None where the record does not say.
        options: Options of ``flowkit evaluate samples=`` that give samples at hand the setting of a
            record. None for settings that samples at hand cannot change.
    """

    name: str
    find: Callable[[Record], Any]
    options: Callable[[Record], list[str]] | None = None


class Difference(NamedTuple):
    """A setting that differs between two records.

    Attributes:
        name: Name of the setting.
        first: Its value in the first record, as text.
        second: Its value in the second record.
        change: Range of what the setting adds to the number; None if that is not known.
        how: How the range was obtained.
    """

    name: str
    first: str
    second: str
    change: Range | None
    how: str

    @property
    def size(self) -> float:
        """The larger end of the range, without sign; what is not known comes last."""
        return -1.0 if self.change is None else max(map(abs, self.change))


def at(record: Record, *keys: str) -> Any:
    """Return an entry of a record, or None if there is no such entry."""
    found: Any = record
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _file(record: Record) -> str | None:
    """Return the format of the files of the samples, in words."""
    samples = at(record, "samples")
    if samples is None:
        return None
    kind, quality = samples.get("file_format"), samples.get("jpeg_quality")
    if quality is not None:
        return f"jpeg {quality}"
    return "lossless" if kind in (None, "png") else kind


def split_of(record: Record) -> tuple[str, str] | None:
    """Return the data and their split that the reference is, or None for other references."""
    data, _, split = str(at(record, "reference", "name")).rpartition(", ")
    return (data, split.removesuffix(" split")) if split.endswith(" split") else None


def splits_of(first: Record, second: Record) -> tuple[str, str] | None:
    """Return the splits that the references of two records are, if they are of the same data."""
    found = split_of(first), split_of(second)
    if found[0] is None or found[1] is None or found[0][0] != found[1][0]:
        return None
    return found[0][1], found[1][1]


def _resize(record: Record) -> str | None:
    """Return the resize of the images, in words."""
    if at(record, "samples") is None:
        return None
    found = at(record, "samples", "resize")
    if found is None:
        return "none"
    return f"{found['filter']} {'with' if found['antialias'] else 'without'} antialiasing"


def _resize_options(record: Record) -> list[str]:
    """Return the options of the resize of a record."""
    found = at(record, "samples", "resize")
    if found is None:
        return []
    names = {"resize": "size", "filter": "filter", "antialias": "antialias"}
    return [f"{option}={str(found[name]).lower()}" for option, name in names.items()]


def _quantization_options(record: Record) -> list[str]:
    """Return the option of the rule from floats to bytes of a record."""
    rule = at(record, "samples", "quantization")
    return [] if rule is None else [f"quantization={rule}"]


def _file_options(record: Record) -> list[str]:
    """Return the option of the files of a record."""
    quality = at(record, "samples", "jpeg_quality")
    return [] if quality is None else [f"jpeg={quality}"]


def _weights(record: Record) -> str | None:
    """Return kind, step and hash of the weights, in words."""
    found = at(record, "weights")
    return found and f"{found.get('kind')}, step {found.get('step')}, {found['hash'][:8]}"


def _steps(record: Record) -> int | None:
    """Return the number of steps of the sampler."""
    grid = at(record, "sampling", "grid")
    return grid and len(grid) - 1


NETWORK = Setting("feature network", lambda r: at(r, "metrics", "features", "hash"))
COUNT = Setting(
    "number of samples",
    lambda r: at(r, "metrics", "num_samples"),
    lambda r: [
        f"num_samples={at(r, 'metrics', 'num_samples')}",
        f"seed={at(r, 'samples', 'seed') or 0}",  # of their choice
    ],
)
REFERENCE = Setting(
    "reference",
    lambda r: at(r, "reference", "hash") or at(r, "metrics", "reference", "hash"),
    lambda r: [f"split={found[1]}"] if (found := split_of(r)) else [],
)
FILE = Setting("file format", _file, _file_options)
SEEN = (
    NETWORK,
    COUNT,
    REFERENCE,
    Setting("quantization", lambda r: at(r, "samples", "quantization"), _quantization_options),
    FILE,
    Setting("resize", _resize, _resize_options),
    Setting("shares of classes", lambda r: at(r, "samples", "classes")),
)
STEPS = Setting("steps", _steps)
DRAW = Setting(
    "draw",
    lambda r: (
        [at(r, "sampling", name) for name in ("seeds", "seeding")]
        if at(r, "sampling")
        else at(r, "samples", "name")
    ),
)
MADE = (
    Setting("weights", _weights),
    Setting("solver", lambda r: at(r, "sampling", "method")),
    STEPS,
    Setting("guidance", lambda r: at(r, "sampling", "guidance")),
)
"""Settings of the model and its sampler. With equal pixels they have no effect."""


def differences(first: Record, second: Record, value: str) -> list[Difference]:
    """Return the settings that differ, with the known sizes of their effects.

    Args:
        first: A record of ``flowkit evaluate``.
        second: Another one.
        value: Name of a number among the metrics of both.

    Returns:
        The differences, the largest effect first; those without a known size come last.
    """
    pixels = [at(record, "samples", "hash") for record in (first, second)]
    same = None not in pixels and pixels[0] == pixels[1]
    found: list[Difference] = []
    for setting in SEEN if same else SEEN + MADE:
        a, b = setting.find(first), setting.find(second)
        if a is not None and b is not None and differ(first, second, a, b):
            change, how = _size(setting.name, first, second, value, (a, b))
            shown = _shown(setting.name, first, a), _shown(setting.name, second, b)
            found.append(Difference(setting.name, *shown, change, how))
    other_images = {one.name for one in found} & {COUNT.name, REFERENCE.name}
    if other_images or not (same or same_draw(first, second)):
        chance = chance_of(first, second, value)
        change = None if chance is None else (-chance, chance)
        how = "not known" if chance is None else "intervals of both records"
        found.append(Difference(CHANCE, "", "", change, how))
    return by_size(found)


def same_draw(first: Record, second: Record) -> bool:
    """Say whether the images of two records come from the same draw of the same model."""
    return all(one.find(first) == one.find(second) for one in (DRAW, *MADE))


def by_size(found: list[Difference]) -> list[Difference]:
    """Sort differences: the largest first, those of no known size after them, chance last."""
    return sorted(found, key=lambda one: (one.name == CHANCE, -one.size))


def differ(first: Record, second: Record, a: Any, b: Any) -> bool:
    """Say whether two values differ; shares of classes by more than their draw explains."""
    if not isinstance(a, Mapping):
        return a != b
    counts = [COUNT.find(record) for record in (first, second)]
    pairs = [(a.get(name, 0.0), b.get(name, 0.0)) for name in {**a, **b}]
    return any(
        abs(p - q) > 4 * math.sqrt(max(p, q) * sum(1 / count for count in counts)) for p, q in pairs
    )


def _shown(name: str, record: Record, value: Any) -> str:
    """Return the value of a setting as text."""
    if name == NETWORK.name:
        return f"{at(record, 'metrics', 'features', 'name')} {value[:8]}"
    if name == REFERENCE.name:
        count = at(record, "metrics", "reference", "num_samples")
        return f"{at(record, 'reference', 'name') or value[:8]} ({count:,})"
    if isinstance(value, Mapping):
        return " ".join(f"{share:.3f}" for share in value.values())
    return str(value)


def chance_of(first: Record, second: Record, value: str) -> float | None:
    """Return the half width of the interval of the difference of two independent numbers.

    A Fréchet distance has the interval of its value without bias. None: a record has no interval.
    """
    name = "frechet_distance_unbiased" if value == "frechet_distance" else value
    ends = [at(record, "metrics", f"{name}_interval") for record in (first, second)]
    if any(pair is None for pair in ends):
        return None
    return math.hypot(*((high - low) / 2 for low, high in ends))


def _size(
    name: str, first: Record, second: Record, value: str, found: tuple[Any, Any]
) -> tuple[Range | None, str]:
    """Return the range of what a setting adds to a number, and how it was obtained."""
    if value == "frechet_distance_unbiased" and name == COUNT.name:
        return (0.0, 0.0), "without bias"
    if value != "frechet_distance":
        return None, "not known"
    if name == COUNT.name:
        bias = _bias(first, second, of_reference=False)
        return (None, "not known") if bias is None else ((bias, bias), "bias, in 1/N")
    if name == "weights":
        kinds = [str(one).partition(", ") for one in found]
        same_step = kinds[0][2].partition(",")[0] == kinds[1][2].partition(",")[0]
        found = (kinds[0][0], kinds[1][0]) if same_step else (None, None)
    added = 0.0
    if name == REFERENCE.name:
        found = splits_of(first, second) or (None, None)
        added = _bias(first, second, of_reference=True) or 0.0
    if name == STEPS.name and {at(r, "sampling", "method") for r in (first, second)} == {"euler"}:
        name = "Euler steps"
    levels, (a, b) = EFFECTS.get(name, {}), map(str, found)
    if a == b or not {a, b} <= levels.keys():
        return None, "not known"
    if at(first, "metrics", "features", "name") not in FEATURES:
        return None, "not known for these features"
    (low_a, high_a), (low_b, high_b) = levels[a], levels[b]
    number = at(first, "metrics", value)
    low, high = (1 + low_b) / (1 + high_a) - 1, (1 + high_b) / (1 + low_a) - 1
    return (low * number + added, high * number + added), "known range"


def _bias(first: Record, second: Record, of_reference: bool) -> float | None:
    """Return the change of the bias ``c (1/N + 1/M)`` of a Fréchet distance by another N or M."""
    biased, plain = (
        at(first, "metrics", name) for name in ("frechet_distance", "frechet_distance_unbiased")
    )
    counts = [
        (at(r, "metrics", "num_samples"), at(r, "metrics", "reference", "num_samples"))
        for r in (first, second)
    ]
    if plain is None or None in (*counts[0], *counts[1]):
        return None
    before, after = (1 / pair[of_reference] for pair in counts)
    return (biased - plain) * (after - before) / sum(1 / count for count in counts[0])


def verdict(first: Record, second: Record, value: str, found: list[Difference]) -> str:
    """Return one sentence that says whether what differs explains the difference of a number."""
    if any(one.name == NETWORK.name for one in found):
        return "not comparable: the numbers are of different feature networks"
    number, other = (at(record, "metrics", value) for record in (first, second))
    gap, slack = other - number, 1e-6 * (abs(number) + abs(other))
    told = f"the difference is {gap:+.4g}"
    known = [one.change for one in found if one.change is not None]
    unknown = [one.name for one in found if one.change is None]
    if not known and abs(gap) <= slack:
        return "nothing to explain: the numbers are equal"
    if not found:
        return f"not explained: {told}, and no setting differs"
    if not known:
        return (
            f"cannot be told from the records: {told}, and no size is known for {listed(unknown)}"
        )
    low, high = sum(change[0] for change in known), sum(change[1] for change in known)
    inside = low - slack <= gap <= high + slack
    if not unknown:
        said = "explained" if inside else "not explained"
        return f"{said} within the interval: {told}, what differs adds {in_words((low, high))}"
    said = "explained by what is known" if inside else "not explained by what is known"
    return (
        f"{said}: {told}, what is known adds {in_words((low, high))}; no size is known for "
        f"{listed(unknown)}"
    )


def in_words(change: Range) -> str:
    """Return a range of what a setting adds as text.

    >>> in_words((0.5, 0.5)), in_words((-0.25, 1))
    ('+0.5', '-0.25 to +1')
    """
    low, high = (f"{end:+.4g}" for end in change)
    return low if low == high else f"{low} to {high}"


def listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence.

    >>> listed(["steps"]), listed(["weights", "steps", "chance"])
    ('steps', 'weights, steps and chance')
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
