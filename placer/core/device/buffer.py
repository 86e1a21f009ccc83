"""What fits: an order of items that never gets stuck in a buffer, and the planes to prefetch into what it leaves free.

Legend: I items, E experts, K planes.
"""

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
    finished one after another (Dijkstra's banker). Planes of an expert stay in ascending order. Unchanged where
    everything fits. Complexity: O(I^2 E). Raises InfeasibleError where one expert alone does not fit.
    """
    if int(times.bytes_I.sum()) <= buffer_bytes:
        return order_I
    missing: dict[int, int] = {}
    for expert, size in zip(items.expert_I.tolist(), times.bytes_I.tolist(), strict=True):
        missing[expert] = missing.get(expert, 0) + size
    if missing and max(missing.values()) > buffer_bytes:
        expert = max(missing, key=lambda one: missing[one])
        raise InfeasibleError(
            f"expert {expert} needs {missing[expert]} bytes at once and the buffer has {buffer_bytes}; give a larger "
            "memory budget, or keep fewer planes resident"
        )
    held: dict[int, int] = {}
    waiting = order_I.tolist()
    left = np.bincount(items.expert_I).tolist()
    result = []
    while waiting:
        seen: set[int] = set()
        chosen = -1
        for item in waiting:
            expert, size = int(items.expert_I[item]), int(times.bytes_I[item])
            # a plane cannot overtake a lower one of its expert
            if expert in seen:
                continue
            seen.add(expert)
            taken = {**held, expert: held.get(expert, 0) + size}
            if size == 0 or _can_finish(taken, {**missing, expert: missing[expert] - size}, buffer_bytes):
                chosen = item
                break
        assert chosen >= 0, "the state was safe, so some expert can go on"
        item = chosen
        waiting.remove(item)
        result.append(item)
        expert, size = int(items.expert_I[item]), int(times.bytes_I[item])
        missing[expert] -= size
        held[expert] = held.get(expert, 0) + size
        left[expert] -= 1
        if not left[expert]:
            del held[expert]
    return np.array(result, dtype=np.int64)


def _can_finish(held: dict[int, int], missing: dict[int, int], buffer_bytes: int) -> bool:
    free = buffer_bytes - sum(held.values())
    if free < 0:
        return False
    for expert in sorted((one for one in held if held[one]), key=lambda one: missing[one]):
        if missing[expert] > free:
            return False
        free += held[expert]
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
