"""Several layers in a row on one device, the disk reading ahead: when each ends, and what no schedule can undercut.

The disk reads layer after layer; a read may begin once the layer `ahead` layers before its own is routed (0: its own;
None: at any time, as if routing were known from the start). Legend: I items, L layers.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.items import Items, ItemTimes, order_items
from placer.core.errors import InfeasibleError, UsageError

__all__ = ["LayerLoad", "ReadAhead", "most_from_reading_ahead", "read_ahead_bound_ns", "run_layers"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One layer: its items, their times, and the attention that goes before (at its end the layer is routed)."""

    items: Items
    times: ItemTimes
    attention_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadAhead:
    """The soonest that layers can end with unlimited buffers, by how far the disk may read ahead, in nanoseconds.

    Exact without copies; with them each is a lower bound.
    """

    none_ns: int
    one_layer_ns: int
    everything_ns: int

    @property
    def most_gain(self) -> float:
        """What reading one layer ahead could make of the time without, at most: none / one layer (1: nothing)."""
        return self.none_ns / self.one_layer_ns if self.one_layer_ns else 1.0


def run_layers(
    layers: Sequence[LayerLoad], orders: Sequence[IntArray], *, ahead: int | None = 0, buffer_bytes: int | None = None
) -> int:
    """When the last layer ends, each layer's items in the order given; nanoseconds since the first attention began.

    Every plane is needed, so what is read ahead is what the layer would have read. Bytes are held from the start of
    their read to the end of their expert's last item. Complexity: O(all items). Raises InfeasibleError where the orders
    get stuck in the buffer.
    """
    _refuse_ahead(ahead)
    disk = copier = processor = held = 0
    released: deque[tuple[int, int]] = deque()
    routed: list[int] = []
    for layer, (load, order_I) in enumerate(zip(layers, orders, strict=True)):
        processor += load.attention_ns
        routed.append(processor)
        gate = 0 if ahead is None else routed[max(0, layer - ahead)]
        expert_I = load.items.expert_I[order_I].tolist()
        taken = load.times.taken(order_I)
        columns = (taken.read_ns_I, taken.copy_ns_I, taken.compute_ns_I, taken.bytes_I)
        last = {expert: place for place, expert in enumerate(expert_I)}
        held_by = dict.fromkeys(last, 0)
        stages = zip(*(column.tolist() for column in columns), strict=True)
        for place, (expert, (read, copy, compute, size)) in enumerate(zip(expert_I, stages, strict=True)):
            ready = 0
            if size:
                disk = max(disk, gate)
                while buffer_bytes is not None and held + size > buffer_bytes:
                    if not released:
                        raise InfeasibleError(f"a buffer of {buffer_bytes} bytes has no room for {size} more")
                    when, freed = released.popleft()
                    disk, held = max(disk, when), held - freed
                held += size
                held_by[expert] += size
                disk += read
                ready = copier = max(copier, disk) + copy
            processor = max(processor, ready) + compute
            if last[expert] == place and held_by[expert]:
                released.append((processor, held_by[expert]))
    return processor


def read_ahead_bound_ns(layers: Sequence[LayerLoad], *, ahead: int | None) -> int:
    """No orders of the items, and no buffer, let the layers end sooner; without copies and buffer limit some do then.

    Chain-Johnson in every layer: it makes the least of a layer's stalls whatever lead the disk has, and a layer that
    ends sooner never hurts a later one. Copies count as delays that may overlap. Complexity: O(I log I).
    """
    _refuse_ahead(ahead)
    disk = processor = 0
    routed: list[int] = []
    for layer, load in enumerate(layers):
        processor += load.attention_ns
        routed.append(processor)
        order_I = order_items(load.items, "johnson", load.times)
        taken = load.times.taken(order_I)
        if not len(order_I):
            continue
        loaded_I = taken.bytes_I > 0
        begin = max(disk, 0 if ahead is None else routed[max(0, layer - ahead)])
        after_I = np.cumsum(taken.compute_ns_I[::-1])[::-1]
        arrived_I = begin + np.cumsum(taken.read_ns_I) + taken.copy_ns_I
        late = int((arrived_I + after_I)[loaded_I].max(initial=0))
        processor = max(processor + int(taken.compute_ns_I.sum()), late)
        if loaded_I.any():
            disk = begin + int(taken.read_ns_I.sum())
    return processor


def most_from_reading_ahead(layers: Sequence[LayerLoad]) -> ReadAhead:
    """The three horizons side by side: nothing, one layer, everything, demand known exactly."""
    none_ns, one_ns, all_ns = (read_ahead_bound_ns(layers, ahead=ahead) for ahead in (0, 1, None))
    return ReadAhead(none_ns=none_ns, one_layer_ns=one_ns, everything_ns=all_ns)


def _refuse_ahead(ahead: int | None) -> None:
    if ahead is not None and ahead < 0:
        raise UsageError(f"ahead is {ahead}; give layers to read ahead, 0 or more, or None for all")
