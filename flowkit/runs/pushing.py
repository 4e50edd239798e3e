"""Parts of a shared model beside its weights: data, metrics, grids and a picture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowkit import grids
from flowkit.data.cache import INDEX
from flowkit.data.pairs import RECORD as PAIRS
from flowkit.hub import is_pushed
from flowkit.metrics.pictures import save_picture
from flowkit.modules.card import license_of
from flowkit.modules.pushed import CACHES, Writer, is_place
from flowkit.provenance import read_json, write_atomically
from flowkit.runs.drawing import draw, in_words, say_plan
from flowkit.runs.known_data import Record, read_data_record
from flowkit.runs.processes import say
from flowkit.runs.records import set_aside
from flowkit.runs.run import Run
from flowkit.runs.splits import located
from flowkit.runs.starts import choose_labels, choose_samples, given_source, noise_batches
from flowkit.sampling import ODESampler, sample_seeds

METRICS, PICTURE, CARD = "metrics.json", "samples.png", "README.md"
MEASURED = {  # by the command that uses a run: the record of what measures it
    "sample": METRICS,
    "separate": "separated/mixtures.json",
    "convert": "converted/pairs.json",
    "rollout": "rollout/rollout.json",
}


def images_of(node: dict[str, Any] | None, folder: Path) -> tuple[Any, Record | None]:
    """Return configuration and record of data; of latents and pairs those of their images.

    Both are None if the cache is not there any more.
    """
    record = read_data_record(folder)
    while node is not None and node.get("_target_") in CACHES:
        root = Path(located(node, record, None)["root"])
        file = next((root / name for name in (INDEX, PAIRS) if (root / name).is_file()), None)
        if file is None:
            say(f"data      left out: {root} is not there, which names the images")
            return None, None
        node, record = read_json(file).get("source"), read_data_record(root)
    return node, record


def metrics_of(run: Run, recipe: str, hashes: set[str]) -> tuple[Any, Path | None]:
    """Return the record of what measures a run, and its picture; None for what is not there.

    Records of other weights count as none.

    Args:
        run: The run.
        recipe: The command that uses it, see `flowkit.modules.card.recipe_of`.
        hashes: Hashes of its weights.
    """
    file = run.results / MEASURED[recipe]
    places = {file: file.with_suffix(".png")}
    if run.results != run.folder:  # a shared model brings its numbers
        places[run.folder / METRICS] = run.folder / PICTURE
    for file, picture in places.items():
        if not file.is_file():
            continue
        record = read_json(file)
        found = record.get("weights") if isinstance(record, Mapping) else None
        if isinstance(found, Mapping) and found.get("hash") in hashes:
            return without_places(record), picture if picture.is_file() else None
        say(f"metrics   left out: {file} is of other weights")
    return None, None


def grids_of(run: Run, hashes: set[str], digest: str) -> dict[str, str]:
    """Return the grids of ``flowkit boss`` for these weights: texts of files by their names."""
    found: dict[str, str] = {}
    places = [*sorted((run.results / "boss").glob("grid*.json")), *run.folder.glob("grid-*.json")]
    for file in places:
        steps, made = len(grids.load(file)) - 1, grids.provenance(file)
        if made.get("model_hash") not in hashes:
            say(f"grid      left out: {file} is of other weights")
            continue
        record = read_json(file)
        record["provenance"] = {**made, "model_hash": digest}
        text = json.dumps(without_places(record), indent=2) + "\n"
        found.setdefault(f"grid-{steps}.json", text)
    return dict(sorted(found.items()))


def without_places(value: Any) -> Any:
    """Return JSON values with the last part of all texts that are paths of this machine.

    >>> without_places({"file": "/home/me/photos", "words": "a / b"})
    {'file': 'photos', 'words': 'a / b'}
    """
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and is_place(value) else value


def picture_of(
    run: Run, sampler: ODESampler, labels: Any, count: int, seed: int, batch_size: int
) -> tuple[Writer, str]:
    """Draw samples, and return what writes their picture, and how they were drawn in words."""
    if run.brings_starts:
        batch = choose_samples(run.data, labels, count)
        cond, x0 = batch.get("cond"), given_source(batch, run.data)
        count = len(batch["x1"])
    else:
        cond, x0 = choose_labels(labels, count, run.num_classes), None
    seeds = sample_seeds(seed, 0, count)
    starts = noise_batches(run.sample_shape, seeds, batch_size)
    say_plan(run, sampler, count)
    samples, _ = draw(run, starts if x0 is None else x0.split(batch_size), cond, sampler)
    names, classes = run.names_of(cond, count), run.num_classes or 0
    columns = 10 // classes * classes if 0 < classes <= 10 and labels is None else 10
    source = f"noise of seeds {seeds.start} to {seeds.stop - 1}"
    words = (
        f"{count} samples from {source if x0 is None else 'the test split'}, not chosen: "
        f"{in_words(run, sampler)}."
    )
    return lambda file: save_picture(samples, file, columns, captions=names), words


def copied(picture: Path) -> Writer:
    """Return what writes a copy of a picture."""
    content = picture.read_bytes()
    return lambda file: write_atomically(file, lambda path: path.write_bytes(content))


def license_of_card(run: Run) -> str | None:
    """Return the license that the card of a shared model gives; None for other runs."""
    file = run.folder / CARD
    return license_of(file.read_text()) if is_pushed(run.folder) and file.is_file() else None


def put_aside(folder: Path, files: Mapping[str, Any]) -> None:
    """Put the files of an earlier push, which said something else, in a folder ``earlier-1``."""
    texts = {name: text for name, text in files.items() if name != PICTURE}
    old = [folder / name for name in (CARD, METRICS, PICTURE)] + [*folder.glob("grid-*.json")]
    now = {name: (folder / name).read_text() for name in texts if (folder / name).is_file()}
    if now and any(now.get(name) != text for name, text in texts.items()):
        set_aside(old, "earlier")
