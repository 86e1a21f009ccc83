"""One routing site of one iteration: what is missing is read in the plan's order while what is there is computed.

Legend: T tokens, K choices of a token (`_TK`) and levels (`_EK`), H hidden size, E experts, X rows of one item.
"""

from time import perf_counter_ns

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.core.device.buffer import fitting_order, prefetch_planes
from placer.core.device.cache import Plane, PlaneCache, make_cache
from placer.core.device.items import Items, ItemTimes, layer_items, order_items
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.timeline import PHASES
from placer.execute.device.memory import PlaneMemory
from placer.execute.device.reader import PlaneReader
from placer.execute.device.rows import ItemRows
from placer.execute.experts import swiglu
from placer.execute.planes import expert_weights

__all__ = ["SiteRunner", "Span"]

IntArray = npt.NDArray[np.int64]
Span = tuple[int, int, int, int, int]
"""Site, phase, begin and end in nanoseconds, tokens."""

ATTENTION, EXPERTS = PHASES.index("attention"), PHASES.index("experts")


class SiteRunner:
    """Runs the experts of one site after another, as the plan says, on the processor.

    spans      what the processor did; they follow each other without gaps where nothing had to be waited for
    begin_ns   when the span that is running began
    prefetched, prefetch_used   planes that were to be read ahead, and those of them that were needed
    """

    def __init__(
        self, plan: DevicePlan, index: PlaneIndex, device: DeviceSpec, memory: PlaneMemory, reader: PlaneReader
    ) -> None:
        self._plan, self._index, self._device = plan, index, device
        self._memory, self._reader = memory, reader
        self._ladder, self._bytes_K = plan.ladder, plan.plane_bytes_K
        self._resident_LEK = plan.present_LEK
        self._cache: PlaneCache = self._new_cache()
        self.spans: list[Span] = []
        self.begin_ns = 0
        self.prefetched = self.prefetch_used = 0

    def start_over(self) -> None:
        """Nothing but the resident planes is in memory, as before the first iteration."""
        arrived, reading = self._reader.settle(-1)
        self._reader.need((), [*arrived, *([] if reading is None else [reading])])
        # a read ahead that nobody needs is still written to its place
        self._reader.finish()
        with self._reader.changed:
            self._memory.clear()
        self._cache = self._new_cache()
        self.prefetched = self.prefetch_used = 0

    def attended(self, site: int, tokens: int) -> None:
        """Ends a span of attention in front of `site` (-1: behind the last)."""
        now = perf_counter_ns()
        self.spans.append((site, ATTENTION, self.begin_ns, now, tokens))
        self.begin_ns = now

    def run(self, site: int, x_TH: Tensor, rows: ItemRows, predicted_EK: IntArray | None = None) -> Tensor:
        """Outputs of every (token, choice), (T, K, H), zero where there is none; `rows` says who goes where.

        `predicted_EK`: what the next site is expected to get (None: nothing is read ahead).
        Raises InfeasibleError where an expert does not fit the buffer, and what ended the reader.
        """
        items, needed, keep_EK = self._decide(site, rows.count_EK, predicted_EK)
        result_XH = x_TH.new_zeros(rows.pairs + 1, x_TH.shape[1])
        padded_TH = torch.cat([x_TH, x_TH.new_zeros(1, x_TH.shape[1])])
        left = np.bincount(items.expert_I, minlength=self._plan.num_experts).tolist()
        planes_of: dict[int, list[Plane]] = {}
        self.attended(site, len(x_TH))
        for expert, plane, tokens in zip(
            items.expert_I.tolist(), items.plane_I.tolist(), items.tokens_I.tolist(), strict=True
        ):
            key = (site, expert, plane)
            planes_of.setdefault(expert, []).append(key)
            if key in needed and self._reader.wait(key):
                self.begin_ns = perf_counter_ns()
            if tokens:
                self._compute(site, expert, plane, padded_TH, result_XH, rows)
                now = perf_counter_ns()
                self.spans.append((site, EXPERTS, self.begin_ns, now, tokens))
                self.begin_ns = now
            left[expert] -= 1
            if not left[expert]:
                with self._reader.changed:
                    self._memory.expert_done(planes_of[expert], keep_EK)
                    self._reader.changed.notify_all()
        with self._reader.changed:
            self._memory.end_site()
        return result_XH[:-1].view(*rows.shape_TK, x_TH.shape[1])

    def _compute(
        self, site: int, expert: int, plane: int, padded_TH: Tensor, result_XH: Tensor, rows: ItemRows
    ) -> None:
        packed = [self._memory.tensor((site, expert, one)) for one in self._ladder.planes_of(plane + 1)]
        weights = expert_weights(packed, self._ladder, self._index.shapes)
        token_X, pair_X = rows.of(expert, plane)
        result_XH.index_copy_(0, pair_X, swiglu(padded_TH.index_select(0, token_X), weights))

    def _decide(
        self, site: int, count_EK: IntArray, predicted_EK: IntArray | None
    ) -> tuple[Items, set[Plane], npt.NDArray[np.bool_]]:
        """Items in the order in which they run, the planes to wait for, and those that the cache keeps afterwards."""
        arrived, reading = self._reader.settle(site)
        with self._reader.changed:
            present_EK = self._memory.present_EK(site)
        for plane in arrived:
            present_EK[plane[1:]] = True
        items = layer_items(count_EK, present_EK, self._ladder)
        wanted = set(zip([site] * len(items), items.expert_I.tolist(), items.plane_I.tolist(), strict=True))
        kept = [plane for plane in (*arrived, *([reading] if reading else [])) if plane in wanted]
        self.prefetch_used += len(kept)
        kept_bytes = sum(self._bytes_K[plane[2]] for plane in kept)
        times = ItemTimes.of(items, self._device, self._ladder, self._bytes_K)
        order_I = order_items(items, self._plan.order, times)
        order_I = fitting_order(items, times, order_I, self._plan.buffer_bytes - kept_bytes)
        items = items.taken(order_I)
        missing = [
            (site, expert, plane)
            for expert, plane, present in zip(
                items.expert_I.tolist(), items.plane_I.tolist(), items.present_I.tolist(), strict=True
            )
            if not present
        ]
        to_read = [plane for plane in missing if plane != reading]
        unwanted = [plane for plane in (*arrived, *([reading] if reading else [])) if plane not in wanted]
        self._reader.need(to_read, unwanted)
        if self._plan.prefetch_layers and predicted_EK is not None and site + 1 < len(self._plan.moe_layers):
            self._read_ahead(site + 1, predicted_EK, kept_bytes + sum(self._bytes_K[plane[2]] for plane in to_read))
        return items, set(missing), self._keep(site, items)

    def _read_ahead(self, site: int, predicted_EK: IntArray, taken_bytes: int) -> None:
        room = self._plan.buffer_bytes - taken_bytes - sum(self._bytes_K)
        with self._reader.changed:
            present_EK = self._memory.present_EK(site)
        planes = prefetch_planes(predicted_EK, present_EK, self._ladder, self._bytes_K, room)
        self.prefetched += len(planes)
        self._reader.expect([(site, *plane) for plane in planes])

    def _keep(self, site: int, items: Items) -> npt.NDArray[np.bool_]:
        """Tells the cache now what the site will have used, so that what it throws out can make room at once."""
        resident_EK = self._resident_LEK[site]
        pairs = zip(items.expert_I.tolist(), items.plane_I.tolist(), strict=True)
        used = [(site, expert, plane) for expert, plane in pairs if not resident_EK[expert, plane]]
        _, thrown = self._cache.end_site(site, used)
        still = set(used)
        with self._reader.changed:
            for plane in thrown:
                if plane not in still:
                    self._memory.drop(plane)
            self._reader.changed.notify_all()
        return self._cache.present_EK(site) | resident_EK

    def _new_cache(self) -> PlaneCache:
        plan = self._plan
        return make_cache(plan.cache, self._resident_LEK.shape, plan.plane_bytes_K, plan.cache_bytes)
