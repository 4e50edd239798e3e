"""Locks of folders: two trainings in one folder would overwrite each other."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None

NAME = "training.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist.

    The lock belongs to the process: the system releases it when the process ends or is killed. So
    the file that a dead process left is no obstacle. File systems without locks are not protected.

    Raises:
        FileExistsError: If another process holds the lock.
        ValueError: If the folder cannot be written.
    """
    file = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise ValueError(
            f"hydra.run.dir must be a writable folder, got {folder}: {error}"
        ) from error
    descriptor = _acquired(file)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # the folder may be gone
                file.unlink()
            os.close(descriptor)


def _acquired(file: Path) -> int | None:
    """Return a descriptor that holds the lock; None if the system has no locks."""
    while fcntl is not None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise FileExistsError(
                f"hydra.run.dir must be in no other use, got {file.parent}, where {holder} is "
                "training; wait for its end, or choose another folder"
            ) from error
        except OSError:
            os.close(descriptor)
            return None
        with suppress(OSError):
            # The holder before may have removed the file in between.
            if os.fstat(descriptor).st_ino == file.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.pwrite(
                    descriptor, f"process {os.getpid()} of {socket.gethostname()}".encode(), 0
                )
                return descriptor
        os.close(descriptor)
    return None
