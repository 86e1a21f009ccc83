"""Biclique cuts: partners of one expert are partners of each other's partners.

Where expert i shares its rank with both j and j' of the next layer, any i' beside j is beside j' too:
s_ij + s_ij' + s_i'j - s_i'j' <= 2. The same with the roles of the layers exchanged is the same inequality.

Legend: Q pairs of layers, E experts, N cuts.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["violated_cuts"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@njit(cache=True)
def violated_cuts(
    s_EE: FloatArray, least: float, most: int
) -> tuple[IntArray, FloatArray]:  # pragma: no cover - compiled
    """(i, i', j, j') of cuts that the point breaks by more than `least`, (N, 4), and by how much, (N,).

    Of more than `most`, the first found of the most broken. O(E * partners^3) for few partners per expert.
    """
    experts = len(s_EE)
    found_N4 = np.empty((most, 4), dtype=np.int64)
    by_N = np.empty(most)
    partners = np.empty(experts, dtype=np.int64)
    column_E = np.empty((experts, experts), dtype=np.int64)
    count_E = np.zeros(experts, dtype=np.int64)
    for one in range(experts):
        for two in range(experts):
            if s_EE[one, two] > least:
                column_E[two, count_E[two]] = one
                count_E[two] += 1
    bar = least
    found = 0
    for i in range(experts):
        count = 0
        for j in range(experts):
            if s_EE[i, j] > least:
                partners[count] = j
                count += 1
        for a in range(count):
            j = partners[a]
            for b in range(count):
                k = partners[b]
                both = s_EE[i, j] + s_EE[i, k] - 2.0
                if a == b or both + 1.0 <= bar:
                    continue
                for c in range(count_E[j]):
                    other = column_E[j, c]
                    by = both + s_EE[other, j] - s_EE[other, k]
                    if by <= bar or other == i:
                        continue
                    if found == most:
                        # full: keep the more broken half
                        order = np.argsort(-by_N, kind="mergesort")
                        half = most // 2
                        found_N4[:half] = found_N4[order[:half]]
                        by_N[:half] = by_N[order[:half]]
                        found = half
                        bar = by_N[half - 1]
                        if by <= bar:
                            continue
                    found_N4[found, 0], found_N4[found, 1], found_N4[found, 2], found_N4[found, 3] = i, other, j, k
                    by_N[found] = by
                    found += 1
    return found_N4[:found], by_N[:found]
