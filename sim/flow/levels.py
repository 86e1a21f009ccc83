"""The levels of links under max-min fairness: the speed at which each full link's own flows go.

Legend: Q links (and one more, never full), E entries (one for each flow on each link), O other places of its path.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["SAME", "solve_levels"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

SAME = 1e-13
"""Levels that differ by less, relatively, are one level: what rounding leaves of equal ones."""

MANY = 16
"""So many links that moved are sorted anew, fewer are put in their places one by one."""


@njit(cache=True)
def solve_levels(
    flows_Q: IntArray,
    offset_Q: IntArray,
    pairs_Q: IntArray,
    other_EO: npt.NDArray[np.int32],
    cost_2E: FloatArray,
    order_Q: IntArray,
    level_Q: FloatArray,
    dirty_Q: npt.NDArray[np.bool_],
    moved_Q: npt.NDArray[np.bool_],
    dirty: int,
) -> int:
    """Solves the equations of `dirty` links marked in dirty_Q, and of those that depend on them; returns 0.

    Arrays as in sim.flow.network.Network; updates level_Q and order_Q, marks links with a new level in moved_Q.
    Complexity: one pass over the flows of each link whose equation changes, times the changes on the way.
    Guarantee: the max-min fair speeds to a relative SAME.
    Reference: Bertsekas and Gallager, Data Networks, section 6.5.2 (the fair allocation is the one in which every flow
    has a bottleneck link).
    """
    moves = 0
    while dirty > 0:
        for link in order_Q:
            if not dirty_Q[link]:
                continue
            dirty_Q[link] = False
            dirty -= 1
            old = level_Q[link]
            new = _level(flows_Q[link], offset_Q[link], pairs_Q[link], other_EO, cost_2E, level_Q, old)
            if new == old or abs(new - old) <= SAME * min(new, old):
                continue
            level_Q[link] = new
            moves += 1
            moved_Q[link] = True
            low = min(old, new)
            for entry in range(offset_Q[link], offset_Q[link] + flows_Q[link]):
                for at in range(other_EO.shape[1]):
                    other = other_EO[entry, at]
                    # who is at most as high is not held up by this link, before or after
                    if level_Q[other] > low and not dirty_Q[other] and other < len(flows_Q):
                        dirty_Q[other] = True
                        dirty += 1
    if moves > MANY:
        order_Q[:] = order_Q[np.argsort(level_Q[order_Q], kind="mergesort")]
    elif moves > 0:
        for at in range(1, len(order_Q)):
            link, place = order_Q[at], at
            while place > 0 and level_Q[order_Q[place - 1]] > level_Q[link]:
                order_Q[place] = order_Q[place - 1]
                place -= 1
            order_Q[place] = link
    return dirty


@njit(cache=True)
def _level(
    flows: int,
    offset: int,
    pairs: int,
    other_EO: npt.NDArray[np.int32],
    cost_2E: FloatArray,
    level_Q: FloatArray,
    guess: float,
) -> float:
    """Newton's method on a concave function of straight pieces, from any guess: exact after as many steps as pieces."""
    if flows == 0:
        return np.inf
    beside, others = 1 if pairs > 1 else 0, other_EO.shape[1]
    while True:
        below, weight, highest, lowest = 0.0, 0.0, -1.0, np.inf
        for entry in range(offset, offset + flows):
            least = level_Q[other_EO[entry, 0]]
            for at in range(1, others):
                least = min(least, level_Q[other_EO[entry, at]])
            cost = cost_2E[beside, entry]
            if least < guess:
                below += cost * least
                highest = max(highest, least)
            else:
                weight += cost
                lowest = min(lowest, least)
        if weight == 0.0:
            if below <= 1 + SAME:
                return np.inf
            guess = 0.0
            continue
        new = (1 - below) / weight
        if new < guess:
            if highest <= new or guess - new <= SAME * new:
                return new
            guess = max(new, 0.0)
        else:
            if new <= lowest:
                return new
            guess = new
