"""Arrays in npz files, read by rows: mapped into memory, or unpacked in order if compressed."""

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

SMALL = 2**31  # bytes of an array that is read whole, such as a covariance; images may be larger
WRITTEN = "an npz file as numpy.savez writes it"
DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class _Member:
    """An array of the file: its kind, and the first byte of its content (None: compressed)."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    offset: int | None


@dataclass
class _Position:
    """An opened compressed array, and the number of rows that were read from it."""

    stream: Any
    rows: int


@dataclass(frozen=True, eq=False)
class Npz:
    """Arrays of an npz file by name. No code in the file is run, and nothing is read in advance.

    `numpy.savez` stores arrays as they are, so their rows are mapped into memory by their place in
    the file. `numpy.savez_compressed` packs them; then rows are unpacked in increasing order, and
    memory holds only those asked for.

    Args:
        file: The file.
        members: Its arrays; use `Npz.open`.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.npz"
    >>> np.savez(file, arr_0=np.arange(6).reshape(3, 2))
    >>> found = Npz.open(file)
    >>> found.shape("arr_0"), found.rows("arr_0", torch.tensor([0, 2])).tolist()
    ((3, 2), [[0, 1], [4, 5]])
    """

    file: Path
    members: Mapping[str, _Member]
    _positions: dict[str, _Position] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, file: str | Path) -> "Npz":
        """Read the headers of all arrays.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no npz file, is not whole, or holds Python objects.
        """
        file = Path(file)
        members, size = {}, file.stat().st_size
        try:
            with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
                for info in archive.infolist():
                    if info.filename.endswith(".npy"):
                        found = _member(archive, info, raw, size)
                        members[info.filename.removesuffix(".npy")] = found
        except (*DAMAGES, ValueError, struct.error) as error:
            raise ValueError(f"{file} must be {WRITTEN}, got {_reason(error)}") from error
        return cls(file, members)

    def __contains__(self, name: str) -> bool:
        """Return True if the file has an array of this name."""
        return name in self.members

    @property
    def names(self) -> list[str]:
        """Names of the arrays, in their order in the file."""
        return list(self.members)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        return self.members[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Type of the numbers of an array."""
        return self.members[name].dtype

    def whole(self, name: str) -> np.ndarray:
        """Read an array whole.

        Raises:
            ValueError: If it takes more than 2 GiB, or the file is damaged.
        """
        member = self.members[name]
        if math.prod(member.shape) * member.dtype.itemsize > SMALL:
            raise ValueError(
                f"{name} in {self.file} must have at most {SMALL} bytes, got shape {member.shape}"
            )
        if member.offset is not None:
            return np.array(self._mapped(member))
        content = self._unpacked(name, math.prod(member.shape) * member.dtype.itemsize, fresh=True)
        found = np.frombuffer(content, member.dtype)
        return found.reshape(member.shape, order="F" if member.fortran else "C")

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Return rows ``(n, *)`` of an array.

        Args:
            name: Name of the array.
            rows: Positions ``(n,)``, increasing. Compressed arrays are fast if they also follow
                those of the call before.

        Raises:
            ValueError: If the file is damaged, or a compressed array is in Fortran's order.
        """
        member = self.members[name]
        if member.offset is not None:
            mapped = self._mapped(member)
            first, last = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
            if last - first == len(rows):  # one copy, without an index
                return _tensor(np.array(mapped[first:last]))
            return _tensor(mapped[rows.numpy()])
        if member.fortran:
            raise ValueError(
                f"{name} in {self.file} must be in C order to be read by rows, got Fortran's order"
            )
        return _tensor(self._in_order(name, member, rows))

    def _mapped(self, member: _Member) -> np.ndarray:
        """Map an array that is stored as it is."""
        order = "F" if member.fortran else "C"
        if math.prod(member.shape) == 0:
            return np.empty(member.shape, member.dtype)
        return np.memmap(
            self.file, member.dtype, "r", cast(int, member.offset), member.shape, order
        )

    def _in_order(self, name: str, member: _Member, rows: Tensor) -> np.ndarray:
        """Unpack rows of a compressed array."""
        one = math.prod(member.shape[1:]) * member.dtype.itemsize
        found = np.empty((len(rows), *member.shape[1:]), member.dtype)
        position = self._positions.get(name)
        for k, row in enumerate(rows.tolist()):
            if position is None or row < position.rows:
                self._unpacked(name, 0, fresh=True)
                position = self._positions[name]
            self._unpacked(name, (row - position.rows) * one, skip=True)
            found[k] = np.frombuffer(self._unpacked(name, one), member.dtype).reshape(
                member.shape[1:]
            )
            position.rows = row + 1
        return found

    def _unpacked(self, name: str, size: int, *, fresh: bool = False, skip: bool = False) -> bytes:
        """Unpack the next bytes of a compressed array, or of ``fresh`` its first.

        To skip bytes they are unpacked in pieces and dropped.
        """
        try:
            if fresh:
                stream = zipfile.ZipFile(self.file).open(f"{name}.npy")  # noqa: SIM115  # stays open
                _header(stream)
                self._positions[name] = _Position(stream, 0)
            stream = self._positions[name].stream
            if not skip:
                content = stream.read(size)
                if len(content) < size:
                    raise EOFError("it ends early")
                return content
            while size > 0:
                size -= len(stream.read(min(size, 2**20))) or size
        except (*DAMAGES, ValueError) as error:
            raise ValueError(f"{self.file} must be {WRITTEN}, got {_reason(error)}") from error
        return b""


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, raw: Any, size: int) -> _Member:
    """Read the header of one array, and check that the file is long enough for it."""
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(stream)
        start = stream.tell()
    needed = math.prod(shape) * dtype.itemsize
    if info.file_size - start < needed:
        raise ValueError(f"{info.filename} of shape {shape} with {info.file_size - start:,} bytes")
    if info.compress_type != zipfile.ZIP_STORED:
        return _Member(dtype, shape, fortran, None)
    raw.seek(info.header_offset)
    lengths = struct.unpack("<26xHH", raw.read(30))  # of the name and the extra field
    offset = info.header_offset + 30 + sum(lengths) + start
    if offset + needed > size:
        raise ValueError(f"{info.filename} of {needed:,} bytes in a file of {size:,}")
    return _Member(dtype, shape, fortran, offset)


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of an array: shape, Fortran's order, and type of numbers."""
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("an array of Python objects" if dtype.hasobject else f"shape {shape}")
    return shape, fortran and len(shape) > 1, dtype


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array as a tensor, which knows the byte order of this machine only."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _reason(error: BaseException) -> str:
    """Return the reason of an error in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
