"""What fits: an order of items that never gets stuck in a buffer, and the planes to prefetch into what it leaves free.

Legend: I items, E experts, K planes.
"""

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from placer.core.device.items import Items, ItemTimes, layer_items
from placer.core.device.ladder import BitLadder
from placer.core.errors import InfeasibleError

__all__ = ["fitting_order", "prefetch_planes"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def fitting_order(items: Items, times: ItemTimes, order_I: IntArray, buffer_bytes: int) -> IntArray:
    """The order nearest to `order_I` (a permutation of the items as given) that never gets stuck in such a buffer.

    The next item is the first of the wished order after which the experts that have planes in the buffer can still be
    finished one after another (Dijkstra's banker). Planes of an expert stay in the order wished for. Unchanged where
    that never gets stuck itself. Raises InfeasibleError where one expert alone does not fit.

    Notes
    -----
    Complexity: O(I) where nothing changes; else O(I S^2) with S the distinct (bytes held, bytes missing, next plane)
    that experts have at one time: below 2^K K for planes of one size per level, whatever the number of experts.
    """
    if _fits(items, times, order_I, buffer_bytes):
        return order_I
    expert_I, size_I = items.expert_I.tolist(), times.bytes_I.tolist()
    queues: dict[int, deque[tuple[int, int]]] = {}
    missing: dict[int, int] = {}
    for place, item in enumerate(order_I.tolist()):
        expert = expert_I[item]
        queues.setdefault(expert, deque()).append((place, item))
        missing[expert] = missing.get(expert, 0) + size_I[item]
    if max(missing.values()) > buffer_bytes:
        expert = max(sorted(missing), key=lambda one: missing[one])
        raise InfeasibleError(
            f"expert {expert} needs {missing[expert]} bytes at once and the buffer has {buffer_bytes}; give a larger "
            "memory budget, or keep fewer planes resident"
        )
    held = dict.fromkeys(missing, 0)
    waiting: dict[State, list[tuple[int, int]]] = {}
    # bytes in the buffer, by what their experts still miss
    held_at: dict[int, int] = {}

    def put_head(expert: int) -> None:
        place, item = queues[expert][0]
        heapq.heappush(waiting.setdefault((held[expert], missing[expert], size_I[item]), []), (place, expert))

    for expert in queues:
        put_head(expert)
    result = []
    for _ in range(len(order_I)):
        state = next(state for state in sorted(waiting, key=waiting.__getitem__) if _safe(state, held_at, buffer_bytes))
        _, expert = heapq.heappop(waiting[state])
        if not waiting[state]:
            del waiting[state]
        had, lacked, size = state
        held[expert], missing[expert] = had + size, lacked - size
        held_at[lacked] = held_at.get(lacked, 0) - had
        if not held_at[lacked]:
            del held_at[lacked]
        result.append(queues[expert].popleft()[1])
        if queues[expert]:
            held_at[lacked - size] = held_at.get(lacked - size, 0) + had + size
            put_head(expert)
    return np.array(result, dtype=np.int64)


State = tuple[int, int, int]
"""Of an expert: bytes it has in the buffer, bytes it misses, and how many of these its next item brings."""


def _fits(items: Items, times: ItemTimes, order_I: IntArray, buffer_bytes: int) -> bool:
    """Whether no read of the order waits for an expert that only a later item would finish."""
    expert_I, size_I = items.expert_I[order_I], times.bytes_I[order_I]
    if int(size_I.sum()) <= buffer_bytes:
        return True
    whole_E = np.bincount(expert_I, weights=size_I).astype(np.int64)
    last_E = np.zeros(len(whole_E), dtype=np.int64)
    last_E[expert_I] = np.arange(len(expert_I))
    freed_I = np.zeros(len(expert_I), dtype=np.int64)
    np.add.at(freed_I, last_E[np.unique(expert_I)], whole_E[np.unique(expert_I)])
    held_I = np.cumsum(size_I) - (np.cumsum(freed_I) - freed_I)
    return int(held_I[size_I > 0].max(initial=0)) <= buffer_bytes


def _safe(state: State, held_at: dict[int, int], buffer_bytes: int) -> bool:
    """Whether the experts in the buffer can be finished one after another once this expert has its next plane.

    They are finished in the order of what they miss: each must fit beside everything held by those after it. Only
    `state`'s own turn, and those before it, become tighter.
    """
    had, lacked, size = state
    if not size:
        return True
    after = {**held_at, lacked: held_at.get(lacked, 0) - had}
    after[lacked - size] = after.get(lacked - size, 0) + had + size
    behind = 0
    for misses in sorted(after, reverse=True):
        behind += after[misses]
        if misses + behind > buffer_bytes:
            return False
    return True


def prefetch_planes(
    predicted_EK: IntArray, present_EK: BoolArray, ladder: BitLadder, plane_bytes_K: Sequence[int], room_bytes: int
) -> list[tuple[int, int]]:
    """Planes (expert, plane) to read ahead for a layer expected to get `predicted_EK` tokens, in the order of reading.

    Hottest expert-bit first, what is present left out, until the next one does not fit into `room_bytes`.
    """
    items = layer_items(predicted_EK, present_EK, ladder)
    order_I = np.lexsort([items.expert_I, items.plane_I, -items.heat_I])
    planes = []
    for item in order_I[~items.present_I[order_I]].tolist():
        room_bytes -= plane_bytes_K[int(items.plane_I[item])]
        if room_bytes < 0:
            break
        planes.append((int(items.expert_I[item]), int(items.plane_I[item])))
    return planes
