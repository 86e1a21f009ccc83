"""Which planes stay in memory between layers, beside the resident ones: the caches that `simulate` and `run` share.

Every plane counts for itself: one that is held saves its own read, whatever else of its expert is held. Nested planes
of an expert are used from the lowest up to some level, so a lower one is used whenever a higher one is; all policies
break ties such that the higher plane goes first, and so hold a prefix of an expert's planes (a plane larger than the
whole cache never enters).
Legend: L routing sites, E experts, K planes.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from placer.core.device.caches.held import Plane
from placer.core.device.caches.rules import Belady, LeastFrequentlyUsed, LeastRecentlyUsed, PreviousLayerFirst
from placer.core.device.work import DeviceWork
from placer.core.errors import UsageError

__all__ = ["CACHE_POLICIES", "CachePolicy", "LeastRecentlyUsed", "NoCache", "Plane", "PlaneCache", "make_cache"]

BoolArray = npt.NDArray[np.bool_]

CachePolicy = Literal["none", "lru", "lfu", "belady", "d2moe"]
"""What goes first. none: all planes that are not resident, when their layer ends. lru: what was used longest ago. lfu:
what was used least often since the start (no aging; equals: longest ago). belady: what is used next farthest in the
future, which it must be told. d2moe: the planes of the layer before, from the high ones down (D2MoE's algorithm 2)."""

CACHE_POLICIES: tuple[CachePolicy, ...] = get_args(CachePolicy)


class PlaneCache(Protocol):
    """Planes that happen to be in memory. Resident planes never come here."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the planes it holds; never above its capacity."""

    def present_EK(self, site: int) -> BoolArray:
        """Which planes of this site it holds, (E, K)."""

    def end_site(self, site: int, used: Sequence[Plane]) -> tuple[list[Plane], list[Plane]]:
        """A site of an iteration is over: `used` are the planes it used, in the order of their use, resident ones not.

        Called once for every site of every iteration, also where nothing was used. Returns (planes taken in, planes
        thrown out); what was loaded and is in neither is dropped by the caller.
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


def make_cache(
    policy: CachePolicy,
    shape_LEK: tuple[int, int, int],
    plane_bytes_K: Sequence[int],
    capacity_bytes: int,
    *,
    future: DeviceWork | None = None,
    nested: bool = True,
) -> PlaneCache:
    """The cache that a policy names.

    `future`, the work that will run (clipped), and `nested`, whether it is of nested planes or of whole copies, are for
    belady alone. Raises UsageError for an unknown policy, and for belady without a future.
    """
    if policy == "none":
        return NoCache(*shape_LEK[1:])
    if policy == "belady":
        if future is None:
            raise UsageError("cache is 'belady', which has to know the work that will run; give it, or use lru")
        return Belady(shape_LEK, plane_bytes_K, capacity_bytes, future, nested=nested)
    kinds = {"lru": LeastRecentlyUsed, "lfu": LeastFrequentlyUsed, "d2moe": PreviousLayerFirst}
    if policy not in kinds:
        raise UsageError(f"cache is {policy!r}; use one of {', '.join(CACHE_POLICIES)}")
    return kinds[policy](shape_LEK, plane_bytes_K, capacity_bytes)
