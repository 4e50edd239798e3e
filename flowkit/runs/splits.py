"""Data modules of configurations, with their splits loaded."""

from typing import Any

from flowkit.data import SplitData
from flowkit.modules.checkpoints import build
from flowkit.modules.earlier import current


def prepared(data: SplitData, stage: str | None = None) -> SplitData:
    """Return the data module with loaded splits: the splits of a stage, or all.

    Raises:
        TypeError: If it is no data module of flowkit.
    """
    if not isinstance(data, SplitData):
        raise TypeError(
            f"data must be a subclass of flowkit.data.SplitData, got {type(data).__name__}; derive "
            "a class from it, with a method load that returns splits such as flowkit.data.Arrays"
        )
    data.prepare_data()
    data.setup(stage)
    return data


def stored_data(node: dict[str, Any]) -> SplitData:
    """Load the data of a stored configuration, with their test split.

    For cached latents and for pairs, the result is the data they were made of.
    """
    data = prepared(build(current(node)), "test")
    source = getattr(data, "source", None)
    return stored_data(source) if isinstance(source, dict) else data
