"""Folders of results, before the work."""

from pathlib import Path
from tempfile import TemporaryFile


def check_writable(folder: Path, key: str, fix: str = "") -> None:
    """Require a folder that can be written or created, by a test file.

    Args:
        folder: The folder.
        key: Name of its option, for the error.
        fix: Advice at the end of the error message.

    Raises:
        PermissionError: If it cannot.
    """
    made = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with TemporaryFile(dir=made):
            pass
    except OSError as error:
        raise PermissionError(f"{key} must be a writable folder, got {folder}{fix}") from error
