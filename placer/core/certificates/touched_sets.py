"""What expert sets contribute to the bound on ranks touched: an intercept each, and weights on pairs of experts.

At any placement the members of a set fall into parts, one for every group they touch: a partition of the set into at
most G parts of at most C. Price every pair of members that is together with a slope; then for the partition that the
placement really makes, and so for the least of all partitions,

    groups touched  >=  intercept - sum over pairs together of slope,
    intercept = min over partitions of (number of parts + sum over pairs together of slope)

Two forms of slopes:

    per pair    slope_HQ, one for each pair of members; the minimum runs over all set partitions (Bell numbers: 15 for 4
                members, 4140 for 8), by way of the least for every subset of members; at most 8 members
    per member  slope_HK; a pair costs the sum of its two members' slopes, a member in a part of m costs (m - 1) slope,
                so only the sizes of the parts matter: for given sizes the largest slopes go to the smallest parts
                (rearrangement), and the minimum runs over integer partitions (22 for 8 members)

One slope for a whole set is the second form with half of it for every member. With replicas "together" means that some
rank holds both; the partition that a set is served by has no more pairs together than that, so slopes must be >= 0.

Legend: H expert sets, K members (columns, -1 where a set has fewer), Q = K (K - 1) / 2 pairs of columns i < j in
lexicographic order, E experts.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from placer.core.certificates.read import FloatArray
from placer.core.errors import ViolationError

__all__ = ["MOST_PAIRED", "member_intercepts", "pair_intercepts", "pair_slopes", "together_weights"]

MOST_PAIRED = 8
CHUNK = 1 << 13
Sets = npt.NDArray[np.int16]


def member_intercepts(expert_HK: Sets, slope_HK: FloatArray, largest: int, groups: int) -> FloatArray:
    """Least of groups touched + slopes of pairs together, (H,), for slopes per member. O(H K partitions)."""
    size_H = (expert_HK >= 0).sum(axis=1)
    intercept_H = np.zeros(len(size_H))
    # absent members sort behind all present ones
    falling_HK = -np.sort(np.where(expert_HK >= 0, -slope_HK, np.inf), axis=1)
    for size in np.unique(size_H):
        here = np.flatnonzero(size_H == size)
        slope_HS = falling_HK[here, :size]
        least_H = np.full(len(here), np.inf)
        for parts in _integer_partitions(int(size), largest, groups):
            others_S = np.array([part - 1 for part in sorted(parts) for _ in range(part)], dtype=np.float64)
            np.minimum(least_H, len(parts) + slope_HS @ others_S, out=least_H)
        intercept_H[here] = least_H
    return intercept_H


def pair_intercepts(expert_HK: Sets, slope_HQ: FloatArray, largest: int, groups: int) -> FloatArray:
    """The same for slopes per pair. Raises ViolationError for sets of more than 8 members. O(H 3^K min(G, K))."""
    columns = expert_HK.shape[1]
    first, second = np.triu_indices(columns, 1)
    column_KK = np.zeros((columns, columns), dtype=np.int64)
    column_KK[first, second] = np.arange(len(first))
    # the diagonal and the lower half point at some column and are never read
    slope_QH = slope_HQ.T if len(first) else np.zeros((1, len(expert_HK)))
    present_HK = expert_HK >= 0
    if present_HK.sum(axis=1).max(initial=0) > MOST_PAIRED:
        raise ViolationError(f"certificate: slopes per pair are for sets of at most {MOST_PAIRED} members")
    intercept_H = np.zeros(len(expert_HK))
    for mask_K in np.unique(present_HK, axis=0):
        here = np.flatnonzero((present_HK == mask_K).all(axis=1))
        members = np.flatnonzero(mask_K)
        for start in range(0, len(here), CHUNK):
            rows = here[start : start + CHUNK]
            slope_SSH = slope_QH[:, rows][column_KK[np.ix_(members, members)]]
            intercept_H[rows] = _least_partition(slope_SSH, largest, groups)
    return intercept_H


def _least_partition(slope_SSH: FloatArray, largest: int, groups: int) -> FloatArray:
    """Least over partitions of parts + slopes together, (H,): subset by subset, the part of the lowest member first."""
    size, _, sets = slope_SSH.shape
    part_H: list[FloatArray] = [np.zeros(sets)]
    for subset in range(1, 1 << size):
        low, rest = (subset & -subset).bit_length() - 1, subset & (subset - 1)
        with_low = [member for member in range(size) if rest >> member & 1]
        part_H.append(part_H[rest] + slope_SSH[low, with_low].sum(axis=0))
    nothing, impossible = np.zeros(sets), np.full(sets, np.inf)
    least = [nothing] + [impossible] * ((1 << size) - 1)
    # where there are as many groups as members their number never binds, and one pass in place is enough
    bound = groups < size
    for _ in range(groups if bound else 1):
        grown = [nothing]
        for subset in range(1, 1 << size):
            lowest, rest = subset & -subset, subset & (subset - 1)
            best_H, others = impossible, rest
            while True:
                part = others | lowest
                if part.bit_count() <= largest:
                    before = least if bound else grown
                    best_H = np.minimum(best_H, 1.0 + part_H[part] + before[subset ^ part])
                if not others:
                    break
                others = (others - 1) & rest
            grown.append(best_H)
        least = grown
    return least[-1]


def pair_slopes(expert_HK: Sets, slope_HK: FloatArray) -> FloatArray:
    """Slopes per pair that slopes per member amount to, (H, Q); 0 for pairs with an absent member."""
    first, second = np.triu_indices(expert_HK.shape[1], 1)
    present = (expert_HK[:, first] >= 0) & (expert_HK[:, second] >= 0)
    return np.where(present, slope_HK[:, first] + slope_HK[:, second], 0.0)


def together_weights(expert_HK: Sets, weight_H: FloatArray, slope_HQ: FloatArray, experts: int) -> FloatArray:
    """sum over the sets with both experts of weight * slope of that pair, (E, E), symmetric. O(H Q).

    Raises ViolationError where a pair with an absent member has a slope.
    """
    weight_EE = np.zeros(experts * experts)
    first, second = np.triu_indices(expert_HK.shape[1], 1)
    for column, (i, j) in enumerate(zip(first, second, strict=True)):
        one, two, amount_H = expert_HK[:, i].astype(np.int64), expert_HK[:, j], weight_H * slope_HQ[:, column]
        absent = (one < 0) | (two < 0)
        if (slope_HQ[absent, column] != 0).any():
            raise ViolationError("certificate: a slope speaks of a member that its set does not have; it must be 0")
        at = np.where(absent, 0, one * experts + two)
        weight_EE += np.bincount(at, weights=amount_H, minlength=experts * experts)
    half_EE = weight_EE.reshape(experts, experts)
    return half_EE + half_EE.T


def _integer_partitions(size: int, largest: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every split of `size` into at most `parts` parts of at most `largest`, parts falling."""
    if size == 0:
        yield ()
    elif parts > 0:
        for first in range(min(size, largest), 0, -1):
            for rest in _integer_partitions(size - first, first, parts - 1):
                yield (first, *rest)
