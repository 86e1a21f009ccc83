"""Every pair in exactly one of R - 1 rounds: an edge colouring of all pairs whose rounds' lengths add up to little.

Legend: R ranks, N nodes, G rounds. Times are float nanoseconds.
"""

from itertools import permutations

import numpy as np
import numpy.typing as npt
from numba import njit

from solvers.schedule.birkhoff import bottleneck_matching

__all__ = ["one_factor_rounds", "rounds_ns"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

UNITS = 1 << 40
"""Steps into which times are cut where matchings compare them."""
FEW = 4
"""Up to so many ranks every set of rounds is one of the starts, renumbered."""
SWEEPS = 20


def one_factor_rounds(
    time_RR: FloatArray, uplink_RR: FloatArray, node_R: IntArray, *, restarts: int, rng: np.random.Generator
) -> IntArray:
    """Whom each rank sends to in each of R - 1 rounds, (R - 1, R); every pair of different ranks once.

    `time_RR` is how long a pair's message keeps its two ports, `uplink_RR` how long it keeps its nodes' uplinks (0
    inside a node or where there are none). A round lasts as long as its longest message or busiest uplink.
    Starts: long messages together, every rank to its d-th neighbour (and to its number xor d where R is a power of
    two), and the latter with ranks renumbered, `restarts` times at random. Two rounds are a set of closed walks, and on
    any walk the two may change places: done while the two rounds together get shorter.
    Guarantee: optimal for R <= 4, where all ways are tried; none above (max-edge-colouring is NP-hard).
    Complexity: O(R^4 log R) for the first start, O(R^3) a sweep.
    """
    ranks = len(time_RR)
    rank = np.arange(ranks)
    shifts = np.stack([(rank + by) % ranks for by in range(1, ranks)])
    bases = [shifts]
    if ranks & (ranks - 1) == 0:
        bases.append(np.stack([rank ^ by for by in range(1, ranks)]))
    if ranks <= FEW:
        names = [np.array(name) for name in permutations(range(ranks))]
    else:
        names = [rank, *(rng.permutation(ranks) for _ in range(restarts))]
    starts = [_long_together(time_RR)]
    for base in bases:
        for name_R in names:
            renamed = np.empty_like(base)
            renamed[:, name_R] = name_R[base]
            starts.append(renamed)
    for to_GR in starts:
        _improve(to_GR, time_RR, uplink_RR, node_R, int(node_R[-1]) + 1)
    return min(starts, key=lambda to_GR: rounds_ns(to_GR, time_RR, uplink_RR, node_R))


def rounds_ns(to_GR: IntArray, time_RR: FloatArray, uplink_RR: FloatArray, node_R: IntArray) -> float:
    """How long the rounds last one after the other."""
    nodes = int(node_R[-1]) + 1
    return float(sum(_round_ns(to_R, time_RR, uplink_RR, node_R, nodes) for to_R in to_GR))


def _long_together(time_RR: FloatArray) -> IntArray:
    """Each round the matching of what is left whose shortest message is longest: what is left stays regular, so there
    always is one."""
    ranks = len(time_RR)
    most = float(time_RR.max())
    entry_RR = 1 + np.rint(time_RR * (UNITS / most if most > 0 else 0.0)).astype(np.int64)
    np.fill_diagonal(entry_RR, 0)
    none_R = np.full(ranks, -1, dtype=np.int64)
    to_GR = np.empty((ranks - 1, ranks), dtype=np.int64)
    for index in range(ranks - 1):
        to_GR[index] = bottleneck_matching(entry_RR, none_R)
        entry_RR[np.arange(ranks), to_GR[index]] = 0
    return to_GR


@njit(cache=True)
def _round_ns(to_R: IntArray, time_RR: FloatArray, uplink_RR: FloatArray, node_R: IntArray, nodes: int) -> float:
    longest = 0.0
    out_N, in_N = np.zeros(nodes), np.zeros(nodes)
    for rank in range(len(to_R)):
        longest = max(longest, time_RR[rank, to_R[rank]])
        out_N[node_R[rank]] += uplink_RR[rank, to_R[rank]]
        in_N[node_R[to_R[rank]]] += uplink_RR[rank, to_R[rank]]
    return max(longest, out_N.max(), in_N.max())


@njit(cache=True)
def _improve(to_GR: IntArray, time_RR: FloatArray, uplink_RR: FloatArray, node_R: IntArray, nodes: int) -> None:
    rounds, ranks = to_GR.shape
    length_G = np.empty(rounds)
    for index in range(rounds):
        length_G[index] = _round_ns(to_GR[index], time_RR, uplink_RR, node_R, nodes)
    walk_R = np.empty(ranks, dtype=np.int64)
    sender_R = np.empty(ranks, dtype=np.int64)
    first, second = np.empty(ranks, dtype=np.int64), np.empty(ranks, dtype=np.int64)
    for _ in range(SWEEPS):
        better = False
        for one in range(rounds):
            for other in range(one + 1, rounds):
                walks = _walks(to_GR[one], to_GR[other], sender_R, walk_R)
                # -1: on every walk the longer side to `one`; else that walk alone
                for pick in range(-1, walks):
                    first[:], second[:] = to_GR[one], to_GR[other]
                    for walk in range(walks):
                        if walk == pick or (pick < 0 and _is_longer(second, first, walk, walk_R, time_RR)):
                            for rank in range(ranks):
                                if walk_R[rank] == walk:
                                    first[rank], second[rank] = second[rank], first[rank]
                    length_one = _round_ns(first, time_RR, uplink_RR, node_R, nodes)
                    length_other = _round_ns(second, time_RR, uplink_RR, node_R, nodes)
                    if length_one + length_other < (length_G[one] + length_G[other]) * (1 - 1e-12):
                        to_GR[one], to_GR[other] = first, second
                        length_G[one], length_G[other] = length_one, length_other
                        better = True
        if not better:
            return


@njit(cache=True)
def _walks(first: IntArray, second: IntArray, sender_R: IntArray, walk_R: IntArray) -> int:
    """How many closed walks two rounds make; `walk_R` becomes the walk of each sender."""
    for rank in range(len(first)):
        sender_R[second[rank]] = rank
    walk_R[:] = -1
    walks = 0
    for rank in range(len(first)):
        if walk_R[rank] < 0:
            at = rank
            while walk_R[at] < 0:
                walk_R[at] = walks
                at = sender_R[first[at]]
            walks += 1
    return walks


@njit(cache=True)
def _is_longer(first: IntArray, second: IntArray, walk: int, walk_R: IntArray, time_RR: FloatArray) -> bool:
    """Whether the longest message of a walk is in `first`."""
    longest_first, longest_second = 0.0, 0.0
    for rank in range(len(first)):
        if walk_R[rank] == walk:
            longest_first = max(longest_first, time_RR[rank, first[rank]])
            longest_second = max(longest_second, time_RR[rank, second[rank]])
    return longest_first > longest_second
