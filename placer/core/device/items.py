"""What one layer has to load and compute, item by item, and the rules that put the items in order.

An item is one plane of one expert: it is loaded (unless it is in memory already), then the tokens at exactly its level
are run with the weights that planes up to it give. Legend: I items, E experts, K planes.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.core.device.johnson import johnson_order
from placer.core.device.ladder import BitLadder
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import tokens_on_planes
from placer.core.errors import UsageError

__all__ = ["ORDER_RULES", "ItemTimes", "Items", "OrderRule", "layer_items", "order_items"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

OrderRule = Literal["by_id", "hebf", "hebf_exact", "resident_first", "johnson"]
"""by_id: expert by expert. hebf: hottest expert-bit first, B cumulative (D2MoE section 4.3). hebf_exact: the same with
B the tokens at exactly this level. resident_first: what is in memory, then hebf. johnson: chain-Johnson, exact without
a buffer limit."""

ORDER_RULES: tuple[OrderRule, ...] = get_args(OrderRule)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items:
    """The items of one layer in the order in which they are loaded and computed.

    expert_I, plane_I   which plane (from 0) of which expert
    tokens_I            tokens run when the item is computed; 0 for a plane that only higher levels use
    heat_I              D2MoE's B: tokens that use the plane
    present_I           whether the plane is in memory already
    """

    expert_I: IntArray
    plane_I: IntArray
    tokens_I: IntArray
    heat_I: IntArray
    present_I: BoolArray

    def __len__(self) -> int:
        return len(self.expert_I)

    def taken(self, order_I: IntArray) -> "Items":
        """The items in another order."""
        names = ("expert_I", "plane_I", "tokens_I", "heat_I", "present_I")
        return Items(**{name: getattr(self, name)[order_I] for name in names})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ItemTimes:
    """Nanoseconds of each item: read from the disk, copied to the accelerator, computed; and its bytes, all (I,).

    A plane that is present is neither read nor copied.
    """

    read_ns_I: IntArray
    copy_ns_I: IntArray
    compute_ns_I: IntArray
    bytes_I: IntArray

    def taken(self, order_I: IntArray) -> "ItemTimes":
        """The times in another order."""
        names = ("read_ns_I", "copy_ns_I", "compute_ns_I", "bytes_I")
        return ItemTimes(**{name: getattr(self, name)[order_I] for name in names})

    @classmethod
    def of(cls, items: Items, device: DeviceSpec, ladder: BitLadder, plane_bytes_K: tuple[int, ...]) -> "ItemTimes":
        """What the device needs for these items.

        An item with tokens turns every plane of its level into weights anew (nothing but packed planes is kept), then
        runs the tokens; one without tokens computes nothing.
        """
        bytes_I = np.asarray(plane_bytes_K, dtype=np.int64)[items.plane_I]
        missing_I = ~items.present_I
        read_K = np.array([device.read_ns(size) for size in plane_bytes_K], dtype=np.int64)
        copy_K = np.array([device.copy_ns(size) for size in plane_bytes_K], dtype=np.int64)
        compute = device.compute
        residuals_K = np.arange(len(plane_bytes_K)) if ladder.nested else np.zeros(len(plane_bytes_K), dtype=np.int64)
        tokens_U, where_I = np.unique(items.tokens_I, return_inverse=True)
        ffn_us_U = np.array([compute.ffn_time_us(int(tokens)) for tokens in tokens_U])
        weights_us_I = compute.base_us + residuals_K[items.plane_I] * compute.residual_us
        compute_us_I = np.where(items.tokens_I > 0, weights_us_I + ffn_us_U[where_I.reshape(-1)], 0.0)
        return cls(
            read_ns_I=np.where(missing_I, read_K[items.plane_I], 0),
            copy_ns_I=np.where(missing_I, copy_K[items.plane_I], 0),
            compute_ns_I=np.rint(1e3 * compute_us_I).astype(np.int64),
            bytes_I=np.where(missing_I, bytes_I, 0),
        )


def layer_items(count_EK: IntArray, present_EK: BoolArray, ladder: BitLadder) -> Items:
    """The items of one layer by expert id, planes ascending. Experts without tokens have none.

    count_EK: tokens at exactly each level; present_EK: planes in memory.
    """
    heat_EK = tokens_on_planes(count_EK, nested=ladder.nested)
    expert_I, plane_I = np.nonzero(heat_EK)
    return Items(
        expert_I=expert_I,
        plane_I=plane_I,
        tokens_I=count_EK[expert_I, plane_I].astype(np.int64),
        heat_I=heat_EK[expert_I, plane_I].astype(np.int64),
        present_I=present_EK[expert_I, plane_I],
    )


def order_items(items: Items, rule: OrderRule, times: ItemTimes) -> IntArray:
    """The order (I,) in which `rule` loads and computes items; ties: lower plane, then lower expert id.

    Planes of one expert stay in ascending order, of copies too. `johnson` takes read + copy and copy + compute for its
    two machines: no order is better without a copy, or where the longest copy is no longer than the shortest read;
    otherwise it is a heuristic, as it is with a buffer limit. Complexity: O(I log I). Raises UsageError for an unknown
    rule.
    """
    if rule == "by_id":
        return np.lexsort([items.plane_I, items.expert_I])
    if rule == "hebf":
        return _best_head_first(items, -items.heat_I)
    if rule == "hebf_exact":
        return _best_head_first(items, -items.tokens_I)
    if rule == "resident_first":
        return _best_head_first(items, -items.heat_I, ~items.present_I)
    if rule == "johnson":
        first_ns_I, second_ns_I = times.read_ns_I + times.copy_ns_I, times.copy_ns_I + times.compute_ns_I
        return johnson_order(items.expert_I, items.plane_I, first_ns_I, second_ns_I)
    raise UsageError(f"order is {rule!r}; use one of {', '.join(ORDER_RULES)}")


def _best_head_first(items: Items, *keys_I: npt.NDArray[Any]) -> IntArray:
    """D2MoE's three steps: a queue per expert, planes ascending; of the heads the one with the least key moves.

    The last key counts first. An item goes when the worst of its queue up to itself would go, so one sort does it.
    """
    count = len(items)
    wished_I = np.lexsort([items.expert_I, items.plane_I, *keys_I])
    rank_I = np.empty(count, dtype=np.int64)
    rank_I[wished_I] = np.arange(count)
    by_id_I = np.lexsort([items.plane_I, items.expert_I])
    # the queues lie one after another, each above all before it, so that a running maximum starts anew in each
    queue_I = items.expert_I[by_id_I] * count
    turn_I = np.empty(count, dtype=np.int64)
    turn_I[by_id_I] = np.maximum.accumulate(rank_I[by_id_I] + queue_I) - queue_I
    return np.lexsort([items.plane_I, turn_I])
