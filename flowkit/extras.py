"""Advice to install the packages of an extra, whose name is in ``pyproject.toml``."""


def install(extra: str) -> str:
    """Return advice for an error that packages of an extra are missing.

    flowkit is on no package index, so the command works in its folder only.

    >>> install("audio")
    "pip install -c constraints.txt '.[audio]' in the folder of flowkit"
    """
    return f"pip install -c constraints.txt '.[{extra}]' in the folder of flowkit"
