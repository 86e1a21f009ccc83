"""The times of `placer.core.device.evaluate` for plans without a cache, compiled: what planners call often.

Legend: B iterations, L routing sites, E experts, K levels of the ladder, N tokens of an item, I items of a site.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.device.items import Items, ItemTimes, OrderRule, layer_items, order_items
from placer.core.device.ladder import BitLadder
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError

__all__ = ["COMPILED_RULES", "Replay", "compute_ns_KN", "replay"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

COMPILED_RULES: tuple[OrderRule, ...] = ("by_id", "hebf", "resident_first", "hebf_exact")
"""Rules that are compiled here; another goes through `order_items`, site by site."""

EXACT_RULE, RESIDENT_RULE = COMPILED_RULES.index("hebf_exact"), COMPILED_RULES.index("resident_first")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """Nanoseconds from every site's routing to its last item, and the bytes read there, (B, L) each."""

    makespan_ns_BL: IntArray
    read_bytes_BL: IntArray


def compute_ns_KN(device: DeviceSpec, ladder: BitLadder, plane_bytes_K: tuple[int, ...], tokens: int) -> IntArray:
    """Nanoseconds of an item of each plane with 0 to `tokens` tokens, (K, tokens + 1), as `ItemTimes` has them."""
    plane_I, tokens_I = (grid.reshape(-1) for grid in np.mgrid[0 : ladder.levels, 0 : tokens + 1])
    items = Items(
        expert_I=np.zeros_like(plane_I),
        plane_I=plane_I,
        tokens_I=tokens_I,
        heat_I=tokens_I,
        present_I=np.ones(len(plane_I), dtype=np.bool_),
    )
    return ItemTimes.of(items, device, ladder, plane_bytes_K).compute_ns_I.reshape(ladder.levels, tokens + 1)


def replay(
    work: DeviceWork,
    present_LEK: BoolArray,
    *,
    order: OrderRule,
    buffer_bytes: int,
    device: DeviceSpec,
    ladder: BitLadder,
    plane_bytes_K: tuple[int, ...],
) -> Replay:
    """What work already clipped costs with these planes resident and no cache.

    Raises InfeasibleError where an expert's missing planes do not fit the buffer, UsageError for an unknown order.
    Complexity: O(B L I^2), and O(B L I^2 E log E) where the buffer is too small for a site's missing planes.
    """
    count_BLEK = np.ascontiguousarray(work.count_BLEK)
    iterations, sites = count_BLEK.shape[:2]
    compiled = order in COMPILED_RULES
    rank_BLEK = np.zeros((1, 1, 1, 1) if compiled else count_BLEK.shape, dtype=np.int64)
    if not compiled:
        for iteration in range(iterations):
            for site in range(sites):
                items = layer_items(count_BLEK[iteration, site], present_LEK[site], ladder)
                order_I = order_items(items, order, ItemTimes.of(items, device, ladder, plane_bytes_K))
                at = rank_BLEK[iteration, site]
                at[items.expert_I[order_I], items.plane_I[order_I]] = np.arange(len(order_I))
    bytes_K = np.asarray(plane_bytes_K, dtype=np.int64)
    makespan_ns_BL, read_bytes_BL, stuck = _replay(
        count_BLEK,
        present_LEK,
        COMPILED_RULES.index(order) if compiled else -1,
        rank_BLEK,
        buffer_bytes,
        ladder.nested,
        bytes_K,
        np.array([device.read_ns(size) for size in plane_bytes_K], dtype=np.int64),
        np.array([device.copy_ns(size) for size in plane_bytes_K], dtype=np.int64),
        compute_ns_KN(device, ladder, plane_bytes_K, int(count_BLEK.max(initial=0))),
    )
    if stuck:
        raise InfeasibleError(
            f"an expert needs {stuck} bytes at once and the buffer has {buffer_bytes}; give a larger memory budget, or "
            "keep fewer planes resident"
        )
    return Replay(makespan_ns_BL=makespan_ns_BL, read_bytes_BL=read_bytes_BL)


