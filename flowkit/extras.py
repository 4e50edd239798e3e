"""Advice to install the packages of an extra, whose name is in ``pyproject.toml``."""


def install(extra: str) -> str:
    """Return advice for an error that packages of an extra are missing.

    flowkit is on no package index, so the command works in its folder only.

    >>> install("audio")
    "pip install -c constraints.txt '.[audio]' in the folder of flowkit"
    """
    return f"pip install -c constraints.txt '.[{extra}]' in the folder of flowkit"


def not_imported(error: ImportError, purpose: str, extra: str) -> ImportError:
    """Return the error of a failed import of packages of an extra, which names an absent one.

    A package that is there may fail to import as well: then the error says how.

    >>> print(not_imported(ModuleNotFoundError(name="mujoco"), "for env=obstacle", "robots"))
    mujoco must be installed for env=obstacle, got none; pip install -c ... in the folder of flowkit
    >>> print(not_imported(ImportError("no GL"), "for env=obstacle", "robots"))
    packages of robots must be usable for env=obstacle, got no GL; pip ... in the folder of flowkit
    """
    rule, got = f"packages of {extra} must be usable", str(error)
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        rule, got = f"{error.name} must be installed", "none"
    return ImportError(f"{rule} {purpose}, got {got}; {install(extra)}")
