"""GGUF files: the table of values in front and the F32 tensors, every length checked against the file before use.

A file is "GGUF", version, number of tensors, number of values; the values (name, type, value); the tensors' names,
shapes, types and offsets; then, from the next multiple of `general.alignment` on, the tensors (gguf.md in ggml's docs).
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError

__all__ = ["GgufFile", "looks_like_gguf", "read_gguf"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
F32 = 0
MOST_DIMENSIONS = 4
LEAST_VALUE_BYTES, LEAST_TENSOR_BYTES = 13, 24
DEFAULT_ALIGNMENT = 32
MEND = "copy it again, or write it anew"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GgufFile:
    """The values by name, and the F32 tensors (outermost axis first, as numpy counts; views of the mapped file).

    `others` names the tensors of other types, which are not read.
    """

    values: dict[str, Any]
    tensors: dict[str, npt.NDArray[np.float32]]
    others: tuple[str, ...]


def looks_like_gguf(head: bytes) -> bool:
    """Whether a file that begins with `head` is a GGUF file."""
    return head[:4] == MAGIC


def read_gguf(path: Path) -> GgufFile:
    """What the file holds; tensors stay on the disk until they are looked at. Raises InputFileError."""
    path = Path(path)
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise InputFileError(f"{path}: cannot be read ({error})") from error
    cursor = _Cursor(raw, str(path))
    if cursor.take(4) != MAGIC:
        raise InputFileError(f"{path}: is not a GGUF file")
    version = cursor.number("<I")
    if version not in VERSIONS:
        raise InputFileError(f"{path}: GGUF version {version}; placer reads little-endian versions 2 and 3")
    tensors = cursor.count("tensors", LEAST_TENSOR_BYTES)
    values = {}
    for _ in range(cursor.count("values", LEAST_VALUE_BYTES)):
        name = cursor.text()
        values[name] = cursor.value(cursor.number("<I"))
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = cursor.text()
        dimensions = cursor.number("<I")
        if name in places or not 1 <= dimensions <= MOST_DIMENSIONS:
            raise cursor.damaged(f"tensor {name[:60]!r} comes twice or has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))
        places[name] = shape, cursor.number("<I"), cursor.number("<Q")
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise cursor.damaged(f"general.alignment is {str(alignment)[:60]}")
    first = -(-cursor.at // alignment) * alignment
    found = {}
    for name, (shape, kind, offset) in places.items():
        if kind != F32:
            continue
        start, size = first + offset, 4 * math.prod(shape)
        if offset % alignment or start + size > len(raw):
            raise cursor.damaged(f"tensor {name[:60]!r} of {size} bytes at {start} lies outside its {len(raw)} bytes")
        found[name] = np.frombuffer(raw, dtype="<f4", count=math.prod(shape), offset=start).reshape(shape[::-1])
    others = tuple(name for name in places if name not in found)
    return GgufFile(values=values, tensors=found, others=others)


class _Cursor:
    """A place in the file that moves on as things are read, and never beyond the end."""

    def __init__(self, raw: npt.NDArray[np.uint8], where: str) -> None:
        self.at = 0
        self._raw = raw
        self._where = where

    def damaged(self, what: str) -> InputFileError:
        return InputFileError(f"{self._where}: damaged GGUF file ({what}); {MEND}")

    def take(self, size: int) -> bytes:
        if size > len(self._raw) - self.at:
            raise self.damaged(f"{size} bytes at {self.at} are beyond its {len(self._raw)} bytes")
        self.at += size
        return self._raw[self.at - size : self.at].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, least_bytes: int) -> int:
        found = int(self.number("<Q"))
        if found * least_bytes > len(self._raw) - self.at:
            raise self.damaged(f"{found} {what} do not fit into its {len(self._raw)} bytes")
        return found

    def text(self) -> str:
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"a text at {self.at} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.damaged(f"a value at {self.at} has the unknown type {kind}")
        inner = self.number("<I")
        if inner == STRING:
            return [self.text() for _ in range(self.count("texts", 8))]
        if inner not in SCALARS:
            raise self.damaged(f"an array at {self.at} has the type {inner}")
        size = struct.calcsize(SCALARS[inner])
        return np.frombuffer(self.take(self.count("numbers", size) * size), dtype=SCALARS[inner]).tolist()
