"""The model card of a shared model: ``README.md``, made from its records."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pydoc import locate
from typing import Any

import yaml

from flowkit.checks import check_choice
from flowkit.modules.listed import find
from flowkit.modules.pushed import asked
from flowkit.modules.trust import trusted

WORDS = {"w2": "W2", "w2_squared": "W2²", "c2st": "C2ST"}
NONE_GIVEN = "none-given"  # name of the license of a card without one
SKIPPED = ("neighbors", "num_reference", "num_samples")
DECIBELS = re.compile("si_sdr|log_mel_error|mcd|energy(_of_|$)")  # beginnings of their measures
COUNTS = {"num_mixtures": "test mixtures", "num_pairs": "test pairs", "episodes": "episodes"}
Record = Mapping[str, Any]

# What the hub calls models whose data have a command of their own, and arguments of this command.
USES = {
    "separate": ("audio-to-audio", 'audio=mix.wav query="piano"'),
    "convert": ("audio-to-audio", "audio=source.wav reference=voice.wav"),
    "rollout": ("robotics", ""),
}


def card(
    config: Record,
    place: str,
    license: str | None = None,
    metrics: Record | None = None,
    grids: Sequence[str] = (),
    picture: str | None = None,
) -> str:
    """Return the text of a model card, with the front matter that the hub reads.

    Args:
        config: Content of ``config.json``.
        place: Folder or ``hub:owner/name``, for the commands.
        license: License of the weights; with None the card says that none is given.
        metrics: Record of ``flowkit evaluate``.
        grids: Names of the files with grids.
        picture: How ``samples.png`` was drawn, in words; None without a picture.
    """
    parts = [_front(config, license), f"# {place.rpartition('/')[2].removeprefix('flowkit:')}"]
    if picture is not None:
        parts += ["![samples](samples.png)", picture]
    parts += [_about(config), "## Use", _use(config, place, grids, metrics)]
    parts += ["## Numbers", _numbers(config, metrics, place), "## License", _license(license)]
    return "\n\n".join(parts) + "\n"


def recipe_of(config: Record) -> str:
    """Return the command that uses a model: that of its data, see `flowkit.data.SplitData`.

    Raises:
        ValueError: If the class of the data, listed or trusted, names no such command.
    """
    name = str((config.get("data") or {}).get("_target_"))
    found = find(name) or (locate(name) if name in trusted() else None)
    recipe = getattr(found, "recipe", "sample")
    check_choice(recipe, ("sample", *USES), f"recipe of {name}")
    return recipe


def front_matter(about: Record) -> str:
    """Return the front matter of a page in Markdown, with texts quoted where YAML needs it.

    >>> print(front_matter({"license": "mine: all"}))
    ---
    license: 'mine: all'
    ---
    """
    text = yaml.safe_dump(dict(about), sort_keys=False, allow_unicode=True, width=10**9)
    return f"---\n{text.strip()}\n---"


def license_of(text: str) -> str | None:
    """Return the license in the front matter of a card; None if it gives none.

    >>> license_of(front_matter({"license": "mit"}) + "\\n\\n# mine")
    'mit'
    """
    found = re.match(r"---\n(.*?)\n---(\n|$)", text, re.DOTALL)
    try:
        about = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:  # of a card that was edited
        return None
    if not isinstance(about, dict) or about.get("license_name") == NONE_GIVEN:
        return None
    license = about.get("license")
    return None if license is None else str(license)


def _front(config: Record, license: str | None) -> str:
    """Return the front matter."""
    about: dict[str, Any] = {"library_name": "flowkit"}
    about |= {"license": "other", "license_name": NONE_GIVEN} if license is None else {}
    about |= {} if license is None else {"license": license}
    tag = "unconditional-image-generation" if len(config.get("image_shape") or ()) == 3 else None
    tag, _ = USES.get(recipe_of(config), (tag, ""))
    about |= {} if tag is None else {"pipeline_tag": tag}
    about["tags"] = ["flowkit", "flow-matching"]
    return front_matter(about)


def _license(license: str | None) -> str:
    """Return the words on the license."""
    if license is None:
        return "No license was given for these weights: ask their owner before you use them."
    return f"The weights have the license `{license}`."


def _about(config: Record) -> str:
    """Return a list of data, method and weights."""
    weights, node, data = config["weights"], config["module"], config.get("data") or {}
    record, sampler = config.get("data_record") or {}, config["sampler"]
    names = config.get("classes")
    classes = config.get("num_classes") or "none"
    if names:
        more = ", …" if len(names) > 100 else ""
        classes = f"{len(names)}: {', '.join(map(str, names[:100]))}{more}"
    step = "" if weights.get("step") is None else f" of step {weights['step']:,}"
    kind = record.get("kind") or _short(data.get("_target_")) or "not known"
    sizes = [f"{split['samples']:,} {name}" for name, split in record.get("splits", {}).items()]
    path = _short((node.get("path") or {}).get("_target_"))
    rows = {
        "data": kind + (f" ({', '.join(sizes)})" if sizes else ""),
        "classes": classes,
        "method": _short(node["_target_"]) + (f" on the path {path}" if path else ""),
        "network": _short((node.get("velocity") or {}).get("_target_")),
        "state": " × ".join(map(str, config["state"].get("sample_shape") or ["not known"])),
        "weights": f"{weights['kind']}{step}, stored as {weights['dtype']}",
        "default sampler": f"{sampler['method']}, {_steps(sampler['grid'])}",
        "guidance": _guidance(config.get("guidance")),
        "time": "0 is noise, 1 is data",
        "flowkit": config["flowkit"],
    }
    return "\n".join(f"- **{name}**: {value}" for name, value in rows.items())


def _use(config: Record, place: str, grids: Sequence[str], metrics: Record | None = None) -> str:
    """Return commands and Python."""
    recipe = recipe_of(config)
    if recipe != "sample":
        lines, arguments = [_measuring(config, place, metrics)], USES[recipe][1]
        if arguments:  # recordings need no data, but encoders
            encoders = (option for option in asked(config["data"]) if option.count(".") > 1)
            lines.append(f"flowkit {recipe} run={place} {arguments}{_paths(encoders)}")
        return _lines(lines, place)
    label = str((config.get("classes") or [""])[0])
    plain = re.fullmatch(r"[\w-]*", label)
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + (m[2] and r"\""), label)  # for Hydra
    chosen = f" labels=[{label}]" if plain else " " + shlex.quote(f'labels=["{escaped}"]')
    chosen = chosen if label else ""
    lines = [f"flowkit sample run={place}{chosen}"]
    lines += [_measuring(config, place, metrics)] if config.get("data") else []
    lines += [
        f"flowkit sample run={place} sampler=from_file sampler.grid.file=<folder>/{grid}"
        for grid in grids
    ]
    cond = f", cond=4 * [{json.dumps(label, ensure_ascii=False)}]" if label else ""
    return _lines(lines, place, f"\nimages = module.sample(4{cond})")


def _measuring(config: Record, place: str, metrics: Record | None) -> str:
    """Return the command that measures a model; a policy acts where its record says that it did."""
    recipe = recipe_of(config)
    if recipe == "rollout":
        acting = {"env": "...", "task": "..."} if metrics is None else metrics["acting"]
        given = (f"{name}={acting[name]}" for name in ("env", "task") if acting[name] is not None)
        return " ".join([f"flowkit rollout run={place}", *given])
    command = recipe.replace("sample", "evaluate")
    return f"flowkit {command} run={place}{_paths(asked(config.get('data')))}"


def _paths(options: Iterable[str]) -> str:
    """Return options with what to give in words."""
    words = {"data.root": "folder of the data"}
    return "".join(f" {option}=<{words.get(option, 'path')}>" for option in options)


def _lines(commands: Sequence[str], place: str, more: str = "") -> str:
    """Return commands, and Python that loads the model and does more."""
    return (
        "With flowkit, whose distribution is named `flowkit-fm`:\n\n```bash\n"
        + "\n".join(commands)
        + "\n```\n\n```python\nfrom flowkit.modules import load_run\n\n"
        + f'module = load_run("{place}"){more}\n```'
    )


def _numbers(config: Record, metrics: Record | None, place: str) -> str:
    """Return a table of numbers, and how they were obtained."""
    if metrics is None:
        return f"Not measured. `{_measuring(config, place, None)}` measures it."
    found, rows = _found(metrics), []
    floors = found.get("floor") or {}
    single = (metrics.get("sampling") or {}).get("num_samples") == 1
    for name, value in found.items():
        ends, floor = found.get(f"{name}_interval"), floors.get(name)
        if isinstance(value, Mapping) and {"value", "interval"} <= value.keys():
            value, ends = value["value"], value["interval"]
        if type(value) not in (int, float) or name in (*SKIPPED, *COUNTS):
            continue
        if name.endswith("_stderr"):  # stands beside its value
            continue
        if single and name.endswith("_best"):  # of one
            continue
        interval = "" if ends is None else " to ".join(f"{end:.4g}" for end in ends)
        if (error := found.get(f"{name}_stderr")) is not None:
            interval = f"± {error:.2g}"
        mark = " (unreliable)" if name in (found.get("unreliable") or ()) else ""
        real = "" if floor is None else f"{floor:.4g}"
        row = f"| {_named(name, found)}{mark} | {value:.4g} | {interval} |"
        rows.append(f"{row} {real} |" if floors else row)
    names = ["value", "interval"] + (["training images or points instead"] if floors else [])
    head = [f"| | {' | '.join(names)} |", f"| {' | '.join(['---'] * (1 + len(names)))} |"]
    return "\n".join([*head, *rows, "", _obtained(config, metrics)])


def _named(name: str, found: Record) -> str:
    """Return a measure in words, with its unit."""
    words = WORDS.get(name, name.replace("si_sdr", "SI-SDR").replace("_", " "))
    if name == "frechet_distance":
        words = found.get("distance_name", words)
    right = (found.get("judge") or {}).get("test_accuracy")  # None for reference without classes
    if name == "class_agreement" and right is not None:
        words += f" (judge on real test images: {right:.4g})"
    return f"{words} (dB)" if DECIBELS.match(name) else words


def _found(metrics: Record) -> Record:
    """Return the measures of a record."""
    return metrics["rollout"] if "rollout" in metrics else metrics["metrics"]


def _obtained(config: Record, metrics: Record) -> str:
    """Return how the numbers were obtained, in words."""
    found, how = _found(metrics), metrics.get("sampling") or {}
    reference, features = metrics.get("reference") or {}, found.get("features") or {}
    counts = {**found, **metrics.get("acting", {})}
    words = [f"{counts[name]} {kind}" for name, kind in COUNTS.items() if name in counts]
    words = words or [f"{found.get('num_samples', how.get('num_samples'))} samples"]
    if reference:
        words.append(f"{reference['num_samples']} of the reference ({reference['name']})")
    if features:
        words.append(f"features of {features['name']}")
    words.append(f"sampler {how.get('method')}, {_steps(how.get('grid') or [0])}")
    words.append(f"guidance {_guidance(how.get('guidance'))}")
    if seeds := how.get("seeds"):
        words.append(f"seeds {seeds[0]} to {seeds[1] - 1} (seeding {how.get('seeding')})")
    weights = metrics.get("weights") or {}
    words.append(f"{weights.get('kind')} weights of step {weights.get('step')}")
    text = f"How: {'; '.join(words)}. `metrics.json` has all settings."
    if weights.get("hash") != config["weights"]["hash"]:
        text += f" Measured before the weights were rounded to {config['weights']['dtype']}."
    for warning in found.get("warnings") or ():
        text += f" {warning[:1].upper()}{warning[1:]}."
    return text


def _steps(grid: Sequence[float]) -> str:
    """Return the number of steps of a grid."""
    count = len(grid) - 1
    return f"{count} step{'' if count == 1 else 's'}"


def _guidance(scale: Any) -> str:
    """Return a scale of guidance in words."""
    return "none" if scale in (None, 1) else str(scale)


def _short(name: str | None) -> str:
    """Return the last part of a dotted name."""
    return (name or "").rpartition(".")[2]