@njit(cache=True)
def _replay(
    count_BLEK: IntArray,
    present_LEK: BoolArray,
    rule: int,
    rank_BLEK: IntArray,
    buffer_bytes: int,
    nested: bool,
    bytes_K: IntArray,
    read_ns_K: IntArray,
    copy_ns_K: IntArray,
    compute_ns_KN: IntArray,
) -> tuple[IntArray, IntArray, int]:  # pragma: no cover - compiled
    iterations, sites, experts, levels = count_BLEK.shape
    makespan_ns_BL = np.zeros((iterations, sites), dtype=np.int64)
    read_bytes_BL = np.zeros((iterations, sites), dtype=np.int64)
    most = experts * levels
    expert_I, plane_I = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    heat_I, bytes_I = np.empty(most, dtype=np.int64), np.empty(most, dtype=np.int64)
    # sort keys: ascending, whole numbers
    key_I3 = np.empty((most, 4), dtype=np.int64)
    order_I = np.empty(most, dtype=np.int64)
    for iteration in range(iterations):
        for site in range(sites):
            size = 0
            total = 0
            for expert in range(experts):
                above = 0
                for plane in range(levels - 1, -1, -1):
                    above += count_BLEK[iteration, site, expert, plane]
                if above == 0:
                    continue
                missing = 0
                for plane in range(levels):
                    heat = above if nested else count_BLEK[iteration, site, expert, plane]
                    above -= count_BLEK[iteration, site, expert, plane]
                    if heat == 0:
                        continue
                    present = present_LEK[site, expert, plane]
                    expert_I[size], plane_I[size], heat_I[size] = expert, plane, heat
                    bytes_I[size] = 0 if present else bytes_K[plane]
                    missing += bytes_I[size]
                    if rule == 0:
                        key_I3[size, 0], key_I3[size, 1], key_I3[size, 2], key_I3[size, 3] = 0, expert, plane, 0
                    elif rule == -1:
                        key_I3[size, :] = 0
                        key_I3[size, 0] = rank_BLEK[iteration, site, expert, plane]
                    else:
                        tokens = count_BLEK[iteration, site, expert, plane]
                        key_I3[size, 0] = 1 if rule == RESIDENT_RULE and not present else 0
                        key_I3[size, 1] = -tokens if rule == EXACT_RULE else -heat
                        key_I3[size, 2], key_I3[size, 3] = plane, expert
                    size += 1
                total += missing
                if missing > buffer_bytes:
                    return makespan_ns_BL, read_bytes_BL, missing
            if rule > 0:
                _heads_first(key_I3, expert_I, size, order_I)
            else:
                _sorted(key_I3, size, order_I)
            if total > buffer_bytes:
                _fit(expert_I, bytes_I, size, experts, buffer_bytes, order_I)
            read_bytes_BL[iteration, site] = total
            makespan_ns_BL[iteration, site] = _run(
                count_BLEK[iteration, site], expert_I, plane_I, bytes_I, order_I, size, buffer_bytes, read_ns_K,
                copy_ns_K, compute_ns_KN,
            )  # fmt: skip
    return makespan_ns_BL, read_bytes_BL, 0


@njit(cache=True)
def _sorted(key_I3: IntArray, size: int, order_I: IntArray) -> None:  # pragma: no cover - compiled
    """order_I[:size] ascending by key: an insertion sort, the items of a site are few."""
    for item in range(size):
        at = item
        while at > 0:
            other = order_I[at - 1]
            smaller = False
            for column in range(key_I3.shape[1]):
                if key_I3[item, column] != key_I3[other, column]:
                    smaller = key_I3[item, column] < key_I3[other, column]
                    break
            if not smaller:
                break
            order_I[at] = other
            at -= 1
        order_I[at] = item


@njit(cache=True)
def _heads_first(
    key_I3: IntArray, expert_I: IntArray, size: int, order_I: IntArray
) -> None:  # pragma: no cover - compiled
    """Of the experts' next items, the one with the least key."""
    done = np.zeros(size, dtype=np.bool_)
    for at in range(size):
        best = -1
        last = -1
        for item in range(size):
            # items stand expert by expert, planes ascending: the first that is left is the expert's head
            if done[item] or expert_I[item] == last:
                continue
            last = expert_I[item]
            smaller = best < 0
            for column in range(key_I3.shape[1]):
                if best >= 0 and key_I3[item, column] != key_I3[best, column]:
                    smaller = key_I3[item, column] < key_I3[best, column]
                    break
            if smaller:
                best = item
        done[best] = True
        order_I[at] = best


