"""Partitions of larger expert sets as columns: a few at a time, found where they would help.

Sets of six to eight members have up to 4140 partitions. Each set works with some of them; now and then the partition
that is cheapest at the present slopes joins. Cheapest comes from a table over subsets of the members (3^K / 2 steps).

Legend: H expert sets, E experts, K members, Q pairs of members i < j in lexicographic order, A active partitions of a
set. A partition is a bit mask over Q: which pairs are together.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from solvers.bounds.simplex import simplex_level

__all__ = ["MOST_ACTIVE", "cheapest_partitions", "step_columns"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Sets = npt.NDArray[np.int16]

MOST_ACTIVE = 32


@njit(cache=True, fastmath=True)
def step_columns(
    expert_HK: Sets,
    weight_H: FloatArray,
    same_EE: FloatArray,
    slope_HQ: FloatArray,
    mask_HA: IntArray,
    groups_HA: FloatArray,
    share_HA: FloatArray,
    count_H: IntArray,
    norm_H: FloatArray,
    slope_step: float,
    share_reach: float,
    least: float,
) -> FloatArray:  # pragma: no cover - compiled
    """One primal-dual step of every set on its active partitions, in place; weights on pairs of experts, (E, E)."""
    experts = len(same_EE)
    pair_EE = np.zeros((experts, experts))
    sets, top_k = expert_HK.shape
    moved_A, ahead_A, live_A = np.empty(MOST_ACTIVE), np.empty(MOST_ACTIVE), np.empty(MOST_ACTIVE)
    for h in range(sets):
        count = count_H[h]
        share_step = share_reach / (slope_step * norm_H[h])
        for a in range(count):
            cost = groups_HA[h, a]
            for q in range(slope_HQ.shape[1]):
                cost += ((mask_HA[h, a] >> q) & 1) * slope_HQ[h, q]
            moved_A[a] = share_HA[h, a] - share_step * cost
            live_A[a] = moved_A[a]
        level = simplex_level(live_A, count)
        for a in range(count):
            share = max(0.0, moved_A[a] - level)
            ahead_A[a] = 2.0 * share - share_HA[h, a]
            share_HA[h, a] = share
        q = 0
        for i in range(top_k):
            for j in range(i + 1, top_k):
                e, f = expert_HK[h, i], expert_HK[h, j]
                if e >= 0 and f >= 0:
                    off = -same_EE[e, f]
                    for a in range(count):
                        off += ((mask_HA[h, a] >> q) & 1) * ahead_A[a]
                    slope_HQ[h, q] = max(least, slope_HQ[h, q] + slope_step * off)
                    pair_EE[e, f] += weight_H[h] * slope_HQ[h, q]
                q += 1
    return pair_EE + pair_EE.T


@njit(cache=True)
def cheapest_partitions(
    expert_HK: Sets,
    weight_H: FloatArray,
    slope_HQ: FloatArray,
    mask_HA: IntArray,
    groups_HA: FloatArray,
    share_HA: FloatArray,
    count_H: IntArray,
    norm_H: FloatArray,
    capacity: int,
    groups: int,
    join: bool,
) -> float:  # pragma: no cover - compiled
    """Sum over sets of weight * least of groups touched + slopes together; with `join` the least become active."""
    total = 0.0
    sets, top_k = expert_HK.shape
    subsets = 1 << top_k
    cost_M, size_M = np.zeros(subsets), np.zeros(subsets, np.int64)
    least_RM, chosen_RM = np.zeros((top_k + 1, subsets)), np.zeros((top_k + 1, subsets), np.int64)
    slope_KK, pair_KK = np.zeros((top_k, top_k)), np.zeros((top_k, top_k), np.int64)
    for mask in range(1, subsets):
        size_M[mask] = size_M[mask >> 1] + (mask & 1)
    member_K = np.zeros(top_k, np.int64)
    for h in range(sets):
        size = 0
        for i in range(top_k):
            if expert_HK[h, i] >= 0:
                member_K[size] = i
                size += 1
        for i in range(size):
            for j in range(i + 1, size):
                one, two = member_K[i], member_K[j]
                q = one * top_k - one * (one + 1) // 2 + two - one - 1
                slope_KK[i, j], pair_KK[i, j] = slope_HQ[h, q], q
        full = (1 << size) - 1
        rounds = groups if groups < size else 1
        for mask in range(1, full + 1):
            low = 0
            while not (mask >> low) & 1:
                low += 1
            rest = mask & (mask - 1)
            cost = cost_M[rest] if rest else 1.0
            for j in range(low + 1, size):
                if (rest >> j) & 1:
                    cost += slope_KK[low, j]
            cost_M[mask] = cost
        for r in range(rounds + 1):
            least_RM[r, 0] = 0.0
        if groups < size:
            least_RM[0, 1 : full + 1] = np.inf
        for r in range(1, rounds + 1):
            before = r - 1 if groups < size else r
            for mask in range(1, full + 1):
                # every part but the first holds members above the lowest: try each that holds the lowest
                rest = mask & (mask - 1)
                first = mask ^ rest
                best, chosen = np.inf, 0
                sub = rest
                while True:
                    part = sub | first
                    if size_M[part] <= capacity:
                        worth = cost_M[part] + least_RM[before, mask ^ part]
                        if worth < best:
                            best, chosen = worth, part
                    if sub == 0:
                        break
                    sub = (sub - 1) & rest
                least_RM[r, mask], chosen_RM[r, mask] = best, chosen
        total += weight_H[h] * least_RM[rounds, full]
        if not join:
            continue
        together, parts, left, r = 0, 0, full, rounds
        while left:
            part = chosen_RM[r, left]
            for i in range(size):
                for j in range(i + 1, size):
                    if (part >> i) & 1 and (part >> j) & 1:
                        together |= 1 << pair_KK[i, j]
            left ^= part
            parts += 1
            if groups < size:
                r -= 1
        known = False
        slot = count_H[h]
        for a in range(count_H[h]):
            known = known or mask_HA[h, a] == together
        if known:
            continue
        if slot == MOST_ACTIVE:
            slot = np.argmin(share_HA[h])
        else:
            count_H[h] += 1
        mask_HA[h, slot], groups_HA[h, slot] = together, parts
        share_HA[h, slot] = 1.0 if count_H[h] == 1 else 0.0
        norm = 1.0
        for a in range(count_H[h]):
            row = 0.0
            for b in range(count_H[h]):
                common = mask_HA[h, a] & mask_HA[h, b]
                while common:
                    row += 1
                    common &= common - 1
            norm = max(norm, row)
        norm_H[h] = norm
    return total
