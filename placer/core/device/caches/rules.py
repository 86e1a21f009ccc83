"""Which plane goes first: the least recently used, the least often used, the one used next last, the layer before.

Legend: L routing sites, E experts, K planes, U uses of planes, plane after plane.
"""

from collections.abc import Sequence

import numpy as np

from placer.core.device.caches.held import HeldPlanes, Plane, RankedPlanes
from placer.core.device.work import DeviceWork, tokens_on_planes
from placer.core.errors import MismatchError

__all__ = ["Belady", "LeastFrequentlyUsed", "LeastRecentlyUsed", "PreviousLayerFirst"]

NEVER = 1 << 62


class LeastRecentlyUsed(RankedPlanes):
    """Throws out the plane whose last use is longest ago."""

    def _worth(self, plane: Plane) -> tuple[int, int, int]:
        return self._clock, 0, 0


class LeastFrequentlyUsed(RankedPlanes):
    """Throws out the plane with the fewest uses, held or not, since the start; among equals the least recently used."""

    def __init__(self, shape_LEK: tuple[int, int, int], plane_bytes_K: Sequence[int], capacity_bytes: int) -> None:
        super().__init__(shape_LEK, plane_bytes_K, capacity_bytes)
        self._uses: dict[Plane, int] = {}

    def _note_use(self, plane: Plane) -> None:
        self._uses[plane] = self._uses.get(plane, 0) + 1

    def _worth(self, plane: Plane) -> tuple[int, int, int]:
        return self._uses[plane], self._clock, 0


class Belady(RankedPlanes):
    """Throws out the plane whose next use is farthest, as `future` says: an oracle for work that is known.

    `future` is the work that will run, with demand clipped as it runs. The most hits of all where planes have one size
    (among caches filled on demand); with sizes that differ, only a good rule. Equals: the higher plane, then the higher
    expert. Raises MismatchError when the run leaves the future.
    """

    def __init__(
        self,
        shape_LEK: tuple[int, int, int],
        plane_bytes_K: Sequence[int],
        capacity_bytes: int,
        future: DeviceWork,
        *,
        nested: bool = True,
    ) -> None:
        super().__init__(shape_LEK, plane_bytes_K, capacity_bytes)
        if future.count_BLEK.shape[1:] != shape_LEK:
            raise MismatchError(
                f"the future has {future.count_BLEK.shape[1:]} (sites, experts, levels) and the cache {shape_LEK}; "
                "give the work that will run"
            )
        uses_BLEK = tokens_on_planes(future.count_BLEK, nested=nested) > 0
        # the iterations in which each plane is used, plane after plane
        *_, self._iteration_U = np.nonzero(np.moveaxis(uses_BLEK, 0, -1))
        self._end_LEK = np.cumsum(uses_BLEK.sum(axis=0).reshape(-1)).reshape(shape_LEK)
        self._at_LEK = self._end_LEK - uses_BLEK.sum(axis=0)
        self._iteration_L = [0] * shape_LEK[0]

    def _note_use(self, plane: Plane) -> None:
        at, now = int(self._at_LEK[plane]), self._iteration_L[plane[0]]
        if at == self._end_LEK[plane] or self._iteration_U[at] != now:
            raise MismatchError(
                f"iteration {now} uses plane {plane[2]} of expert {plane[1]} at site {plane[0]}, where the future "
                "given to the cache does not; give it the work that runs, clipped as it runs"
            )
        self._at_LEK[plane] = at + 1

    def _worth(self, plane: Plane) -> tuple[int, int, int]:
        at = int(self._at_LEK[plane])
        ahead = NEVER
        if at < self._end_LEK[plane]:
            ahead = int(self._iteration_U[at]) * self._shape_LEK[0] + plane[0]
        return -ahead, -plane[2], -plane[1]

    def _site_over(self, site: int) -> None:
        self._iteration_L[site] += 1


class PreviousLayerFirst(HeldPlanes):
    """D2MoE's algorithm 2 by its text: when a layer needs room, the layer before gives up its planes, high ones first.

    Then the layer before that, and so on around; at last the layer itself, where one layer alone is too much. Within a
    plane's height, least recently used first. (The paper's listing counts planes from the low end; its text, and its
    purpose that hot low planes survive, say the high end.)
    """

    def __init__(self, shape_LEK: tuple[int, int, int], plane_bytes_K: Sequence[int], capacity_bytes: int) -> None:
        super().__init__(shape_LEK, plane_bytes_K, capacity_bytes)
        # (-plane, last use) of every plane held, by site
        self._key_L: list[dict[Plane, tuple[int, int]]] = [{} for _ in range(shape_LEK[0])]
        self._out: list[Plane] = []
        self._back = 0
        self._clock = 0

    def _rank(self, plane: Plane) -> None:
        self._clock += 1
        self._key_L[plane[0]][plane] = (-plane[2], self._clock)

    def _next_out(self, site: int) -> Plane:
        while not self._out:
            self._back += 1
            keys = self._key_L[(site - self._back) % len(self._key_L)]
            self._out = sorted(keys, key=lambda plane: keys[plane], reverse=True)
        plane = self._out.pop()
        del self._key_L[plane[0]][plane]
        return plane

    def _site_over(self, site: int) -> None:
        self._out, self._back = [], 0
