"""Which slot serves each expert of every token: `placer.core.replicas.choose_slots` in compiled code.

Legend: I tokens of an iteration, K top-k, E experts, N replicas, R ranks, P slots, C candidate ranks.
The rules and their hashes are those of the core, to the bit (tested).
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.modes import REPLICA_CHOICES
from sim.serving.tables import SlotTables

__all__ = ["choose_layer_slots"]

VISIT_FIRST = REPLICA_CHOICES.index("visit_first")
LOCAL_OR_UNIFORM = REPLICA_CHOICES.index("local_or_uniform")
TOKEN_HASH = REPLICA_CHOICES.index("token_hash")
ROUND_ROBIN = REPLICA_CHOICES.index("round_robin")

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]


@njit(cache=True)
def choose_layer_slots(
    tables: SlotTables,
    layer: int,
    expert_TK: npt.NDArray[np.integer],
    row_I: IntArray,
    source_I: IntArray,
    slot_IK: Int32Array,
) -> None:
    """Fills `slot_IK` for the tokens that take rows row_I of the layer's trace; -1 where there is no placed expert.

    Complexity: O(I K) where experts have one slot; visit_first adds O(K N) steps for tokens with replicated experts.
    """
    slot_EN, count_E = tables.slot_LEN[layer], tables.count_LE[layer]
    replicated = _look_up(slot_EN[:, 0].copy(), count_E, expert_TK, row_I, slot_IK)
    if not replicated:
        return
    if tables.choice == VISIT_FIRST:
        _visit_first(
            slot_EN,
            count_E,
            tables.weight_LEN[layer],
            tables.held_LEN[layer],
            tables.held_weight_LEN[layer],
            tables.rank_P,
            expert_TK,
            row_I,
            source_I,
            slot_IK,
        )
        return
    deals = tables.choice == ROUND_ROBIN
    turn_ER = np.zeros((len(count_E) if deals else 0, len(tables.node_R)), dtype=np.int32)
    for token in range(len(row_I)):
        source = source_I[token]
        for k in range(slot_IK.shape[1]):
            if slot_IK[token, k] < 0:
                continue
            expert = np.int64(expert_TK[row_I[token], k])
            count = np.int64(count_E[expert])
            if count < 2:
                continue
            if tables.choice == TOKEN_HASH:
                hashed = (np.uint64(token) * np.uint64(2654435769)) & np.uint64(0xFFFFFFFF)
                pick = np.int64(hashed % np.uint64(count))
            elif deals:
                pick = np.int64((turn_ER[expert, source] + source) % count)
                turn_ER[expert, source] += 1
            elif tables.choice == LOCAL_OR_UNIFORM:
                pick = np.int64(-1)
                for replica in range(count):
                    if tables.rank_P[slot_EN[expert, replica]] == source:
                        pick = np.int64(replica)
                        break
                if pick < 0:
                    pick = np.int64(_unit_hash(token, expert) * count)
            else:
                slot_IK[token, k] = tables.fixed_LSE[layer, source, expert]
                continue
            slot_IK[token, k] = slot_EN[expert, pick]


@njit(cache=True)
def _look_up(
    slot_E: Int32Array,
    count_E: Int32Array,
    expert_TK: npt.NDArray[np.integer],
    row_I: IntArray,
    slot_IK: Int32Array,
) -> bool:
    """The first slot of every expert; whether any expert of any token has more."""
    experts = np.int64(len(slot_E))
    most = 0
    for token in range(len(row_I)):
        row = row_I[token]
        for k in range(slot_IK.shape[1]):
            expert = np.int64(expert_TK[row, k])
            if 0 <= expert < experts:
                slot_IK[token, k] = slot_E[expert]
                most = max(most, count_E[expert])
            else:
                slot_IK[token, k] = -1
    return most > 1


@njit(cache=True)
def _visit_first(
    slot_EN: Int32Array,
    count_E: Int32Array,
    weight_EN: FloatArray,
    held_EN: Int32Array,
    held_weight_EN: FloatArray,
    rank_P: Int32Array,
    expert_TK: npt.NDArray[np.integer],
    row_I: IntArray,
    source_I: IntArray,
    slot_IK: Int32Array,
) -> None:
    """Experts with one slot stay; of the others those on ranks so visited are drawn there, the rest rank by rank."""
    top_k = slot_IK.shape[1]
    seen_R = np.full(int(rank_P[-1]) + 1, -1, dtype=np.int64)
    # the columns that are still open, and their experts
    open_K, expert_K = np.zeros(top_k, dtype=np.int64), np.zeros(top_k, dtype=np.int64)
    rank_C = np.zeros(top_k * slot_EN.shape[1], dtype=np.int64)
    held_C = np.zeros(len(rank_C), dtype=np.int64)
    share_C = np.zeros(len(rank_C))
    stamp = 0
    for token in range(len(row_I)):
        several = 0
        stamp += 1
        for k in range(top_k):
            slot = slot_IK[token, k]
            if slot < 0:
                continue
            expert = np.int64(expert_TK[row_I[token], k])
            if count_E[expert] == 1:
                seen_R[rank_P[slot]] = stamp
            else:
                open_K[several], expert_K[several] = k, expert
                several += 1
        left = 0
        for at in range(several):
            slot = _draw(slot_EN, count_E, weight_EN, rank_P, expert_K[at], seen_R, stamp, token)
            if slot >= 0:
                slot_IK[token, open_K[at]] = slot
            else:
                open_K[left], expert_K[left] = open_K[at], expert_K[at]
                left += 1
        while left:
            stamp += 1
            count, first = 0, expert_K[0]
            for at in range(left):
                first = min(first, expert_K[at])
                count = _add_ranks(held_EN, held_weight_EN, expert_K[at], rank_C, held_C, share_C, count)
            seen_R[_heaviest(rank_C, held_C, share_C, count, source_I[token], token, first)] = stamp
            several, left = left, 0
            for at in range(several):
                slot = _draw(slot_EN, count_E, weight_EN, rank_P, expert_K[at], seen_R, stamp, token)
                if slot >= 0:
                    slot_IK[token, open_K[at]] = slot
                else:
                    open_K[left], expert_K[left] = open_K[at], expert_K[at]
                    left += 1


@njit(cache=True, inline="always")
def _add_ranks(
    held_EN: Int32Array,
    weight_EN: FloatArray,
    expert: int,
    rank_C: IntArray,
    held_C: IntArray,
    share_C: FloatArray,
    count: int,
) -> int:
    """Merges one expert's ranks into the first `count` candidates, which are in rank order; how many there are now."""
    for place in range(held_EN.shape[1]):
        rank = held_EN[expert, place]
        if rank < 0:
            break
        at = count
        while at > 0 and rank_C[at - 1] >= rank:
            at -= 1
        if at < count and rank_C[at] == rank:
            held_C[at] += 1
            share_C[at] += weight_EN[expert, place]
            continue
        for later in range(count, at, -1):
            rank_C[later], held_C[later], share_C[later] = rank_C[later - 1], held_C[later - 1], share_C[later - 1]
        rank_C[at], held_C[at], share_C[at] = rank, 1, weight_EN[expert, place]
        count += 1
    return count


