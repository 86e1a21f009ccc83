"""ExpertFlow's expert cache: slots shared among layers by predicted demand, refilled as layers finish, and corrected.

Items are experts of layers, site * E + expert. Legend: L routing sites, S passes (steps), E experts, A accesses,
P predicted accesses.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError
from solvers.cache.prefetch import IdArray, check_prediction
from solvers.cache.run import CacheRun
from traces.accesses import step_accesses, trace_accesses
from traces.trace import RoutingTrace

__all__ = ["allocate_slots", "expert_flow"]

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


def expert_flow(
    trace: RoutingTrace,
    predicted_LTK: IdArray,
    slots: int,
    batches: Sequence[npt.NDArray[np.integer]] | None = None,
) -> CacheRun:
    """Hits of one cache of L `slots` experts that all layers share, when a whole pass is predicted before it begins.

    predicted_LTK as in `hit_rate_with_prediction`. A pass (one step through all layers):
    (1) `allocate_slots` gives each layer its part; so many of its predicted experts, those held and then the hottest,
    are kept or loaded: reserved for it. (2) A layer's needed experts that are held when it begins are hits. Its others
    are loaded on demand, over its prefetched experts that nobody needed, then over the least recently used of what no
    later layer has reserved, at last over those of the layer itself that are used already. (3) A finished layer's slots
    are reserved for predicted experts of later layers, nearest layer first. The rest stays until its slot is wanted.
    Counts, not time: a prefetch is taken to arrive, so a layer late in the pass finds more than the first one.
    Guarantee: with exact predictions a layer hits as many as it needs or has slots, the most that any choice for these
    slots can (Belady's within the pass); with any predictions never fewer than an LRU over all layers with L `slots`
    less the experts predicted for a pass. Complexity: O(A + P) list operations, plus skips over reserved experts.
    Raises UsageError.
    Reference: ExpertFlow (arXiv 2410.17954), section on the expert cache engine; the released code has fixed slots.
    """
    check_prediction(trace, predicted_LTK)
    if slots < 0:
        raise UsageError(f"slots is {slots}; give the experts that a layer's share of the cache holds, 0 or more")
    needed = trace_accesses(trace, batches)
    limits = [site.num_experts for site in trace.model.sites]
    predicted = step_accesses(predicted_LTK, limits, batches, hottest_first=True)
    hits_L, prefetched_L, most_held = _replay_passes(
        needed.start_LS, needed.expert_A, predicted.start_LS, predicted.expert_A, slots, needed.num_experts
    )
    return CacheRun(
        slots=slots, accesses_L=needed.accesses_L, hits_L=hits_L, prefetched_L=prefetched_L, most_held=int(most_held)
    )


def allocate_slots(demand_L: IntArray, slots: int) -> IntArray:
    """Slots of each layer in proportion to demand, (L,): what the layers up to each one get together is rounded up.

    Together min(slots, all demand), and no layer gets more than its demand, or differs by a whole slot from its share.
    Demand 3 and 2 with 4 slots gives 3 and 1.
    """
    if slots < 0 or (len(demand_L) and int(demand_L.min()) < 0):
        raise UsageError(f"demand_L is {demand_L.tolist()} and slots {slots}; give counts, 0 or more")
    return _allocate(demand_L.astype(np.int64), slots)


@njit(cache=True, nogil=True)
def _allocate(demand_L: IntArray, slots: int) -> IntArray:
    total = demand_L.sum()
    slots = min(slots, total)
    result_L = np.zeros(len(demand_L), dtype=np.int64)
    demand, given = 0, 0
    for site in range(len(demand_L)):
        if total > 0:
            demand += demand_L[site]
            result_L[site] = -(-slots * demand // total) - given
            given += result_L[site]
    return result_L


@njit(cache=True, nogil=True)
def _unlink(item: int, next_X: IntArray, before_X: IntArray) -> None:
    next_X[before_X[item]] = next_X[item]
    before_X[next_X[item]] = before_X[item]


@njit(cache=True, nogil=True)
def _link_after(item: int, place: int, next_X: IntArray, before_X: IntArray) -> None:
    next_X[item] = next_X[place]
    before_X[item] = place
    before_X[next_X[place]] = item
    next_X[place] = item


@njit(cache=True, nogil=True)
def _drop_first(next_X: IntArray, before_X: IntArray, held_X: BoolArray, reserved_X: BoolArray) -> None:
    """Drops the first of the list that is not reserved; the caller knows that there is one."""
    item = next_X[len(next_X) - 1]
    while reserved_X[item]:
        item = next_X[item]
    _unlink(item, next_X, before_X)
    held_X[item] = False


@njit(cache=True, nogil=True)
def _replay_passes(
    start_LS: IntArray, expert_A: Int32Array, from_LS: IntArray, expert_P: Int32Array, slots: int, num_experts: int
) -> tuple[IntArray, IntArray, int]:
    sites, steps = start_LS.shape[0], start_LS.shape[1] - 1
    capacity = slots * sites
    head = sites * num_experts
    # a ring of held items, the first to go first; prefetched ones that were not needed yet are in no list
    next_X = np.full(head + 1, head, dtype=np.int64)
    before_X = np.full(head + 1, head, dtype=np.int64)
    held_X = np.zeros(head, dtype=np.bool_)
    reserved_X = np.zeros(head, dtype=np.bool_)
    fresh_X = np.zeros(head, dtype=np.bool_)
    hits_L = np.zeros(sites, dtype=np.int64)
    prefetched_L = np.zeros(sites, dtype=np.int64)
    demand_L = np.zeros(sites, dtype=np.int64)
    held, most_held = 0, 0
    for step in range(steps):
        for site in range(sites):
            demand_L[site] = from_LS[site, step + 1] - from_LS[site, step]
        share_L = _allocate(demand_L, capacity)
        reserved = share_L.sum()
        # reserve what is held before anything is loaded over it
        for site in range(sites):
            for at in range(from_LS[site, step], from_LS[site, step + 1]):
                item = site * num_experts + expert_P[at]
                if share_L[site] > 0 and held_X[item]:
                    reserved_X[item] = True
                    share_L[site] -= 1
        for site in range(sites):
            for at in range(from_LS[site, step], from_LS[site, step + 1]):
                item = site * num_experts + expert_P[at]
                if share_L[site] > 0 and not held_X[item]:
                    share_L[site] -= 1
                    if held == capacity:
                        _drop_first(next_X, before_X, held_X, reserved_X)
                        held -= 1
                    held += 1
                    held_X[item] = reserved_X[item] = fresh_X[item] = True
                    prefetched_L[site] += 1
        most_held = max(most_held, held)
        later, later_at = 0, from_LS[0, step]
        for site in range(sites):
            base = site * num_experts
            for at in range(from_LS[site, step], from_LS[site, step + 1]):
                item = base + expert_P[at]
                if reserved_X[item]:
                    reserved_X[item] = False
                    reserved -= 1
            for at in range(start_LS[site, step], start_LS[site, step + 1]):
                item = base + expert_A[at]
                if held_X[item]:
                    hits_L[site] += 1
                    if fresh_X[item]:
                        fresh_X[item] = False
                    else:
                        _unlink(item, next_X, before_X)
            # prefetched and not needed: the first to go
            for at in range(from_LS[site, step], from_LS[site, step + 1]):
                item = base + expert_P[at]
                if fresh_X[item]:
                    fresh_X[item] = False
                    _link_after(item, head, next_X, before_X)
            for at in range(start_LS[site, step], start_LS[site, step + 1]):
                item = base + expert_A[at]
                held += not held_X[item]
                held_X[item] = True
                _link_after(item, before_X[head], next_X, before_X)
            while held > capacity:
                _drop_first(next_X, before_X, held_X, reserved_X)
                held -= 1
            most_held = max(most_held, held)
            while reserved < capacity:
                while later < sites and (later <= site or later_at >= from_LS[later, step + 1]):
                    later += 1
                    later_at = from_LS[later, step] if later < sites else 0
                if later == sites:
                    break
                item = later * num_experts + expert_P[later_at]
                later_at += 1
                if reserved_X[item]:
                    continue
                if not held_X[item]:
                    if held == capacity:
                        _drop_first(next_X, before_X, held_X, reserved_X)
                        held -= 1
                    held_X[item] = fresh_X[item] = True
                    held += 1
                    prefetched_L[later] += 1
                reserved_X[item] = True
                reserved += 1
            most_held = max(most_held, held)
    return hits_L, prefetched_L, most_held
