"""Data modules of configurations, with their splits loaded."""

from typing import Any

from flowkit.data import SplitData
from flowkit.modules.checkpoints import build
from flowkit.modules.earlier import current


def prepared(data: SplitData, stage: str | None = None) -> SplitData:
    """Return the data module with loaded splits: the splits of a stage, or all."""
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
