"""What happens at a routing: items, their order, what is read, what is read ahead, and what the cache keeps.

Both fidelities decide here, so that they differ in nothing but the clock. Legend: L routing sites, E experts, K planes,
I items of a site in the order in which they run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.buffer import fitting_order, prefetch_planes
from placer.core.device.cache import make_cache
from placer.core.device.items import Items, ItemTimes, layer_items, order_items
from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from sim.device.memory import Memory

__all__ = ["ExpertPlane", "SiteTask", "Sites"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

ExpertPlane = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteTask:
    """What one site of one iteration has to do.

    items, times   in the order in which the processor takes them; a plane that is missing has bytes and a read
    flight         items whose plane is on its way, read ahead; read: the other items whose plane is missing, in order
    ahead          planes of the next site that are to be read when this site's are
    done_I         for each item the last item of its expert
    size_I         bytes of the item's plane, missing or not
    buffered_I     planes that are, or will be, in the buffer; kept_I: planes that are in the cache when the site is
                   over; evicted_I: planes that leave the cache when they have been used
    """

    site: int
    items: Items
    times: ItemTimes
    flight: list[int]
    read: list[int]
    ahead: list[ExpertPlane]
    done_I: IntArray
    size_I: IntArray
    buffered_I: BoolArray
    kept_I: BoolArray
    evicted_I: BoolArray


class Sites:
    """Decides at every routing, and counts.

    cache_hits      planes used that were in the cache      demand_reads    planes used that had to be read
    prefetched      planes that were to be read ahead       prefetch_used   those of them that were begun and needed
    used_ahead_bytes   bytes of the latter
    """

    def __init__(self, plan: DevicePlan, device: DeviceSpec, future: DeviceWork) -> None:
        self._plan, self._device = plan, device
        self._resident_LEK = plan.present_LEK
        shape = self._resident_LEK.shape
        self._cache = make_cache(
            plan.cache, shape, plan.plane_bytes_K, plan.cache_bytes, future=future, nested=plan.ladder.nested
        )
        self._bytes_K = np.asarray(plan.plane_bytes_K, dtype=np.int64)
        self.memory = Memory(shape, plan.cache_bytes, plan.buffer_bytes)
        self.cache_hits = self.demand_reads = self.prefetched = self.prefetch_used = self.used_ahead_bytes = 0

    def present_EK(self, site: int) -> BoolArray:
        """Resident and cached planes of a site, (E, K)."""
        return self._resident_LEK[site] | self.memory.without_lost(site, self._cache.present_EK(site))

    def route(
        self,
        now_ns: int,
        site: int,
        count_EK: IntArray,
        predicted_EK: IntArray | None = None,
        arrived: Sequence[ExpertPlane] = (),
        flight: Sequence[ExpertPlane] = (),
    ) -> SiteTask:
        """The task of a site whose routing is known now.

        predicted_EK: tokens expected of the next site (None: nothing is read ahead); arrived, flight: planes of this
        site that were read ahead, those not needed included. Raises InfeasibleError where an expert does not fit.
        """
        plan, bytes_K = self._plan, self._bytes_K
        before_EK = self.present_EK(site)
        present_EK = before_EK
        if arrived:
            present_EK = before_EK.copy()
            for plane in arrived:
                present_EK[plane] = True
        items = layer_items(count_EK, present_EK, plan.ladder)
        times = ItemTimes.of(items, self._device, plan.ladder, plan.plane_bytes_K)
        ahead_EK = np.zeros(before_EK.shape, dtype=np.bool_)
        for plane in (*arrived, *flight):
            ahead_EK[plane] = True
        kept_bytes = int(bytes_K[items.plane_I[ahead_EK[items.expert_I, items.plane_I]]].sum())
        order_I = order_items(items, plan.order, times)
        order_I = fitting_order(items, times, order_I, plan.buffer_bytes - kept_bytes)
        items, times = items.taken(order_I), times.taken(order_I)
        ahead_I = ahead_EK[items.expert_I, items.plane_I]
        read = np.flatnonzero(~items.present_I & ~ahead_I).tolist()
        ahead: list[ExpertPlane] = []
        if predicted_EK is not None:
            room = plan.buffer_bytes - kept_bytes - int(times.bytes_I[read].sum()) - int(bytes_K.sum())
            present_next_EK = self.present_EK(site + 1)
            ahead = prefetch_planes(predicted_EK, present_next_EK, plan.ladder, plan.plane_bytes_K, room)
        cached_I = before_EK[items.expert_I, items.plane_I] & ~self._resident_LEK[site, items.expert_I, items.plane_I]
        self.cache_hits += int(cached_I.sum())
        self.demand_reads += len(read)
        self.prefetched += len(ahead)
        self.prefetch_used += int(ahead_I.sum())
        self.used_ahead_bytes += kept_bytes
        kept_I = self._keep(now_ns, site, items)
        last_E = np.zeros(len(before_EK), dtype=np.int64)
        last_E[items.expert_I] = np.arange(len(items))
        return SiteTask(
            site=site,
            items=items,
            times=times,
            flight=np.flatnonzero(~items.present_I & ahead_I).tolist(),
            read=read,
            ahead=ahead,
            done_I=last_E[items.expert_I],
            size_I=bytes_K[items.plane_I],
            buffered_I=~items.present_I | ahead_I,
            kept_I=kept_I,
            evicted_I=cached_I & ~kept_I,
        )

    def over(self, task: SiteTask, start_ns_I: IntArray, end_ns_I: IntArray) -> None:
        """The site's items have been computed: when their planes' reads began (-1: not in here), when they ended."""
        self.memory.site_over(
            task.site,
            task.items.expert_I,
            task.items.plane_I,
            task.size_I,
            start_ns_I,
            end_ns_I[task.done_I],
            task.buffered_I,
            task.kept_I,
            task.evicted_I,
        )

    def _keep(self, now_ns: int, site: int, items: Items) -> BoolArray:
        """Which items' planes are in the cache when the site is over, (I,).

        The cache is told now what the site will have used, so that what it throws out makes room at once.
        """
        if self._plan.cache == "none":
            return np.zeros(len(items), dtype=np.bool_)
        free_I = ~self._resident_LEK[site, items.expert_I, items.plane_I]
        pairs = zip(items.expert_I[free_I].tolist(), items.plane_I[free_I].tolist(), strict=True)
        used = [(site, expert, plane) for expert, plane in pairs]
        _, thrown = self._cache.end_site(site, used)
        still = set(used)
        self.memory.thrown(now_ns, [plane for plane in thrown if plane not in still], self._plan.plane_bytes_K)
        return free_I & self._cache.present_EK(site)[items.expert_I, items.plane_I]