@njit(cache=True, inline="always")
def _heaviest(
    rank_C: IntArray, held_C: IntArray, share_C: FloatArray, count: int, source: int, token: int, first: int
) -> int:
    """The rank that holds most; of equal ones the source, else one by hash in proportion to the shares."""
    most = 0
    for at in range(count):
        most = max(most, held_C[at])
    total = 0.0
    chosen = -1
    for at in range(count):
        if held_C[at] == most:
            total += share_C[at]
            if rank_C[at] == source:
                chosen = at
    if chosen < 0:
        level = _unit_hash(token, first) * total
        reached = 0.0
        for at in range(count):
            if held_C[at] == most:
                reached += share_C[at]
                chosen = at
                if reached > level:
                    break
    return rank_C[chosen]


@njit(cache=True, inline="always")
def _draw(
    slot_EN: Int32Array,
    count_E: Int32Array,
    weight_EN: FloatArray,
    rank_P: Int32Array,
    expert: int,
    seen_R: IntArray,
    stamp: int,
    token: int,
) -> int:
    """One of the expert's slots on ranks with this stamp, by hash in proportion to the weights; -1 where none is."""
    total = 0.0
    found, chosen = 0, -1
    for replica in range(count_E[expert]):
        slot = slot_EN[expert, replica]
        if seen_R[rank_P[slot]] == stamp:
            total += weight_EN[expert, replica]
            chosen = slot
            found += 1
    if found > 1:
        level = _unit_hash(token, expert) * total
        reached = 0.0
        for replica in range(count_E[expert]):
            slot = slot_EN[expert, replica]
            if seen_R[rank_P[slot]] == stamp:
                reached += weight_EN[expert, replica]
                chosen = slot
                if reached > level:
                    break
    return chosen


@njit(cache=True, inline="always")
def _unit_hash(token: int, expert: int) -> float:
    mixed = np.uint64(token) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(expert)
    mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    mixed = mixed ^ (mixed >> np.uint64(33))
    return float(mixed >> np.uint64(11)) * 2.0**-53
