"""The same levels as sim.flow.levels where every path has two links: no flow is looked up, all of a link's are passed.

Legend: Q links (and one more, never full), D cells: each link has one for every link that its flows may lead to, and
those are neighbours; so several cells are passed at once. Empty cells cost nothing on the link.
"""

import numpy as np
import numpy.typing as npt
from numba import njit, uintp

from sim.flow.levels import NEARLY_FULL, REORDER, SAME

__all__ = ["solve_rows"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def solve_rows(
    near_Q: IntArray,
    span_Q: IntArray,
    row_Q: IntArray,
    pairs_Q: IntArray,
    cost_2D: FloatArray,
    order_Q: IntArray,
    level_Q: FloatArray,
    dirty_Q: IntArray,
    moved_Q: npt.NDArray[np.bool_],
    held_D: FloatArray,
    away_D: FloatArray,
    wrong_Q: npt.NDArray[np.bool_],
    used_Q: FloatArray,
    most_cost: float,
) -> None:
    """As `solve_levels`, line by line, on cells (arrays as in sim.flow.state.Network).

    Complexity: one pass over the cells of each link whose equation changes, times the changes on the way.
    """
    turn, links = 0, len(order_Q)
    while turn < links:
        link = order_Q[turn]
        if dirty_Q[link] == 0:
            turn += 1
            continue
        dirty_Q[link] = 0
        old = level_Q[link]
        near, row, span = uintp(near_Q[link]), uintp(row_Q[link]), span_Q[link]
        beside = uintp(1 if pairs_Q[link] > 1 else 0)
        new, weight_before = old, -1.0
        while True:
            below, weight = 0.0, 0.0
            for at in range(span):
                rest, cost = level_Q[near + uintp(at)], cost_2D[beside, row + uintp(at)]
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
        wrong, lower = 0.0, new * (1 - SAME)
        for at in range(span):
            rest, held, away = level_Q[near + uintp(at)], held_D[row + uintp(at)], away_D[row + uintp(at)]
            wrong += held if rest < lower else 0.0
            wrong += away if new < rest * (1 - SAME) else 0.0
        wrong_Q[link] = wrong > 0
        if same:
            turn += 1
            continue
        level_Q[link] = new
        moved_Q[link] = True
        low, more = min(old, new), max(new - old, 0.0) * most_cost
        for at in range(span):
            flows = held_D[row + uintp(at)] + away_D[row + uintp(at)]
            there = flows > 0
            rest, used = level_Q[near + uintp(at)], used_Q[near + uintp(at)] + (flows * more if there else 0.0)
            used_Q[near + uintp(at)] = used
            touched = there & (rest > low) & ((rest < np.inf) | (used > NEARLY_FULL))
            dirty_Q[near + uintp(at)] |= 1 if touched else 0
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
