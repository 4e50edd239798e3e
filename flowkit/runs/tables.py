"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Sequence


def markdown(
    header: Sequence[str], rows: Iterable[Sequence[str]], names: Collection[int] = (0,)
) -> str:
    """Return a table; columns numbered in ``names`` hold words, to the left, the others numbers.

    >>> print(markdown(["solver", "NFE"], [["heun", "8"]]), end="")
    | solver | NFE |
    | --- | ---: |
    | heun | 8 |
    """
    rule = ["---" if column in names else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))
