"""The thread that reads planes: one after another, those that are needed before those that are expected.

The lock is the memory's too. The processor's thread never waits for a reader that is gone: `wait` raises instead.
"""

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter_ns
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from placer.core.device.cache import Plane
from placer.core.device.planes import PlaneIndex
from placer.core.errors import ExecutionError, PlacerError
from placer.execute.device.files import PlaneFile
from placer.execute.device.limit import RateLimit
from placer.execute.device.memory import PlaneMemory

__all__ = ["Load", "PlaneReader"]

Load = tuple[Plane, int, int]
"""A plane, and the nanoseconds at which its read began and ended."""

PATIENCE_S = 0.5


class PlaneReader:
    """Reads planes into the buffer of `memory`. Use it as a context manager: leaving it ends the thread.

    `loads` has every read in its order. A read begins where the one before ended if nothing kept the disk waiting.
    """

    def __init__(self, index: PlaneIndex, file: PlaneFile, memory: PlaneMemory, limit: RateLimit) -> None:
        self._index, self._file, self._memory, self._limit = index, file, memory, limit
        self.changed = threading.Condition()
        self.loads: list[Load] = []
        self._needed: deque[Plane] = deque()
        self._expected: deque[Plane] = deque()
        self._arrived: set[Plane] = set()
        self._reading: Plane | None = None
        self._unwanted: Plane | None = None
        self._stop = False
        self._ended_ns = 0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="placer-plane-reader")
        self._served: Future[None] | None = None

    def __enter__(self) -> Self:
        self._served = self._pool.submit(self._serve)
        self._served.add_done_callback(lambda _: self._wake())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._wake()
        self._pool.shutdown()

    def read_resident(self, planes: Iterable[Plane]) -> None:
        """Reads planes that stay for good, in this thread and at full speed; before anything else is asked for."""
        for plane in planes:
            with self.changed:
                units_U = self._memory.add_resident(plane)
            self._memory.arena.write(units_U, self._bytes_of(plane))

    def settle(self, site: int) -> tuple[set[Plane], Plane | None]:
        """Gives up expected planes that are not begun; returns those of `site` that are there, and the one in flight.

        The caller says with `need` what becomes of the latter.
        """
        with self.changed:
            self._expected.clear()
            arrived = {plane for plane in self._arrived if plane[0] == site}
            self._arrived.clear()
            return arrived, self._reading

    def need(self, planes: Iterable[Plane], unwanted: Iterable[Plane]) -> None:
        """Asks for planes, in this order, and drops the unwanted; one in flight is dropped when it has arrived."""
        with self.changed:
            for plane in unwanted:
                if plane == self._reading:
                    self._unwanted = plane
                else:
                    self._arrived.discard(plane)
                    self._memory.drop(plane)
            self._needed.extend(planes)
            self.changed.notify_all()

    def expect(self, planes: Iterable[Plane]) -> None:
        """Planes to read ahead when nothing else is to be read."""
        with self.changed:
            self._expected.extend(planes)
            self.changed.notify_all()

    def wait(self, plane: Plane) -> bool:
        """Returns once a plane that was asked for is there: True if it had to wait. Raises what ended the reader."""
        with self.changed:
            waited = False
            while plane not in self._arrived:
                self.require_alive()
                waited = True
                self.changed.wait(PATIENCE_S)
            return waited

    def finish(self) -> None:
        """Returns once no read is under way. Raises what ended the reader."""
        with self.changed:
            while self._reading is not None:
                self.require_alive()
                self.changed.wait(PATIENCE_S)

    def require_alive(self) -> None:
        """Raises what ended the reader, if anything did."""
        assert self._served is not None, "planes are asked for inside the reader's context"
        if not self._served.done():
            return
        failure = self._served.exception()
        if isinstance(failure, PlacerError):
            raise failure
        raise ExecutionError(f"the thread that reads planes ended ({failure!r}); run again") from failure

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _serve(self) -> None:
        while (found := self._next()) is not None:
            self._read(*found)

    def _next(self) -> tuple[Plane, bool] | None:
        """The plane to read now, and whether the disk was busy until now; None when the run is over."""
        with self.changed:
            follows = True
            while not self._stop:
                queue = self._needed or self._expected
                if queue and self._memory.fits(queue[0]):
                    self._reading = queue.popleft()
                    self._memory.add_buffered(self._reading)
                    return self._reading, follows
                follows = False
                self.changed.wait()
            return None

    def _read(self, plane: Plane, follows: bool) -> None:
        begin_ns = self._ended_ns if follows and self._ended_ns else perf_counter_ns()
        data = self._bytes_of(plane)
        self._memory.arena.write(self._memory.units(plane), data)
        self._limit.hold(len(data), begin_ns, follows=follows, stopped=lambda: self._stop)
        with self.changed:
            self._ended_ns = perf_counter_ns()
            self.loads.append((plane, begin_ns, self._ended_ns))
            self._reading = None
            if plane == self._unwanted:
                self._unwanted = None
                self._memory.drop(plane)
            else:
                self._arrived.add(plane)
            self.changed.notify_all()

    def _bytes_of(self, plane: Plane) -> npt.NDArray[np.uint8]:
        return self._file.read(int(self._index.offset_LEK[plane]), self._index.plane_bytes_K[plane[2]])
