"""The layer as a flow shop: when each item is read, copied and computed in a given order, and bounds on any order.

Disk, copy engine and processor each take the items in that one order; a plane that is present is ready at once.
Legend: I items, in the order in which they run.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.items import Items, ItemTimes
from placer.core.errors import InfeasibleError

__all__ = ["ItemSpans", "makespan_bound_ns", "run_in_order"]

IntArray = npt.NDArray[np.int64]

COLUMNS = (
    "read_start_ns_I",
    "read_end_ns_I",
    "copy_start_ns_I",
    "copy_end_ns_I",
    "compute_start_ns_I",
    "compute_end_ns_I",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ItemSpans:
    """Nanoseconds since the layer's routing at which each item's stages begin and end, (I,) each.

    A plane that is present has zeros for its read and copy.
    """

    read_start_ns_I: IntArray
    read_end_ns_I: IntArray
    copy_start_ns_I: IntArray
    copy_end_ns_I: IntArray
    compute_start_ns_I: IntArray
    compute_end_ns_I: IntArray

    @property
    def makespan_ns(self) -> int:
        """When the last item is computed (0 without items)."""
        return int(self.compute_end_ns_I.max(initial=0))


def run_in_order(items: Items, times: ItemTimes, buffer_bytes: int | None = None) -> ItemSpans:
    """Runs items and their times, both given in the order of execution. Complexity: O(I).

    `buffer_bytes` limits the planes that were read in this layer and are still needed: a read starts when its plane
    fits; an expert's planes are all needed until its last item is computed. Raises InfeasibleError where the order can
    never fit.
    """
    count = len(items)
    expert_I, size_I = items.expert_I.tolist(), times.bytes_I.tolist()
    read_I, copy_I, compute_I = times.read_ns_I.tolist(), times.copy_ns_I.tolist(), times.compute_ns_I.tolist()
    columns = np.zeros((6, count), dtype=np.int64)
    rows: list[tuple[int, int, int, int, int, int]] = []
    last = {expert: item for item, expert in enumerate(expert_I)}
    disk = copier = processor = held = 0
    held_by = dict.fromkeys(last, 0)
    # when experts were done and what they gave back, in that order
    released: deque[tuple[int, int]] = deque()
    for item, (expert, size) in enumerate(zip(expert_I, size_I, strict=True)):
        read_start = read_end = copy_start = copy_end = 0
        if size:
            read_start = disk
            while buffer_bytes is not None and held + size > buffer_bytes:
                if not released:
                    raise InfeasibleError(
                        f"a buffer of {buffer_bytes} bytes holds {held} bytes of experts that are not done and has no "
                        f"room for {size} more; give a larger buffer"
                    )
                when, freed = released.popleft()
                read_start, held = max(read_start, when), held - freed
            held += size
            held_by[expert] += size
            disk = read_end = read_start + read_I[item]
            copy_start = max(copier, disk)
            copier = copy_end = copy_start + copy_I[item]
        start = max(processor, copy_end)
        processor = start + compute_I[item]
        rows.append((read_start, read_end, copy_start, copy_end, start, processor))
        if last[expert] == item and held_by[expert]:
            released.append((processor, held_by[expert]))
    if rows:
        columns[:] = np.array(rows, dtype=np.int64).T
    return ItemSpans(**dict(zip(COLUMNS, columns, strict=True)))


def makespan_bound_ns(times: ItemTimes) -> int:
    """No order ends sooner: each machine's work, after the shortest way to it and before the shortest way from it.

    The usual machine-based bound of a permutation flow shop. Present planes have neither read nor copy.
    """
    if not len(times.compute_ns_I):
        return 0
    read, copy, compute = times.read_ns_I, times.copy_ns_I, times.compute_ns_I
    loaded = times.bytes_I > 0
    bound = int(compute.sum()) + int((read + copy).min(initial=np.iinfo(np.int64).max))
    if loaded.any():
        bound = max(bound, int(read.sum()) + int((copy + compute)[loaded].min()))
        bound = max(bound, int(copy.sum()) + int(read[loaded].min()) + int(compute[loaded].min()))
    return bound
