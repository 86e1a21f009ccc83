"""How few groups a set of k experts can touch for a given number of pairs together: the convex hull and its steps.

A split of k experts into groups has p pairs together and touches g groups; the lower convex hull of all (p, g) is what
the bound on ranks touched is made of. Slopes are groups saved per further pair together, falling along the hull.

Legend: H expert sets, E experts, V vertices of a hull, K set sizes.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["Hulls", "hulls", "pair_weights_of_slopes", "slopes_towards", "together", "value"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Sets = npt.NDArray[np.int16]


class Hulls:
    """Hull vertices of every set size: pairs_KV ascending and groups_KV falling, `count_K` of them, row = size."""

    def __init__(self, pairs_KV: FloatArray, groups_KV: FloatArray, count_K: IntArray) -> None:
        self.pairs_KV, self.groups_KV, self.count_K = pairs_KV, groups_KV, count_K


def hulls(most: int, largest: int, groups: int) -> Hulls:
    """Hulls for sets of 0 to `most` experts in at most `groups` groups of at most `largest`.

    Raises nothing: a size that does not fit at all (more than groups * largest) cannot occur in a legal problem.
    """
    vertices = [_hull(_points(size, largest, groups)) for size in range(most + 1)]
    width = max(len(points) for points in vertices)
    pairs_KV, groups_KV = np.zeros((most + 1, width)), np.zeros((most + 1, width))
    for size, points in enumerate(vertices):
        for place, (pairs, touched) in enumerate(points):
            pairs_KV[size, place], groups_KV[size, place] = pairs, touched
    return Hulls(pairs_KV, groups_KV, np.array([len(points) for points in vertices]))


def _points(size: int, largest: int, groups: int) -> list[tuple[int, int]]:
    """Best (pairs, groups) of every number of groups: the fewest groups for the most pairs and the other way round."""
    # reach[g] = every number of pairs that `size` experts in exactly g groups can have, by adding one group at a time
    reach = {(0, 0): {0}}
    for group in range(1, min(groups, size) + 1):
        for used in range(size + 1):
            found: set[int] = set()
            for part in range(1, min(largest, used) + 1):
                found |= {pairs + part * (part - 1) // 2 for pairs in reach.get((group - 1, used - part), ())}
            if found:
                reach[group, used] = found
    return sorted((pairs, group) for (group, used), found in reach.items() if used == size for pairs in found)


def _hull(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Lower convex hull where it falls: from the most groups to the fewest."""
    hull: list[tuple[int, int]] = []
    for pairs, groups in points or [(0, 0)]:
        if hull and pairs == hull[-1][0] and groups >= hull[-1][1]:
            continue
        while len(hull) >= 2:
            (p0, g0), (p1, g1) = hull[-2], hull[-1]
            if (g1 - g0) * (pairs - p0) >= (groups - g0) * (p1 - p0):
                hull.pop()
            else:
                break
        if not hull or groups < hull[-1][1]:
            hull.append((pairs, groups))
    return hull


@njit(cache=True)
def together(expert_HK: Sets, same_EE: FloatArray) -> FloatArray:  # pragma: no cover - compiled
    """Pairs of each set that are together, (H,), for a matrix that says how much any two are."""
    sets, top_k = expert_HK.shape
    pairs_H = np.zeros(sets)
    for h in range(sets):
        total = 0.0
        for i in range(top_k):
            for j in range(i + 1, top_k):
                if expert_HK[h, i] >= 0 and expert_HK[h, j] >= 0:
                    total += same_EE[expert_HK[h, i], expert_HK[h, j]]
        pairs_H[h] = total
    return pairs_H


@njit(cache=True)
def pair_weights_of_slopes(
    expert_HK: Sets, weight_H: FloatArray, slope_H: FloatArray, experts: int
) -> FloatArray:  # pragma: no cover - compiled
    """A_EE, symmetric: sum over the sets with both experts of weight * slope."""
    pair_EE = np.zeros((experts, experts))
    sets, top_k = expert_HK.shape
    for h in range(sets):
        amount = weight_H[h] * slope_H[h]
        if amount == 0.0:
            continue
        for i in range(top_k):
            for j in range(i + 1, top_k):
                if expert_HK[h, i] >= 0 and expert_HK[h, j] >= 0:
                    pair_EE[expert_HK[h, i], expert_HK[h, j]] += amount
    return pair_EE + pair_EE.T


@njit(cache=True)
def slopes_towards(
    slope_H: FloatArray,
    pairs_H: FloatArray,
    step: float,
    size_H: IntArray,
    pairs_KV: FloatArray,
    groups_KV: FloatArray,
    count_K: IntArray,
) -> FloatArray:  # pragma: no cover - compiled
    """argmax over b of intercept(b) - b * pairs - (b - slope)^2 / (2 step), for each set: a slope's proximal step."""
    moved_H = np.empty_like(slope_H)
    for h in range(len(slope_H)):
        size = size_H[h]
        vertices = count_K[size]
        best = 0.0
        # vertex v is active for slopes between those of the edges at its two sides; later vertices, smaller slopes
        for v in range(vertices - 1, -1, -1):
            low, high = 0.0, np.inf
            if v + 1 < vertices:
                low = (groups_KV[size, v] - groups_KV[size, v + 1]) / (pairs_KV[size, v + 1] - pairs_KV[size, v])
            if v > 0:
                high = (groups_KV[size, v - 1] - groups_KV[size, v]) / (pairs_KV[size, v] - pairs_KV[size, v - 1])
            wanted = slope_H[h] + step * (pairs_KV[size, v] - pairs_H[h])
            if wanted <= low:
                best = low
                break
            if wanted <= high:
                best = wanted
                break
            best = high
        # beyond the first edge nothing is gained: pairs 0 is the least there is
        moved_H[h] = max(best, 0.0)
    return moved_H


@njit(cache=True)
def value(
    pairs_H: FloatArray,
    weight_H: FloatArray,
    size_H: IntArray,
    pairs_KV: FloatArray,
    groups_KV: FloatArray,
    count_K: IntArray,
) -> float:  # pragma: no cover - compiled
    """Sum over sets of weight * hull(pairs): groups touched as the relaxation sees them."""
    total = 0.0
    for h in range(len(pairs_H)):
        size = size_H[h]
        last = count_K[size] - 1
        touched = groups_KV[size, last]
        if pairs_H[h] <= pairs_KV[size, 0]:
            touched = groups_KV[size, 0]
        for v in range(last):
            p0, p1 = pairs_KV[size, v], pairs_KV[size, v + 1]
            if p0 <= pairs_H[h] <= p1:
                touched = groups_KV[size, v] + (groups_KV[size, v + 1] - groups_KV[size, v]) * (pairs_H[h] - p0) / (
                    p1 - p0
                )
        total += weight_H[h] * touched
    return total
