"""NumPy arrays from .npy streams and .npz archives, read in pieces, with nothing in them trusted.

No pickle is ever loaded, and no array is allocated that its bytes in the file could not fill.
"""

import ast
import io
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError
from traces.readers.text import first_line

__all__ = ["ArrayHeader", "Member", "array_from_bytes", "open_members", "read_header"]

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000
# deflate cannot pack more than about 1032 to 1; bzip2 and lzma can, but nobody stores arrays with them
MAX_RATIO = 1100
DAMAGE = (
    ValueError, TypeError, SyntaxError, MemoryError, RecursionError, EOFError, NotImplementedError, RuntimeError,
    LookupError, OverflowError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """Type, order and shape that a .npy stream claims."""

    dtype: np.dtype[Any]
    fortran_order: bool
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes the data must have."""
        return math.prod(self.shape) * self.dtype.itemsize


class Member:
    """One array of an archive: its header is known, its data not yet read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
        self.name = info.filename.removesuffix(".npy")
        self.where = f"{path}: array {self.name}"
        self._archive, self._info = archive, info
        with _damage(self.where), archive.open(info) as stream:
            self.header = read_header(stream, self.where)
            length = stream.tell()
        if info.file_size > MAX_RATIO * (info.compress_size + 64) or info.compress_size > path.stat().st_size:
            raise InputFileError(
                f"{self.where}: claims {info.file_size} bytes, more than the file can hold; copy it again"
            )
        if info.file_size - length != self.header.nbytes:
            raise InputFileError(
                f"{self.where}: shape {self.header.shape} of {self.header.dtype} needs {self.header.nbytes} bytes, "
                f"the file has {info.file_size - length}; write the file again"
            )

    def read(self) -> npt.NDArray[Any]:
        """The whole array."""
        with _damage(self.where), self._archive.open(self._info) as stream:
            read_header(stream, self.where)
            return _array(_exactly(stream, self.header.nbytes, self.where), self.header)

    def rows(self, most_bytes: int = 1 << 24) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """(first row, rows) in order, each piece of at most about `most_bytes`."""
        count = self.header.shape[0]
        row_bytes = self.header.nbytes // count if count else 0
        if self.header.fortran_order or not row_bytes:
            yield 0, self.read()
            return
        step = max(1, most_bytes // row_bytes)
        with _damage(self.where), self._archive.open(self._info) as stream:
            read_header(stream, self.where)
            for start in range(0, count, step):
                shape = (min(step, count - start), *self.header.shape[1:])
                data = _exactly(stream, row_bytes * shape[0], self.where)
                yield start, _array(data, ArrayHeader(self.header.dtype, False, shape))


@contextmanager
def open_members(path: Path) -> Iterator[dict[str, Member]]:
    """The arrays of an .npz archive by name, while it is open. Raises InputFileError."""
    path = Path(path)
    try:
        with _damage(str(path)), zipfile.ZipFile(path) as archive:
            yield {
                info.filename.removesuffix(".npy"): Member(path, archive, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_header(stream: IO[bytes], where: str) -> ArrayHeader:
    """Reads a .npy header and leaves `stream` at the data. Raises InputFileError naming `where`."""
    with _damage(where):
        head = _exactly(stream, 8, where)
        if head[:6] != MAGIC or head[6] not in (1, 2, 3):
            raise InputFileError(f"{where}: is not a .npy array; write it with numpy.save")
        size = int.from_bytes(_exactly(stream, 2 if head[6] == 1 else 4, where), "little")
        if size > MAX_HEADER_BYTES:
            raise InputFileError(f"{where}: the header claims {size} bytes; write it with numpy.save")
        fields = ast.literal_eval(_exactly(stream, size, where).decode("utf-8" if head[6] == 3 else "latin1").strip())
        descr, shape, fortran = fields["descr"], fields["shape"], fields["fortran_order"]
        if not isinstance(descr, str) or not re.fullmatch(r"[<>|=]?([ui][1248]|f[248]|b1|[SU][1-9]\d{0,3})", descr):
            raise InputFileError(f"{where}: is of type {descr!r}; give numbers or texts, no objects")
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise InputFileError(f"{where}: shape {shape!r} is not one")
        return ArrayHeader(np.dtype(descr), bool(fortran), shape)


def array_from_bytes(data: bytes, where: str) -> npt.NDArray[Any]:
    """The array of a .npy file held in memory. Raises InputFileError naming `where`."""
    stream = io.BytesIO(data)
    header = read_header(stream, where)
    rest = data[stream.tell() :]
    if len(rest) != header.nbytes:
        raise InputFileError(f"{where}: shape {header.shape} needs {header.nbytes} bytes, there are {len(rest)}")
    with _damage(where):
        return _array(rest, header)


def _array(data: bytes, header: ArrayHeader) -> npt.NDArray[Any]:
    array = np.frombuffer(data, dtype=header.dtype) if data else np.empty(0, header.dtype)
    array = array.reshape(header.shape, order="F" if header.fortran_order else "C")
    return array.astype(header.dtype.newbyteorder("="), copy=False)


def _exactly(stream: IO[bytes], count: int, where: str) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise InputFileError(f"{where}: truncated: {count} bytes expected, {len(data)} left; copy the file again")
    return data


@contextmanager
def _damage(where: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise InputFileError(f"{where}: damaged or not a NumPy file ({first_line(error)}); write it again") from error
