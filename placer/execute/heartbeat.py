"""How far each rank is, in a small shared file; and a lock that tells ranks when their launcher is gone.

The launcher names the rank that hangs or died from this; nothing here sends a message or calls the system per step.
"""

import fcntl
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from placer.core.timeline import PHASES

__all__ = ["Heartbeat", "create_heartbeats", "die_with", "read_heartbeats", "stage"]

COLUMNS = 4
STARTED, FINISHED = -1, 1 << 40


class Heartbeat:
    """One rank's row: process id, step, layer, phase. Without a file (launched by hand) it writes to nowhere."""

    def __init__(self, path: Path | None, rank: int) -> None:
        self._base = rank * COLUMNS
        if path is None:
            self._row = memoryview(bytearray(8 * COLUMNS * (rank + 1))).cast("q")
        else:
            with path.open("r+b") as file:
                self._row = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self._row[self._base] = os.getpid()
        self.beat(STARTED, 0, 0)

    def beat(self, step: int, layer: int, phase: int) -> None:
        """Notes that the rank begins `phase` of `layer` in `step` (steps count the iterations of all jobs)."""
        row, base = self._row, self._base
        row[base + 1], row[base + 2], row[base + 3] = step, layer, phase

    def finish(self) -> None:
        """Notes that the rank has measured everything."""
        self.beat(FINISHED, 0, 0)


def create_heartbeats(path: Path, num_ranks: int) -> None:
    """Makes the file in which each of `num_ranks` ranks has a row; process id 0 means not started."""
    path.write_bytes(bytes(8 * COLUMNS * num_ranks))


def read_heartbeats(path: Path) -> npt.NDArray[np.int64]:
    """Process id, step, layer and phase of each rank, (R, 4)."""
    return np.frombuffer(path.read_bytes(), dtype=np.int64).reshape(-1, COLUMNS)


def stage(row: npt.NDArray[np.int64]) -> str:
    """Where a rank is, in words."""
    if row[0] == 0:
        return "not started"
    if row[1] == STARTED:
        return "loading experts and joining the group"
    if row[1] == FINISHED:
        return "writing results"
    return f"step {row[1]}, layer {row[2]}, {PHASES[int(row[3])]}"


def die_with(lock: Path) -> None:
    """Ends this process as soon as the process that holds `lock` is gone, however that one ended."""

    def watch() -> None:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
