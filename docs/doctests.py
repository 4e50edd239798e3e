"""Shows the examples of docstrings as code: a griffe extension for the API pages."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts every doctest under a heading, which is how the parser knows that it is code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change an object's docstring as it is loaded."""
        if obj.docstring:
            obj.docstring.value = headed(obj.docstring.value)


def headed(text: str) -> str:
    """The text, each of its examples indented below ``Examples:``."""
    return EXAMPLE.sub(
        lambda found: "Examples:\n" + re.sub(r"^", "    ", found[0], flags=re.MULTILINE), text
    )
