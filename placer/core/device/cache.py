"""Which planes stay in memory between layers, beside the resident ones: the caches that `simulate` and `run` share.

Legend: L routing sites, E experts, K planes.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError

__all__ = ["CACHE_POLICIES", "CachePolicy", "LeastRecentlyUsed", "NoCache", "Plane", "PlaneCache", "make_cache"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

CachePolicy = Literal["none", "lru", "lfu", "belady", "d2moe"]
"""none: planes that are not resident are dropped when their layer ends. d2moe: its algorithm 2 (the layer before is
freed first, from its high planes down). belady: the plane whose next use is farthest goes; needs to know the future."""

CACHE_POLICIES: tuple[CachePolicy, ...] = get_args(CachePolicy)

Plane = tuple[int, int, int]
"""Site, expert, plane."""


class PlaneCache(Protocol):
    """Planes that happen to be in memory. Resident planes never come here."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the planes it holds; never above its capacity."""

    def present_EK(self, site: int) -> BoolArray:
        """Which planes of this site it holds, (E, K)."""

    def end_site(self, site: int, used: Sequence[Plane]) -> tuple[list[Plane], list[Plane]]:
        """A site of an iteration is over: `used` are the planes it used, in the order of their use, resident ones not.

        Returns (planes taken in, planes thrown out); what was loaded and is in neither is dropped by the caller.
        """


class NoCache:
    """Keeps nothing."""

    def __init__(self, num_experts: int, num_planes: int) -> None:
        self._none_EK = np.zeros((num_experts, num_planes), dtype=np.bool_)

    @property
    def used_bytes(self) -> int:
        """0."""
        return 0

    def present_EK(self, site: int) -> BoolArray:
        """Nothing."""
        return self._none_EK

    def end_site(self, site: int, used: Sequence[Plane]) -> tuple[list[Plane], list[Plane]]:
        """Takes nothing in."""
        return [], []


class LeastRecentlyUsed:
    """Throws out the plane whose last use is longest ago."""

    def __init__(self, shape_LEK: tuple[int, int, int], plane_bytes_K: Sequence[int], capacity_bytes: int) -> None:
        self._present_LEK = np.zeros(shape_LEK, dtype=np.bool_)
        self._bytes_K = tuple(plane_bytes_K)
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        # insertion order is the order of last use
        self._planes: dict[Plane, None] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes held."""
        return self._used_bytes

    def present_EK(self, site: int) -> BoolArray:
        """Which planes of this site it holds, (E, K)."""
        return self._present_LEK[site]

    def end_site(self, site: int, used: Sequence[Plane]) -> tuple[list[Plane], list[Plane]]:
        """Every used plane becomes the most recent one; what is oldest makes room."""
        before = set(self._planes)
        for plane in used:
            size = self._bytes_K[plane[2]]
            if plane in self._planes:
                del self._planes[plane]
            elif size > self._capacity_bytes:
                continue
            else:
                self._used_bytes += size
            self._planes[plane] = None
            while self._used_bytes > self._capacity_bytes:
                oldest = next(iter(self._planes))
                del self._planes[oldest]
                self._used_bytes -= self._bytes_K[oldest[2]]
        taken = [plane for plane in self._planes if plane not in before]
        thrown = [plane for plane in before if plane not in self._planes]
        for plane in taken:
            self._present_LEK[plane] = True
        for plane in thrown:
            self._present_LEK[plane] = False
        return taken, sorted(thrown)


def make_cache(
    policy: CachePolicy, shape_LEK: tuple[int, int, int], plane_bytes_K: Sequence[int], capacity_bytes: int
) -> PlaneCache:
    """The cache that a policy names. Raises UsageError for an unknown one."""
    if policy == "none":
        return NoCache(*shape_LEK[1:])
    if policy == "lru":
        return LeastRecentlyUsed(shape_LEK, plane_bytes_K, capacity_bytes)
    raise UsageError(f"cache is {policy!r}; use one of {', '.join(CACHE_POLICIES)}")
