"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def titled(title: str, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the title of a column, with a mark if a row says that its value is unreliable.

    >>> titled("distance", "far", [{"far": 3.0}, {"far": 4.0, "unreliable": ["far"]}])
    'distance, unreliable'
    """
    marked = any(name in row.get("unreliable", ()) for row in rows)
    return f"{title}, unreliable" if marked else title


def markdown(
    header: Sequence[str], rows: Iterable[Sequence[str]], names: Collection[int] = (0,)
) -> str:
    """Return a Markdown table.

    Args:
        header: Titles of the columns.
        rows: Cells of each row.
        names: Numbers of the columns with words, aligned to the left. Other columns are aligned to
            the right.

    >>> print(markdown(["solver", "NFE"], [["heun", "8"]]), end="")
    | solver | NFE |
    | --- | ---: |
    | heun | 8 |
    """
    rule = ["---" if column in names else "---:" for column in range(len(header))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))
