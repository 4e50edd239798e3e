"""Data of configurations, ready to read."""

from typing import Any

from flowkit.data import SplitData
from flowkit.modules.checkpoints import build
from flowkit.modules.earlier import current


def prepared(data: SplitData, stage: str | None = None) -> SplitData:
    """Return a data module with its splits at hand, those of a stage or all."""
    data.prepare_data()
    data.setup(stage)
    return data


def stored_data(node: dict[str, Any]) -> SplitData:
    """Read the data of a stored configuration; of latents and pairs, what they were made of."""
    data = prepared(build(current(node)), "test")
    source = getattr(data, "source", None)
    return stored_data(source) if isinstance(source, dict) else data
