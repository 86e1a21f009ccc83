"""The safetensors container, written piece by piece and read as a memory map.

A file is 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}} with free text
under `__metadata__`, then the arrays without gaps. The safetensors library reads and writes whole arrays; this module
writes arrays larger than memory in parts, and says what is wrong with a file that is not one.
"""

import json
import math
import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from placer.core.atomic import write_atomically
from placer.core.errors import InputFileError, UsageError

__all__ = ["TensorFile", "TensorSpec", "looks_like_tensor_file", "read_tensor_file", "write_tensor_file"]

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
MAX_UNALIGNED_BYTES = 1 << 30
MEND = "copy it again, or write it anew with `placer trace import`"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type and shape of one array that will be written."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What a file holds: its free text, its arrays (read-only views of the mapped file), and where each starts."""

    metadata: dict[str, str]
    arrays: dict[str, npt.NDArray[Any]]
    first_byte: dict[str, int]


def write_tensor_file(
    path: Path,
    specs: Mapping[str, TensorSpec],
    pieces: Iterable[tuple[str, npt.NDArray[Any]]],
    metadata: Callable[[], Mapping[str, str]],
    reserve: Mapping[str, str],
) -> None:
    """Writes the arrays of `specs` to `path`, whole or not at all, holding one piece in memory at a time.

    `pieces` yields (name, consecutive piece of that array in C order); the arrays' pieces may come interleaved.
    `metadata()` is called after the last piece (so it may carry a hash of them) and must give texts of the same lengths
    as `reserve`. Raises UsageError when pieces and specs disagree, InputFileError when `path` cannot be written.
    """
    # safetensors wants no gaps; the widest types first keep every array aligned
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(reserve)}
    offset = 0
    for name in order:
        spec = specs[name]
        span = [offset, offset + spec.nbytes]
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset = span[1]
    size = len(_encode(header))

    def write(temporary: Path) -> None:
        next_byte = {name: 8 + size + header[name]["data_offsets"][0] for name in order}
        with temporary.open("wb") as file:
            for name, piece in pieces:
                if piece.dtype != specs[name].dtype:
                    raise UsageError(f"array {name!r}: a piece is {piece.dtype}, the array is {specs[name].dtype}")
                file.seek(next_byte[name])
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                next_byte[name] += piece.nbytes
                if next_byte[name] > 8 + size + header[name]["data_offsets"][1]:
                    raise UsageError(f"array {name!r}: more was given than shape {specs[name].shape} holds")
            for name in order:
                if missing := 8 + size + header[name]["data_offsets"][1] - next_byte[name]:
                    raise UsageError(f"array {name!r}: {missing} bytes of shape {specs[name].shape} were not given")
            header["__metadata__"] = dict(metadata())
            text = _encode(header)
            assert len(text) == size, "metadata changed its length while the file was written"
            file.seek(0)
            file.write(size.to_bytes(8, "little") + text)

    write_atomically(path, write)


def read_tensor_file(path: Path) -> TensorFile:
    """The file's text and arrays; nothing is copied into memory. Raises InputFileError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            total = path.stat().st_size
            start, header = _read_header(path, file, total)
            mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputFileError(f"{path}: header field __metadata__ is not a table of texts; {MEND}")
    arrays = {}
    first_byte = {}
    taken = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        if start + end > total:
            raise InputFileError(
                f"{path}: truncated: array {name!r} ends at byte {start + end} and the file has {total}; {MEND}"
            )
        data = mapped[start + begin : start + end]
        # a foreign writer may leave arrays unaligned; numba and numpy want them aligned
        if (start + begin) % dtype.itemsize:
            if len(data) > MAX_UNALIGNED_BYTES:
                raise InputFileError(f"{path}: array {name!r} is not aligned and too large to copy; {MEND}")
            data = data.copy()
        try:
            arrays[name] = data.view(dtype).reshape(shape)
        except ValueError as error:
            raise InputFileError(f"{path}: array {name!r} cannot have shape {shape} ({error}); {MEND}") from error
        first_byte[name] = start + begin
        taken.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(taken):
        if begin != expected:
            raise InputFileError(
                f"{path}: array {name!r} starts at data byte {begin}, the one before ends at {expected}; {MEND}"
            )
        expected = end
    if start + expected != total:
        raise InputFileError(f"{path}: {total - start - expected} bytes after the last array; {MEND}")
    return TensorFile(metadata, arrays, first_byte)


def looks_like_tensor_file(head: bytes) -> bool:
    """Whether the first 9 bytes of a file are those of a safetensors file."""
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES


def _encode(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _read_header(path: Path, file: BinaryIO, total: int) -> tuple[int, dict[str, Any]]:
    head = file.read(9)
    if not head:
        raise InputFileError(f"{path}: is empty; {MEND}")
    if not looks_like_tensor_file(head):
        raise InputFileError(f"{path}: is not a safetensors file; give a file that placer wrote")
    size = int.from_bytes(head[:8], "little")
    if 8 + size > total:
        raise InputFileError(f"{path}: truncated: the header needs {8 + size} bytes and the file has {total}; {MEND}")
    try:
        header = json.loads((head[8:] + file.read(size - 1)).decode())
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: the header is not JSON ({error}); {MEND}") from error
    if not isinstance(header, dict):
        raise InputFileError(f"{path}: the header is not a table; {MEND}")
    return 8 + size, header


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    where = f"{path}: array {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise InputFileError(f"{where}: the header entry is damaged; {MEND}")
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise InputFileError(f"{where}: dtype {entry['dtype']!r} is none of {', '.join(DTYPES)}; {MEND}")
    shape, span = entry.get("shape"), entry.get("data_offsets")
    for field, value in (("shape", shape), ("data_offsets", span)):
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**62 for n in value):
            raise InputFileError(f"{where}: {field} is {value!r}, not a list of sizes; {MEND}")
    assert isinstance(shape, list)
    assert isinstance(span, list)
    if len(shape) > 8 or len(span) != 2 or span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        raise InputFileError(f"{where}: shape {shape} of {dtype} does not fill bytes {span}; {MEND}")
    return dtype, tuple(shape), span[0], span[1]
