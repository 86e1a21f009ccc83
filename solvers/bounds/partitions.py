"""Steps of the bound on ranks touched that look at expert sets: slopes for pairs of members against partitions.

The relaxation gives every set a distribution over the partitions of its members (share_HV) and wants its pairs together
to agree with the matrix X; slopes are the multipliers of that. For larger sets, whose partitions are too many, every
member has a slope against the number of others that are with it (a set touches the sum over members of 1 / (members in
its part) groups).

Legend: H expert sets, E experts, K members, Q pairs of members, V partitions, M patterns of present members.
"""

from itertools import combinations

import numpy as np
import numpy.typing as npt
from numba import njit

from solvers.bounds.simplex import simplex_level

__all__ = ["Partitions", "member_values", "pair_values", "partitions_of", "sizes_of", "step_members", "step_pairs"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Sets = npt.NDArray[np.int16]


class Partitions:
    """Partitions for each pattern of absent members: together_MVQ 0 or 1, groups_MV, count_M; pattern_H of all sets."""

    def __init__(self, together_MVQ: FloatArray, groups_MV: FloatArray, count_M: IntArray, pattern_H: IntArray) -> None:
        self.together_MVQ, self.groups_MV, self.count_M, self.pattern_H = together_MVQ, groups_MV, count_M, pattern_H


def partitions_of(expert_HK: Sets, capacity: int, groups: int) -> Partitions:
    """Partitions of every set's members into at most `groups` parts of at most `capacity`."""
    patterns_MK, pattern_H = np.unique(expert_HK >= 0, axis=0, return_inverse=True)
    pairs = list(combinations(range(expert_HK.shape[1]), 2))
    tables = []
    for pattern_K in patterns_MK:
        members = np.flatnonzero(pattern_K).tolist()
        grown: list[list[list[int]]] = [[]]
        for member in members:
            grown = [
                [*parts[:place], [*parts[place], member], *parts[place + 1 :]]
                if place < len(parts)
                else [*parts, [member]]
                for parts in grown
                for place in range(min(len(parts) + 1, groups))
                if place == len(parts) or len(parts[place]) < capacity
            ]
        tables.append(grown)
    most = max(len(table) for table in tables)
    together_MVQ, groups_MV = np.zeros((len(tables), most, len(pairs))), np.zeros((len(tables), most))
    for row, table in enumerate(tables):
        for column, parts in enumerate(table):
            groups_MV[row, column] = len(parts)
            for q, (i, j) in enumerate(pairs):
                together_MVQ[row, column, q] = any(i in part and j in part for part in parts)
    return Partitions(together_MVQ, groups_MV, np.array([len(table) for table in tables]), pattern_H.reshape(-1))


@njit(cache=True, fastmath=True)
def step_pairs(
    expert_HK: Sets,
    weight_H: FloatArray,
    same_EE: FloatArray,
    share_HV: FloatArray,
    slope_HQ: FloatArray,
    together_MVQ: FloatArray,
    groups_MV: FloatArray,
    count_M: IntArray,
    pattern_H: IntArray,
    slope_step: float,
    share_step_M: FloatArray,
    least: float,
) -> FloatArray:  # pragma: no cover - compiled
    """One primal-dual step of every set, in place; what the slopes amount to on each pair of experts, (E, E)."""
    experts = len(same_EE)
    pair_EE = np.zeros((experts, experts))
    sets, top_k = expert_HK.shape
    most, pairs = together_MVQ.shape[1:]
    moved_V, ahead_V, live_V = np.empty(most), np.empty(most), np.empty(most)
    for h in range(sets):
        m = pattern_H[h]
        count = count_M[m]
        for v in range(count):
            cost = groups_MV[m, v]
            for q in range(pairs):
                cost += together_MVQ[m, v, q] * slope_HQ[h, q]
            moved_V[v] = share_HV[h, v] - share_step_M[m] * cost
            live_V[v] = moved_V[v]
        level = simplex_level(live_V, count)
        for v in range(count):
            share = max(0.0, moved_V[v] - level)
            ahead_V[v] = 2.0 * share - share_HV[h, v]
            share_HV[h, v] = share
        q = 0
        for i in range(top_k):
            for j in range(i + 1, top_k):
                e, f = expert_HK[h, i], expert_HK[h, j]
                if e >= 0 and f >= 0:
                    off = -same_EE[e, f]
                    for v in range(count):
                        off += together_MVQ[m, v, q] * ahead_V[v]
                    slope_HQ[h, q] = max(least, slope_HQ[h, q] + slope_step * off)
                    pair_EE[e, f] += weight_H[h] * slope_HQ[h, q]
                q += 1
    return pair_EE + pair_EE.T


@njit(cache=True)
def pair_values(
    weight_H: FloatArray,
    slope_HQ: FloatArray,
    together_MVQ: FloatArray,
    groups_MV: FloatArray,
    count_M: IntArray,
    pattern_H: IntArray,
) -> float:  # pragma: no cover - compiled
    """Sum over sets of weight * least of groups touched + slopes of pairs together."""
    total = 0.0
    for h in range(len(weight_H)):
        m = pattern_H[h]
        best = np.inf
        for v in range(count_M[m]):
            cost = groups_MV[m, v]
            for q in range(slope_HQ.shape[1]):
                cost += together_MVQ[m, v, q] * slope_HQ[h, q]
            best = min(best, cost)
        total += weight_H[h] * best
    return total


@njit(cache=True)
def step_members(
    expert_HK: Sets,
    weight_H: FloatArray,
    same_EE: FloatArray,
    slope_HK: FloatArray,
    step: float,
    capacity: int,
) -> FloatArray:  # pragma: no cover - compiled
    """One proximal step of every member's slope, in place; what slopes amount to on each pair of experts, (E, E).

    The new slope b maximises min over m of (1 / m + b (m - 1)) - b others - (b - old)^2 / (2 step); vertex m is active
    for slopes between 1 / (m (m + 1)) and 1 / (m (m - 1)).
    """
    experts = len(same_EE)
    pair_EE = np.zeros((experts, experts))
    sets, top_k = expert_HK.shape
    for h in range(sets):
        size = 0
        for i in range(top_k):
            size += expert_HK[h, i] >= 0
        most = min(size, capacity)
        for i in range(top_k):
            e = expert_HK[h, i]
            if e < 0:
                continue
            others = 0.0
            for j in range(top_k):
                if j != i and expert_HK[h, j] >= 0:
                    others += same_EE[e, expert_HK[h, j]]
            best = 0.0
            for m in range(most, 0, -1):
                low = 0.0 if m == most else 1.0 / (m * (m + 1))
                high = np.inf if m == 1 else 1.0 / (m * (m - 1))
                wanted = slope_HK[h, i] + step * (m - 1 - others)
                if wanted <= low:
                    best = low
                    break
                if wanted <= high:
                    best = wanted
                    break
            slope_HK[h, i] = best
        for i in range(top_k):
            for j in range(i + 1, top_k):
                e, f = expert_HK[h, i], expert_HK[h, j]
                if e >= 0 and f >= 0:
                    pair_EE[e, f] += weight_H[h] * (slope_HK[h, i] + slope_HK[h, j])
    return pair_EE + pair_EE.T


@njit(cache=True)
def member_values(
    expert_HK: Sets,
    weight_H: FloatArray,
    slope_HK: FloatArray,
    others_KVK: FloatArray,
    groups_KV: FloatArray,
    count_K: IntArray,
) -> float:  # pragma: no cover - compiled
    """Sum over sets of weight * least, over sizes of parts, of groups touched + slopes; see `sizes_of`."""
    total = 0.0
    sets, top_k = expert_HK.shape
    for h in range(sets):
        size = 0
        rising_K = np.empty(top_k)
        for i in range(top_k):
            if expert_HK[h, i] >= 0:
                rising_K[size] = slope_HK[h, i]
                size += 1
        rising_K[:size].sort()
        best = np.inf
        for v in range(count_K[size]):
            cost = groups_KV[size, v]
            for i in range(size):
                cost += others_KVK[size, v, i] * rising_K[i]
            best = min(best, cost)
        total += weight_H[h] * best
    return total


def sizes_of(most: int, capacity: int, groups: int) -> tuple[FloatArray, FloatArray, IntArray]:
    """others_KVK (falling: companions of each member), groups_KV, count_K of every split of 0 to `most` members."""
    tables: list[list[list[int]]] = []
    for size in range(most + 1):
        open_splits: list[tuple[list[int], int]] = [([], size)] if size else []
        found: list[list[int]] = [] if size else [[]]
        while open_splits:
            split, left = open_splits.pop()
            for part in range(min(left, capacity, split[-1] if split else left), 0, -1):
                grown = [*split, part]
                if part == left:
                    found.append(grown)
                elif len(grown) < groups:
                    open_splits.append((grown, left - part))
        tables.append(found)
    widest = max(len(table) for table in tables)
    others_KVK, groups_KV = np.zeros((most + 1, widest, max(1, most))), np.zeros((most + 1, widest))
    for size, table in enumerate(tables):
        for row, split in enumerate(table):
            groups_KV[size, row] = len(split)
            others_KVK[size, row, :size] = [part - 1 for part in split for _ in range(part)]
    return others_KVK, groups_KV, np.array([len(table) for table in tables])