@njit(cache=True)
def _fits(
    expert_I: IntArray, bytes_I: IntArray, size: int, experts: int, buffer_bytes: int, order_I: IntArray
) -> bool:  # pragma: no cover - compiled
    """Whether no read of the order waits for an expert that only a later item would finish."""
    left_E, held_E = np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.int64)
    for item in range(size):
        left_E[expert_I[item]] += 1
    held = 0
    for at in range(size):
        item = order_I[at]
        expert = expert_I[item]
        held += bytes_I[item]
        held_E[expert] += bytes_I[item]
        if bytes_I[item] > 0 and held > buffer_bytes:
            return False
        left_E[expert] -= 1
        if left_E[expert] == 0:
            held -= held_E[expert]
    return True


@njit(cache=True)
def _fit(
    expert_I: IntArray, bytes_I: IntArray, size: int, experts: int, buffer_bytes: int, order_I: IntArray
) -> None:  # pragma: no cover - compiled
    """`fitting_order` of the wished order in order_I[:size], in place."""
    if _fits(expert_I, bytes_I, size, experts, buffer_bytes, order_I):
        return
    missing_E, held_E = np.zeros(experts, dtype=np.int64), np.zeros(experts, dtype=np.int64)
    left_E = np.zeros(experts, dtype=np.int64)
    for item in range(size):
        missing_E[expert_I[item]] += bytes_I[item]
        left_E[expert_I[item]] += 1
    wished = order_I[:size].copy()
    taken = np.zeros(size, dtype=np.bool_)
    for at in range(size):
        seen = np.zeros(experts, dtype=np.bool_)
        for place in range(size):
            item = wished[place]
            expert, need = expert_I[item], bytes_I[item]
            if taken[place] or seen[expert]:
                continue
            seen[expert] = True
            held_E[expert] += need
            missing_E[expert] -= need
            if need == 0 or _can_finish(held_E, missing_E, buffer_bytes):
                taken[place] = True
                order_I[at] = item
                left_E[expert] -= 1
                if left_E[expert] == 0:
                    held_E[expert] = 0
                break
            held_E[expert] -= need
            missing_E[expert] += need


@njit(cache=True)
def _can_finish(held_E: IntArray, missing_E: IntArray, buffer_bytes: int) -> bool:  # pragma: no cover - compiled
    free = buffer_bytes - held_E.sum()
    if free < 0:
        return False
    waiting = np.flatnonzero(held_E)
    waiting = waiting[np.argsort(missing_E[waiting])]
    for expert in waiting:
        if missing_E[expert] > free:
            return False
        free += held_E[expert]
    return True


@njit(cache=True)
def _run(
    count_EK: IntArray,
    expert_I: IntArray,
    plane_I: IntArray,
    bytes_I: IntArray,
    order_I: IntArray,
    size: int,
    buffer_bytes: int,
    read_ns_K: IntArray,
    copy_ns_K: IntArray,
    compute_ns_KN: IntArray,
) -> int:  # pragma: no cover - compiled
    """`run_in_order`'s makespan."""
    experts = len(count_EK)
    last_E, held_E = np.full(experts, -1, dtype=np.int64), np.zeros(experts, dtype=np.int64)
    for at in range(size):
        last_E[expert_I[order_I[at]]] = at
    when_R, freed_R = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    first, end = 0, 0
    disk, copier, processor, held = 0, 0, 0, 0
    for at in range(size):
        item = order_I[at]
        expert, plane, need = expert_I[item], plane_I[item], bytes_I[item]
        ready = 0
        if need:
            start = disk
            while held + need > buffer_bytes:
                start = max(start, when_R[first])
                held -= freed_R[first]
                first += 1
            held += need
            held_E[expert] += need
            disk = start + read_ns_K[plane]
            copier = max(copier, disk) + copy_ns_K[plane]
            ready = copier
        processor = max(processor, ready) + compute_ns_KN[plane, count_EK[expert, plane]]
        if last_E[expert] == at and held_E[expert]:
            when_R[end], freed_R[end] = processor, held_E[expert]
            end += 1
            held_E[expert] = 0
    return processor
