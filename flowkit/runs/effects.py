"""Sizes of what settings of an evaluation do to a Fréchet distance, as measured."""

Range = tuple[float, float]

EFFECTS: dict[str, dict[str, Range]] = {}
