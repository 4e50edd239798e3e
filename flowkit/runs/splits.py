"""Data modules of configurations, with their splits loaded."""

from collections.abc import Sequence
from typing import Any

from flowkit.data import SplitData
from flowkit.modules.checkpoints import build
from flowkit.modules.earlier import current
from flowkit.modules.trust import trusting


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


def stored_data(node: dict[str, Any], trust: Sequence[str] = (), place: str = "data") -> SplitData:
    """Load the data of a stored configuration, with their test split.

    For cached latents and for pairs, the result is the data they were made of.

    Args:
        node: The configuration.
        trust: Names of classes that it may name beside those that flowkit lists.
        place: Name of the configuration, for errors.

    Raises:
        ValueError: If the configuration names a class that is neither listed nor trusted.
    """
    with trusting(trust):
        data = prepared(build(current(node), place), "test")
    source = getattr(data, "source", None)
    if not isinstance(source, dict):
        return data
    return stored_data(source, trust, f"source in {getattr(data, 'root', place)}")
