"""Experts to ranks with equal room, for the largest total gain: the assignment that every step of the search needs.

Legend: E experts, R ranks, C slots per rank.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["assign"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@njit(cache=True)
def assign(gain_ER: FloatArray, price_R: FloatArray) -> IntArray:  # pragma: no cover - compiled
    """rank_E with E / R experts on every rank and the largest sum of gain_ER[e, rank_E[e]]; exact.

    `price_R` holds dual prices of the ranks: whatever is given is a valid start (ranks are all filled in the end),
    those of a similar problem a fast one; on return they are optimal, so sum over e of max_r (gain - price) + E / R *
    sum (price) equals the total gain. Successive shortest paths over ranks, O(E^2 R) at worst.
    """
    experts, ranks = gain_ER.shape
    width = experts // ranks
    rank_E = np.full(experts, -1, dtype=np.int64)
    held_RC = np.full((ranks, width), -1, dtype=np.int64)
    count_R = np.zeros(ranks, dtype=np.int64)
    distance_R = np.empty(ranks)
    from_R = np.empty(ranks, dtype=np.int64)
    closed_R = np.empty(ranks, dtype=np.bool_)
    for fresh in range(experts):
        for rank in range(ranks):
            distance_R[rank] = price_R[rank] - gain_ER[fresh, rank]
            from_R[rank] = fresh
            closed_R[rank] = False
        while True:
            nearest = -1
            for rank in range(ranks):
                if not closed_R[rank] and (nearest < 0 or distance_R[rank] < distance_R[nearest]):
                    nearest = rank
            if count_R[nearest] < width:
                break
            closed_R[nearest] = True
            for column in range(width):
                mover = held_RC[nearest, column]
                base = distance_R[nearest] - (price_R[nearest] - gain_ER[mover, nearest])
                for rank in range(ranks):
                    through = base + price_R[rank] - gain_ER[mover, rank]
                    if not closed_R[rank] and through < distance_R[rank]:
                        distance_R[rank] = through
                        from_R[rank] = mover
        for rank in range(ranks):
            if closed_R[rank]:
                price_R[rank] += distance_R[nearest] - distance_R[rank]
        rank = nearest
        while True:
            mover = from_R[rank]
            before = rank_E[mover]
            rank_E[mover] = rank
            if before < 0:
                held_RC[rank, count_R[rank]] = mover
                count_R[rank] += 1
                break
            for column in range(width):
                if held_RC[before, column] == mover:
                    held_RC[before, column] = held_RC[before, count_R[before] - 1]
                    break
            count_R[before] -= 1
            held_RC[rank, count_R[rank]] = mover
            count_R[rank] += 1
            rank = before
    return rank_E
