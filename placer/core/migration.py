"""What moving from one placement to another takes: which expert goes where, from which rank, and how many bytes.

Only the set of experts that a rank holds counts: a slot that keeps its expert on the rank moves nothing, and the order
of slots inside a rank is free.

Legend: L layers, E experts, P slots, R ranks, M moves.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import MismatchError, UsageError

__all__ = ["Moves", "held_LRE", "moves"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """Expert copies to be sent, in order of layer, destination and expert; each array is int64 (M,).

    layer_M is the row of the placement, source_M a rank that holds the expert now, destination_M the one that needs it.
    """

    layer_M: IntArray
    expert_M: IntArray
    source_M: IntArray
    destination_M: IntArray

    def __len__(self) -> int:
        return len(self.layer_M)

    @property
    def layers(self) -> IntArray:
        """Rows with at least one move, ascending."""
        return np.unique(self.layer_M)

    def moved_bytes(self, expert_bytes: int) -> int:
        """Bytes of weights sent, with `expert_bytes` as in ModelSpec."""
        return len(self) * expert_bytes


def held_LRE(slot_expert_LP: IntArray, num_ranks: int, num_experts: int | None = None) -> BoolArray:
    """Whether each rank holds each expert, (L, R, E); -1 is an empty slot. Raises UsageError for uneven slots."""
    layers, slots = slot_expert_LP.shape
    if num_ranks < 1 or slots % num_ranks:
        raise UsageError(f"{slots} slots do not divide over {num_ranks} ranks; every rank needs the same number")
    experts = int(slot_expert_LP.max(initial=0)) + 1 if num_experts is None else num_experts
    held = np.zeros((layers, num_ranks, experts), dtype=bool)
    layer, slot = np.nonzero(slot_expert_LP >= 0)
    held[layer, slot // (slots // num_ranks), slot_expert_LP[layer, slot]] = True
    return held


def moves(current_LP: IntArray, target_LP: IntArray, num_ranks: int, ranks_per_node: int | None = None) -> Moves:
    """The copies that turn `current_LP` into `target_LP`, both int64 (L, slots of any even number per rank).

    A copy comes from a rank of its destination's node where one holds the expert (`ranks_per_node` None: all ranks are
    one node); among equals from the rank that sends least so far, then from the lowest. Dropping an expert costs
    nothing. Raises MismatchError for different numbers of layers, UsageError where no rank holds an expert that is
    needed. Cost O(L R E + M R).
    """
    if len(current_LP) != len(target_LP):
        raise MismatchError(
            f"the current plan has {len(current_LP)} layers, the new one {len(target_LP)}; give plans of one model"
        )
    experts = int(max(current_LP.max(initial=0), target_LP.max(initial=0))) + 1
    now_LRE = held_LRE(current_LP, num_ranks, experts)
    layer_M, destination_M, expert_M = np.nonzero(held_LRE(target_LP, num_ranks, experts) & ~now_LRE)
    node_R = np.arange(num_ranks) // (ranks_per_node or num_ranks)
    sent_R = np.zeros(num_ranks, dtype=np.int64)
    source_M = np.empty(len(layer_M), dtype=np.int64)
    for move, (layer, destination, expert) in enumerate(zip(layer_M, destination_M, expert_M, strict=True)):
        holders = np.flatnonzero(now_LRE[layer, :, expert])
        if not len(holders):
            raise UsageError(f"layer {layer}: no rank holds expert {expert} now; give a current plan that is legal")
        away = node_R[holders] != node_R[destination]
        source = holders[np.lexsort((holders, sent_R[holders], away))[0]]
        source_M[move] = source
        sent_R[source] += 1
    return Moves(layer_M.astype(np.int64), expert_M.astype(np.int64), source_M, destination_M.astype(np.int64))
