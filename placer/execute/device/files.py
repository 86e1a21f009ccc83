"""Planes read from their file past the page cache, so that a read is a read of the disk."""

import errno
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from placer.core.errors import ExecutionError, InputFileError

__all__ = ["PlaneFile"]

BLOCK_BYTES = 4096
"""Direct reads start and end at multiples of this: no disk's blocks are larger."""

MEND = "write it anew with `placer device quantize`"


class PlaneFile:
    """Reads byte ranges of up to `most_bytes`. Use it as a context manager.

    read_mode is "direct" (O_DIRECT: covering blocks, past the page cache) or, where the file system refuses that,
    "dropped-cache": before each read the system is asked to forget the range. `asked_bytes` counts the bytes returned,
    `block_bytes` those of the blocks that cover them.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self.path = Path(path)
        self.read_mode = "direct"
        self.asked_bytes = self.block_bytes = 0
        # a mapping of its own begins at a page, as direct reads want it
        self._staging = mmap.mmap(-1, _covering(BLOCK_BYTES - 1, most_bytes)[1])
        self._bytes = np.frombuffer(self._staging, dtype=np.uint8)
        self._handle = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _open(self) -> int:
        direct = getattr(os, "O_DIRECT", 0)
        try:
            if direct and (handle := self._open_direct(direct)) is not None:
                return handle
            self.read_mode = "dropped-cache"
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise InputFileError(f"{self.path}: cannot be read ({error.strerror})") from error

    def _open_direct(self, flag: int) -> int | None:
        """A handle whose first block could be read directly, or None where the file system refuses that."""
        handle = None
        try:
            handle = os.open(self.path, os.O_RDONLY | flag)
            os.preadv(handle, [memoryview(self._staging)[:BLOCK_BYTES]], 0)
        except OSError as error:
            if handle is not None:
                os.close(handle)
            if error.errno != errno.EINVAL:
                raise
            return None
        return handle

    def read(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """The bytes from `offset` on, in a buffer that the next read fills anew.

        Raises InputFileError where the file ends before, ExecutionError for an error of the disk.
        """
        start, length = _covering(offset, size)
        needed = offset - start + size
        got = 0
        self._forget(start, length)
        try:
            while got < needed:
                count = os.preadv(self._handle, [memoryview(self._staging)[got:length]], start + got)
                got += count
                # a direct read that stops inside a block has met the end of the file
                if not count or (got < needed and got % BLOCK_BYTES):
                    break
        except OSError as error:
            raise ExecutionError(
                f"{self.path}: bytes {offset} to {offset + size} cannot be read ({error.strerror}); check the disk"
            ) from error
        if got < needed:
            raise InputFileError(f"{self.path}: truncated: ends at byte {start + got}, {offset + size} needed; {MEND}")
        self._forget(start, length)
        self.asked_bytes += size
        self.block_bytes += length
        return self._bytes[offset - start : needed]

    def _forget(self, start: int, length: int) -> None:
        if self.read_mode != "direct" and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, start, length, os.POSIX_FADV_DONTNEED)


def _covering(offset: int, size: int) -> tuple[int, int]:
    """Start and length of the blocks that cover a range."""
    start = offset // BLOCK_BYTES * BLOCK_BYTES
    end = -(-(offset + size) // BLOCK_BYTES) * BLOCK_BYTES
    return start, end - start
