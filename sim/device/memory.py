"""What is in memory beside the resident planes, and when: buffer and cache, plane by plane.

A plane that the cache policy keeps leaves the buffer when its expert is done. Where the cache has no room yet, because
planes that the policy throws out are still needed, it waits in the buffer, and is lost if a read needs the room before.
Legend: L routing sites, E experts, K planes, I items of a site, X changes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from placer.core.device.cache import Plane

__all__ = ["Memory"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Memory:
    """The bytes of planes over time. Changes may be noted in any order; at one instant bytes go before others come."""

    def __init__(self, shape_LEK: tuple[int, int, int], cache_bytes: int, buffer_bytes: int) -> None:
        self._cache_bytes, self._buffer_bytes = cache_bytes, buffer_bytes
        # planes that the cache policy believes to have, and that were lost
        self._lost_LEK = np.zeros(shape_LEK, dtype=np.bool_)
        self._cached_bytes = 0
        self._changes: list[tuple[IntArray, IntArray]] = []
        self._few: list[tuple[int, int]] = []
        self.lost = 0

    def without_lost(self, site: int, cached_EK: BoolArray) -> BoolArray:
        """Planes that are there of those that the cache policy believes to have."""
        return cached_EK & ~self._lost_LEK[site] if self.lost else cached_EK

    def note(self, time_ns: int, change_bytes: int) -> None:
        """So many bytes come (or go, where negative)."""
        self._few.append((time_ns, change_bytes))

    def thrown(self, time_ns: int, planes: Sequence[Plane], plane_bytes_K: Sequence[int]) -> None:
        """The cache gives up planes that this site does not use."""
        for plane in planes:
            if self._lost_LEK[plane]:
                self._lost_LEK[plane] = False
                continue
            self._cached_bytes -= plane_bytes_K[plane[2]]
            self.note(time_ns, -plane_bytes_K[plane[2]])

    def site_over(
        self,
        site: int,
        expert_I: IntArray,
        plane_I: IntArray,
        size_I: IntArray,
        start_ns_I: IntArray,
        done_ns_I: IntArray,
        buffered_I: BoolArray,
        kept_I: BoolArray,
        evicted_I: BoolArray,
    ) -> None:
        """A site's items, in their order, have been computed.

        start_ns_I   when the plane's read began (-1: it was there at the routing)
        done_ns_I    when the last item of its expert was computed
        buffered_I   whether the plane was in the buffer; kept_I: and goes to the cache
        evicted_I    whether it was in the cache and goes
        """
        read_I = start_ns_I >= 0
        self._changes.append((start_ns_I[read_I], size_I[read_I]))
        entering_I = buffered_I & kept_I
        self._lost_LEK[site, expert_I[entering_I], plane_I[entering_I]] = False
        entering, leaving = int(size_I[entering_I].sum()), int(size_I[evicted_I].sum())
        stays_I = entering_I
        if leaving and self._cached_bytes + entering > self._cache_bytes:
            lost_ns_I = self._one_by_one(size_I, start_ns_I, done_ns_I, buffered_I, kept_I, evicted_I)
            lost_I = lost_ns_I >= 0
            stays_I = entering_I & ~lost_I
            self.lost += int(lost_I.sum())
            self._lost_LEK[site, expert_I[lost_I], plane_I[lost_I]] = True
            self._changes.append((lost_ns_I[lost_I], -size_I[lost_I]))
        self._cached_bytes += int(size_I[stays_I].sum()) - leaving
        gone_I = (buffered_I & ~kept_I) | evicted_I
        self._changes.append((done_ns_I[gone_I], -size_I[gone_I]))

    def peak_bytes(self) -> int:
        """The most bytes that were in memory at any instant, resident planes left out."""
        time_X = np.concatenate([time for time, _ in self._changes] + [np.array([t for t, _ in self._few], np.int64)])
        change_X = np.concatenate([by for _, by in self._changes] + [np.array([by for _, by in self._few], np.int64)])
        order = np.lexsort((change_X, time_X))
        return int(np.cumsum(change_X[order]).max(initial=0))

    def _one_by_one(
        self,
        size_I: IntArray,
        start_ns_I: IntArray,
        done_ns_I: IntArray,
        buffered_I: BoolArray,
        kept_I: BoolArray,
        evicted_I: BoolArray,
    ) -> IntArray:
        """When each plane was lost that should have gone to the cache (-1: it was not), (I,)."""
        lost_ns_I = np.full(len(size_I), -1, dtype=np.int64)
        size, cached = size_I.tolist(), self._cached_bytes
        buffered = int(size_I[buffered_I & (start_ns_I < 0)].sum())
        waiting: list[int] = []
        # at one instant experts are done before a read begins
        events = [(start, 1, item) for item, start in enumerate(start_ns_I.tolist()) if start >= 0]
        moving = np.flatnonzero(buffered_I | evicted_I).tolist()
        events += [(int(done_ns_I[item]), 0, item) for item in moving]
        for time_ns, begins, item in sorted(events):
            if begins:
                while buffered + size[item] > self._buffer_bytes:
                    gone = waiting.pop(0)
                    lost_ns_I[gone] = time_ns
                    buffered -= size[gone]
                buffered += size[item]
                continue
            if evicted_I[item]:
                cached -= size[item]
            elif kept_I[item]:
                waiting.append(item)
            else:
                buffered -= size[item]
            for one in waiting[:]:
                if cached + size[one] <= self._cache_bytes:
                    waiting.remove(one)
                    buffered, cached = buffered - size[one], cached + size[one]
        assert not waiting, "what the policy keeps fits when all else is gone"
        return lost_ns_I
