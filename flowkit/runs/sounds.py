"""The data module of a run on sounds, built without its splits."""

from typing import Any, TypeVar

from flowkit.data import Mixtures, Speech
from flowkit.modules.checkpoints import build
from flowkit.modules.trust import trusting
from flowkit.runs.known_data import read_data_record
from flowkit.runs.run import Run

Kind = TypeVar("Kind", Mixtures, Speech)


def data_of(run: Run, kind: type[Kind], words: str) -> Kind:
    """Build the data module of a run for its map of states and its encoder.

    Args:
        run: The run.
        kind: The class that the data must be of.
        words: What the run must be trained on, for the error.

    Raises:
        TypeError: If the data are of another class.
        ValueError: If spectrogram or encoder are not those of the training.
    """
    with trusting(run.trust):
        data: Any = build(run.config["data"], "data")
    if not isinstance(data, kind):
        raise TypeError(f"run must be trained on {words}, got {type(data).__name__}")
    record = read_data_record(run.folder)
    known = {} if record is None else record["preprocessing"]
    for name, value in data.hashes().items():
        if known.get(name, value) != value:
            raise ValueError(
                f"data.{name} must be that of the run's training, hash {known[name]}, got {value}"
            )
    return data
