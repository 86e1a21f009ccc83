"""Planes held in so many bytes: what all caches of planes have in common, whichever goes first.

Legend: L routing sites, E experts, K planes.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError

__all__ = ["HeldPlanes", "Plane", "RankedPlanes"]

BoolArray = npt.NDArray[np.bool_]

Plane = tuple[int, int, int]
"""Site, expert, plane."""


class HeldPlanes:
    """What all caches have in common: the planes held, their bytes, and what came and went with a site."""

    def __init__(self, shape_LEK: tuple[int, int, int], plane_bytes_K: Sequence[int], capacity_bytes: int) -> None:
        if len(plane_bytes_K) != shape_LEK[2]:
            raise UsageError(
                f"plane_bytes_K has {len(plane_bytes_K)} sizes; give one for each of {shape_LEK[2]} planes"
            )
        if capacity_bytes < 0:
            raise UsageError(f"capacity_bytes is {capacity_bytes}; give the bytes of the cache, 0 or more")
        self._shape_LEK = shape_LEK
        self._present_LEK = np.zeros(shape_LEK, dtype=np.bool_)
        self._bytes_K = tuple(plane_bytes_K)
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes held."""
        return self._used_bytes

    def present_EK(self, site: int) -> BoolArray:
        """Which planes of this site it holds, (E, K)."""
        return self._present_LEK[site]

    def end_site(self, site: int, used: Sequence[Plane]) -> tuple[list[Plane], list[Plane]]:
        """All used planes come in, then planes go until the rest fits. Complexity: O(u log n), u used of n held."""
        new = []
        for plane in _last_use_order(used):
            size = self._bytes_K[plane[2]]
            self._note_use(plane)
            if size > self._capacity_bytes:
                continue
            if not self._present_LEK[plane]:
                self._present_LEK[plane] = True
                self._used_bytes += size
                new.append(plane)
            self._rank(plane)
        arrived, thrown = set(new), []
        while self._used_bytes > self._capacity_bytes:
            plane = self._next_out(site)
            self._present_LEK[plane] = False
            self._used_bytes -= self._bytes_K[plane[2]]
            if plane in arrived:
                arrived.remove(plane)
            else:
                thrown.append(plane)
        self._site_over(site)
        return [plane for plane in new if plane in arrived], sorted(thrown)

    def _note_use(self, plane: Plane) -> None:
        """A plane was used, whether it is held or not."""

    def _rank(self, plane: Plane) -> None:
        """A held plane was used: where does it stand now."""
        raise NotImplementedError

    def _next_out(self, site: int) -> Plane:
        """Takes the next plane to go out of the ranking; there is one."""
        raise NotImplementedError

    def _site_over(self, site: int) -> None:
        """The site is settled."""


class RankedPlanes(HeldPlanes):
    """Planes go by a key that changes only when they are used, the lowest first."""

    def __init__(self, shape_LEK: tuple[int, int, int], plane_bytes_K: Sequence[int], capacity_bytes: int) -> None:
        super().__init__(shape_LEK, plane_bytes_K, capacity_bytes)
        self._key: dict[Plane, tuple[int, int, int]] = {}
        # entries whose key is not the plane's any more are skipped
        self._heap: list[tuple[tuple[int, int, int], Plane]] = []
        self._clock = 0

    def _worth(self, plane: Plane) -> tuple[int, int, int]:
        raise NotImplementedError

    def _rank(self, plane: Plane) -> None:
        self._clock += 1
        key = self._key[plane] = self._worth(plane)
        heapq.heappush(self._heap, (key, plane))
        if len(self._heap) > 2 * len(self._key) + 64:
            self._heap = [(key, plane) for plane, key in self._key.items()]
            heapq.heapify(self._heap)

    def _next_out(self, site: int) -> Plane:
        while True:
            key, plane = heapq.heappop(self._heap)
            if self._key.get(plane) == key:
                del self._key[plane]
                return plane


def _last_use_order(used: Sequence[Plane]) -> list[Plane]:
    """Experts in the order of their last use, each one's planes from the highest down: the lower is worth more."""
    planes_of: dict[tuple[int, int], list[Plane]] = {}
    for plane in used:
        planes = planes_of.pop(plane[:2], [])
        planes_of[plane[:2]] = [*planes, plane]
    return [plane for planes in planes_of.values() for plane in sorted(planes, reverse=True)]
