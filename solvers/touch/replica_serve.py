"""How visit_first serves an expert set, in compiled code: the ranks it touches and the load to expect there.

The counterpart of placer.core.replicas for searches that ask it millions of times. Where the rule draws by hash, loads
are expectations (a token's source rank is any rank alike), so that a search cannot learn the draws.

Legend: H expert sets, K top-k, E experts, R ranks, N nodes. A set of ranks is the bits of one int64, 64 ranks at most.
`mask_E` has one more entry than there are experts, 0: the ranks of the id E that fills short sets up.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["MAX_RANKS", "add_load", "bit", "bits", "rank_masks", "serve_sets", "touch_drawn", "touch_first"]

MAX_RANKS = 64
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Sets = npt.NDArray[np.int16]
ALL = np.int64(-1)


@njit(cache=True)
def bit(rank: int) -> int:  # pragma: no cover - compiled
    """The set that holds `rank` alone."""
    return np.int64(1) << np.int64(rank)  # type: ignore[return-value]


@njit(cache=True)
def bits(mask: int) -> int:  # pragma: no cover - compiled
    """How many ranks are in the set."""
    count = 0
    while mask:
        mask &= mask - 1
        count += 1
    return count


@njit(cache=True)
def rank_masks(held_RC: IntArray, experts: int) -> IntArray:  # pragma: no cover - compiled
    """mask_E, (E + 1,): the ranks that hold each expert."""
    mask_E = np.zeros(experts + 1, dtype=np.int64)
    for rank in range(held_RC.shape[0]):
        for expert in held_RC[rank]:
            mask_E[expert] |= bit(rank)
    return mask_E


@njit(cache=True)
def _fullest(expert_K: Sets, mask_E: IntArray, visited: int) -> int:  # pragma: no cover - compiled
    """The ranks that hold most of the experts that no rank in `visited` holds; 0 where there are no such experts."""
    common, union, several = ALL, np.int64(0), 0
    for k in range(len(expert_K)):
        mask = mask_E[expert_K[k]]
        if mask & visited == 0 and mask != 0:
            common &= mask
            union |= mask
            several += 1
    if several == 0:
        return np.int64(0)  # type: ignore[return-value]
    if common != 0:
        return common  # type: ignore[return-value]
    most, best = 0, np.int64(0)
    rank = 0
    while union >> rank != 0 and rank < MAX_RANKS:
        if union >> rank & 1:
            count = 0
            for k in range(len(expert_K)):
                mask = mask_E[expert_K[k]]
                if mask & visited == 0 and mask >> rank & 1:
                    count += 1
            if count > most:
                most, best = count, np.int64(0)
            if count == most:
                best |= bit(rank)
        rank += 1
    return best  # type: ignore[return-value]


@njit(cache=True)
def _nth(mask: int, n: int) -> int:  # pragma: no cover - compiled
    """The n-th rank of the set, from 0."""
    rank = 0
    while True:
        if mask >> rank & 1:
            if n == 0:
                return rank
            n -= 1
        rank += 1


@njit(cache=True)
def _finishes(expert_K: Sets, mask_E: IntArray, visited: int, best: int) -> bool:  # pragma: no cover - compiled
    """Whether any rank in `best` holds all the experts that no rank in `visited` holds."""
    for k in range(len(expert_K)):
        mask = mask_E[expert_K[k]]
        if mask != 0 and mask & visited == 0 and mask & best != best:
            return False
    return True


@njit(cache=True)
def touch_first(
    expert_K: Sets, draw: int, mask_E: IntArray, node_R: IntArray, node_weight: float
) -> float:  # pragma: no cover - compiled
    """Ranks touched + node_weight * nodes touched by one set under visit_first.

    Of ranks that hold equally many of the remaining experts, the `draw`-th is visited unless it is the last visit.
    """
    visited, nodes = np.int64(0), np.int64(0)
    for k in range(len(expert_K)):
        mask = mask_E[expert_K[k]]
        if mask & (mask - 1) == 0:
            visited |= mask
    while True:
        best = _fullest(expert_K, mask_E, visited)
        if best == 0:
            break
        if node_weight == 0.0 and _finishes(expert_K, mask_E, visited, best):
            return bits(visited) + 1.0
        visited |= bit(_nth(best, draw % bits(best)))
    cost = float(bits(visited))
    if node_weight > 0.0:
        for rank in range(len(node_R)):
            if visited >> rank & 1:
                nodes |= bit(node_R[rank])
        cost += node_weight * bits(nodes)
    return cost


@njit(cache=True)
def touch_drawn(
    expert_K: Sets, mask_E: IntArray, node_R: IntArray, node_weight: float
) -> float:  # pragma: no cover - compiled
    """Expected ranks touched + node_weight * nodes touched by one set whose replicas are drawn alike and apart."""
    cost = 0.0
    for rank in range(len(node_R)):
        missed = 1.0
        for k in range(len(expert_K)):
            mask = mask_E[expert_K[k]]
            if mask >> rank & 1:
                missed *= 1.0 - 1.0 / bits(mask)
        cost += 1.0 - missed
    if node_weight == 0.0:
        return cost
    for node in range(node_R[-1] + 1):
        missed = 1.0
        for k in range(len(expert_K)):
            mask, inside = mask_E[expert_K[k]], 0
            for rank in range(len(node_R)):
                if node_R[rank] == node and mask >> rank & 1:
                    inside += 1
            if inside > 0:
                missed *= 1.0 - inside / bits(mask)
        cost += node_weight * (1.0 - missed)
    return cost


@njit(cache=True)
def add_load(
    expert_K: Sets, draw: int, amount: float, mask_E: IntArray, share_ER: FloatArray, load_ER: FloatArray
) -> None:  # pragma: no cover - compiled
    """Adds to load_ER what each rank is expected to serve of `amount` tokens of a set, replicated experts only."""
    visited, several = np.int64(0), False
    for k in range(len(expert_K)):
        mask = mask_E[expert_K[k]]
        if mask & (mask - 1) == 0:
            visited |= mask
        else:
            several = True
    if not several:
        return
    for k in range(len(expert_K)):
        expert = expert_K[k]
        mask = mask_E[expert]
        pool = mask & visited
        if pool == 0 or mask & (mask - 1) == 0:
            continue
        if pool & (pool - 1) == 0:
            load_ER[expert, _nth(pool, 0)] += amount
            continue
        total = 0.0
        for rank in range(share_ER.shape[1]):
            if pool >> rank & 1:
                total += share_ER[expert, rank]
        for rank in range(share_ER.shape[1]):
            if pool >> rank & 1:
                load_ER[expert, rank] += amount * share_ER[expert, rank] / total
    ranks = share_ER.shape[1]
    while True:
        best = _fullest(expert_K, mask_E, visited)
        if best == 0:
            return
        last = _finishes(expert_K, mask_E, visited, best)
        if not last:
            best = bit(_nth(best, draw % bits(best)))
        total, options = 0.0, bits(best)
        for rank in range(ranks):
            if best >> rank & 1:
                for k in range(len(expert_K)):
                    if mask_E[expert_K[k]] & visited == 0 and mask_E[expert_K[k]] >> rank & 1:
                        total += share_ER[expert_K[k], rank]
        for rank in range(ranks):
            if best >> rank & 1:
                chance = 0.0
                for k in range(len(expert_K)):
                    if mask_E[expert_K[k]] & visited == 0 and mask_E[expert_K[k]] >> rank & 1:
                        chance += share_ER[expert_K[k], rank] / total
                # the source rank where it is one of the best, else by share
                chance = 1.0 if options == 1 else 1.0 / ranks + (1.0 - options / ranks) * chance
                for k in range(len(expert_K)):
                    if mask_E[expert_K[k]] & visited == 0 and mask_E[expert_K[k]] >> rank & 1:
                        load_ER[expert_K[k], rank] += amount * chance
        visited |= best
        if last:
            return


@njit(cache=True)
def serve_sets(
    held_RC: IntArray,
    share_ER: FloatArray,
    node_R: IntArray,
    expert_HK: Sets,
    weight_H: IntArray,
    draw_H: IntArray,
    visit_first: bool,
    node_weight: float,
) -> tuple[FloatArray, FloatArray]:  # pragma: no cover - compiled
    """cost_H, what one token of each set touches, and load_ER, the tokens of each expert that each rank serves."""
    experts, ranks = share_ER.shape
    mask_E = rank_masks(held_RC, experts)
    cost_H = np.zeros(len(weight_H))
    load_ER = np.zeros((experts, ranks))
    total_E = np.zeros(experts + 1)
    for h in range(len(weight_H)):
        if visit_first:
            cost_H[h] = touch_first(expert_HK[h], draw_H[h], mask_E, node_R, node_weight)
            add_load(expert_HK[h], draw_H[h], weight_H[h], mask_E, share_ER, load_ER)
        else:
            cost_H[h] = touch_drawn(expert_HK[h], mask_E, node_R, node_weight)
        for k in range(expert_HK.shape[1]):
            total_E[expert_HK[h, k]] += weight_H[h]
    for expert in range(experts):
        mask = mask_E[expert]
        if mask & (mask - 1) == 0 or not visit_first:
            for rank in range(ranks):
                if mask >> rank & 1:
                    load_ER[expert, rank] = total_E[expert] / bits(mask)
    return cost_H, load_ER
