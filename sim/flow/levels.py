"""The levels of links under max-min fairness: the speed at which each full link's own flows go.

Legend: Q links (and one more, never full), E entries (one for each flow on each link), O other places of its path.
"""

import numpy as np
import numpy.typing as npt
from numba import njit, uintp

__all__ = ["NEARLY_FULL", "REORDER", "SAME", "solve_levels"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

SAME = 1e-13
"""Levels that differ by less, relatively, are one level: what rounding leaves of equal ones."""

REORDER = {"reassoc", "nsz", "nnan"}
"""What the compiler may assume of sums: any order will do, and there is no NaN."""

NEARLY_FULL = 1 - 1e-9
"""Links that are not full may be more used than this only after their flows have been added up."""


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def solve_levels(
    flows_Q: IntArray,
    offset_Q: IntArray,
    pairs_Q: IntArray,
    other_EO: npt.NDArray[np.uint32],
    cost_2E: FloatArray,
    order_Q: IntArray,
    level_Q: FloatArray,
    dirty_Q: IntArray,
    moved_Q: npt.NDArray[np.bool_],
    held_E: FloatArray,
    wrong_Q: npt.NDArray[np.bool_],
    used_Q: FloatArray,
    most_cost: float,
    rest_N: FloatArray,
) -> None:
    """Solves the equations of the links marked in dirty_Q and of those that depend on them.

    Arrays as in sim.flow.network.Network; updates level_Q and order_Q, marks links with a new level
    in moved_Q and in wrong_Q those whose flows (held_E) have to change their holders. rest_N is scratch.
    Complexity: one pass over the flows of each link whose equation changes, times the changes on the way.
    Guarantee: the max-min fair speeds to a relative SAME.
    Reference: Bertsekas and Gallager, Data Networks, section 6.5.2 (the fair allocation is the one in which every flow
    has a bottleneck link).
    """
    turn, links = 0, len(order_Q)
    while turn < links:
        link = order_Q[turn]
        if dirty_Q[link] == 0:
            turn += 1
            continue
        dirty_Q[link] = 0
        old = level_Q[link]
        first, flows, beside = uintp(offset_Q[link]), flows_Q[link], uintp(1 if pairs_Q[link] > 1 else 0)
        # what the rest of each flow's path allows it
        for at in range(flows):
            rest_N[at] = level_Q[other_EO[first + uintp(at), 0]]
        for place in range(1, other_EO.shape[1]):
            for at in range(flows):
                rest_N[at] = min(rest_N[at], level_Q[other_EO[first + uintp(at), uintp(place)]])
        # Newton's method on a concave function of straight pieces: from the first step on the level only rises
        new, weight_before = old, -1.0
        while True:
            below, weight = 0.0, 0.0
            # sums alone, and no branches: the machine takes several flows at once
            for at in range(flows):
                rest, cost = rest_N[at], cost_2E[beside, first + uintp(at)]
                below += cost * (rest if rest < new else 0.0)
                weight += cost if rest >= new else 0.0
            if weight == weight_before:
                break
            if weight == 0.0 and below <= 1 + SAME:
                new = np.inf
                used_Q[link] = below
                break
            step = max((1 - below) / weight, 0.0) if weight > 0.0 else 0.0
            close = abs(step - new) <= SAME * step
            new, weight_before = step, weight
            if close:
                break
        same = new == old or abs(new - old) <= SAME * min(new, old)
        if same:
            new = old
        wrong = 0.0
        for at in range(flows):
            rest, held = rest_N[at], held_E[first + uintp(at)]
            low, high = (rest, new) if held > 0 else (new, rest)
            wrong += 1.0 if low < high * (1 - SAME) else 0.0
        wrong_Q[link] = wrong > 0
        if same:
            turn += 1
            continue
        level_Q[link] = new
        moved_Q[link] = True
        low, more = min(old, new), max(new - old, 0.0) * most_cost
        for place in range(other_EO.shape[1]):
            for at in range(flows):
                other = other_EO[first + uintp(at), uintp(place)]
                # at most: the rest of the path may hold the flow back
                used_Q[other] += more
                # who is at most as high is not held up by this link, before or after; who is not full may stay so
                may_rise = level_Q[other] < np.inf or used_Q[other] > NEARLY_FULL
                dirty_Q[other] |= 1 if level_Q[other] > low and may_rise else 0
        # the order is kept, so that links see lower ones settled: what this one dirties comes after `turn`
        place = turn
        while place + 1 < links and level_Q[order_Q[place + 1]] < new:
            order_Q[place] = order_Q[place + 1]
            place += 1
        while place > 0 and level_Q[order_Q[place - 1]] > new:
            order_Q[place] = order_Q[place - 1]
            place -= 1
        order_Q[place] = link
        if place <= turn:
            turn = place + 1
    dirty_Q[links] = 0
