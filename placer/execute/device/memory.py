"""Which planes are in memory, and as what: resident, cached, or loaded for the layer that runs. Never above the plan.

Not safe for threads: whoever calls holds the reader's lock. Legend: L routing sites, E experts, K planes.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from placer.core.device.cache import Plane
from placer.core.device.plan import DevicePlan
from placer.execute.device.arena import Arena

__all__ = ["PlaneMemory"]

BoolArray = npt.NDArray[np.bool_]


class PlaneMemory:
    """The planes in memory, in one arena.

    A plane that the cache policy keeps leaves the buffer when its expert is done. Where the cache has no room yet,
    because planes that the policy throws out are still needed, it waits in the buffer, and is lost if the buffer needs
    the room before: `lost` counts those. `peak_bytes` is the most that was held.
    """

    def __init__(self, plan: DevicePlan) -> None:
        self._bytes_K = plan.plane_bytes_K
        self._cache_bytes, self._buffer_bytes = plan.cache_bytes, plan.buffer_bytes
        self.arena = Arena(plan.plane_bytes_K, plan.resident_bytes + plan.cache_bytes + plan.buffer_bytes)
        shape_LEK = plan.present_LEK.shape
        self._present_LEK = np.zeros(shape_LEK, dtype=np.bool_)
        self._units: dict[Plane, npt.NDArray[np.int64]] = {}
        self._cached: set[Plane] = set()
        self._buffered: set[Plane] = set()
        self._waiting: dict[Plane, None] = {}
        self._cached_bytes = self._buffered_bytes = 0
        self.held_bytes = self.peak_bytes = self.lost = 0

    def present_EK(self, site: int) -> BoolArray:
        """Resident and cached planes of a site, (E, K), a copy."""
        return self._present_LEK[site].copy()

    def tensor(self, plane: Plane) -> Tensor:
        """A plane's packed bytes, uint8; see Arena.read."""
        return self.arena.read(self._units[plane], plane[2])

    def units(self, plane: Plane) -> npt.NDArray[np.int64]:
        """The units of a plane that is in memory."""
        return self._units[plane]

    def add_resident(self, plane: Plane) -> npt.NDArray[np.int64]:
        """Room for a plane that stays for good."""
        self._present_LEK[plane] = True
        return self._take(plane)

    def fits(self, plane: Plane) -> bool:
        """Whether the buffer has room for a plane."""
        waiting = sum(self._bytes_K[one[2]] for one in self._waiting)
        return self._buffered_bytes - waiting + self._bytes_K[plane[2]] <= self._buffer_bytes

    def add_buffered(self, plane: Plane) -> npt.NDArray[np.int64]:
        """Room in the buffer for a plane that fits."""
        size = self._bytes_K[plane[2]]
        while self._buffered_bytes + size > self._buffer_bytes:
            self.drop(next(iter(self._waiting)))
            self.lost += 1
        self._buffered.add(plane)
        self._buffered_bytes += size
        return self._take(plane)

    def expert_done(self, planes: Iterable[Plane], keep_EK: BoolArray) -> None:
        """An expert of the site that runs is done: its planes leave the buffer, for the cache where `keep_EK` says."""
        for plane in planes:
            if plane in self._buffered:
                if keep_EK[plane[1:]]:
                    self._waiting[plane] = None
                else:
                    self.drop(plane)
            elif plane in self._cached and not keep_EK[plane[1:]]:
                self.drop(plane)
        self._to_cache()

    def end_site(self) -> None:
        """The site is over: what has found no room in the cache is lost."""
        for plane in list(self._waiting):
            self.drop(plane)
            self.lost += 1

    def drop(self, plane: Plane) -> None:
        """Frees a plane that is cached or in the buffer; nothing where it is neither."""
        size = self._bytes_K[plane[2]]
        if plane in self._buffered:
            self._buffered.remove(plane)
            self._waiting.pop(plane, None)
            self._buffered_bytes -= size
        elif plane in self._cached:
            self._cached.remove(plane)
            self._present_LEK[plane] = False
            self._cached_bytes -= size
        else:
            return
        self.arena.give_back(self._units.pop(plane))
        self.held_bytes -= size

    def clear(self) -> None:
        """Drops everything that is not resident."""
        for plane in [*self._cached, *self._buffered]:
            self.drop(plane)

    def _to_cache(self) -> None:
        for plane in list(self._waiting):
            size = self._bytes_K[plane[2]]
            if self._cached_bytes + size <= self._cache_bytes:
                del self._waiting[plane]
                self._buffered.remove(plane)
                self._buffered_bytes -= size
                self._cached.add(plane)
                self._present_LEK[plane] = True
                self._cached_bytes += size

    def _take(self, plane: Plane) -> npt.NDArray[np.int64]:
        units_U = self._units[plane] = self.arena.take(plane[2])
        self.held_bytes += self._bytes_K[plane[2]]
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return units_U
