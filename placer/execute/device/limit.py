"""A disk that is only so fast: reads are held back to a bandwidth, without drift."""

import time
from collections.abc import Callable

__all__ = ["RateLimit"]

LONGEST_SLEEP_S = 0.05


class RateLimit:
    """Holds reads to `mbytes_per_s` (None: does nothing).

    A read that follows another at once is counted from where that one was due, so that sleeping too long does not add
    up; idle time gives no credit; a disk that is slower than the limit is not asked to catch up.
    """

    def __init__(
        self,
        mbytes_per_s: float | None,
        *,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        sleep_s: Callable[[float], None] = time.sleep,
    ) -> None:
        # megabytes per second are bytes per microsecond
        self._ns_per_byte = None if mbytes_per_s is None else 1e3 / mbytes_per_s
        self._clock_ns, self._sleep_s = clock_ns, sleep_s
        self._due_ns = 0.0

    def hold(self, nbytes: int, begin_ns: int, *, follows: bool, stopped: Callable[[], bool] = lambda: False) -> None:
        """Returns when a read of `nbytes` that began at `begin_ns` may end, or `stopped()` says so.

        `follows`: the read before had kept the disk busy until this one began.
        """
        if self._ns_per_byte is None:
            return
        start_ns = self._due_ns if follows else float(begin_ns)
        done_ns = self._clock_ns()
        self._due_ns = max(start_ns + nbytes * self._ns_per_byte, float(done_ns))
        while not stopped():
            left_s = (self._due_ns - self._clock_ns()) / 1e9
            if left_s <= 0:
                return
            # in pieces, so that a run that ends need not wait for a slow read
            self._sleep_s(min(left_s, LONGEST_SLEEP_S))
