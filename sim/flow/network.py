"""Flows that share links max-min fairly, advanced from one change of the set of flows to the next.

Legend: as in sim.flow.state.

The speed of a flow is 1 where it is alone; on a link it takes cost * speed of the link's time, and a link's time is
never overdrawn. Max-min in speed: nobody can be faster without somebody as slow or slower becoming slower still.
Every link has a level: the speed at which those flows go that it holds back (infinite where it holds nobody back), so
a flow's speed is the least level on its path. Levels are the unique solution of

    sum over the link's flows of cost * min(level, least level on the rest of the path) = 1       for every full link

(progressive filling finds the same). After a change only links whose equation changed are solved again, lowest level
first, and those that depend on them, until none is left: a link depends on lower ones only, so this ends.
All flows that a link holds back have one speed: it has a clock of the service given to each of them, on which every
flow has an end. So a link whose level changes costs one pass over its flows, and a link whose level stays nothing.
A flow ends on the first whole nanosecond at which all its bytes have passed, never before (docs: see sim.flow).
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from sim.flow.levels import SAME, solve_levels
from sim.flow.rows import solve_rows
from sim.flow.state import ADDED, FREE, LEAVES, NEVER, Network

__all__ = ["active", "add", "advance"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

DENSE = 6
"""So many cells for a flow are still passed sooner, several at once, than a flow that has to be looked up."""

SLACK_NS, SLACK = 1e-6, 1e-11
"""What rounding errors may add to a duration, absolutely and relatively, before it counts as another nanosecond."""


@njit(cache=True)
def add(
    network: Network,
    leg: int,
    rank: int,
    receiver_F: IntArray,
    path_FP: IntArray,
    pair_FP: IntArray,
    alone_ns_F: FloatArray,
    cost_2FP: FloatArray,
) -> None:
    """Rank is ready for the leg now and starts its messages (arrays as in Messages, its own only)."""
    links, heights, span_Q = len(network.flows_Q), network.heights, network.span_Q
    _count_down(network, leg, rank)
    for message in range(len(receiver_F)):
        if alone_ns_F[message] == 0:  # bytes that take no time
            _count_down(network, leg, rank)
            _count_down(network, leg, receiver_F[message])
            continue
        heights[FREE] -= 1
        flow = network.free_F[heights[FREE]]
        network.stack_N[heights[ADDED]] = flow
        heights[ADDED] += 1
        network.size_F[flow] = alone_ns_F[message]
        network.holder_F[flow] = -1
        network.who_F3[flow, 0], network.who_F3[flow, 1], network.who_F3[flow, 2] = leg, rank, receiver_F[message]
        for place in range(path_FP.shape[1]):
            network.path_FP[flow, place] = path_FP[message, place]
            network.pair_FP[flow, place] = pair_FP[message, place]
        for place in range(path_FP.shape[1]):
            link, pair = path_FP[message, place], pair_FP[message, place]
            if link == links:
                continue
            entry = network.offset_Q[link] + network.flows_Q[link]
            network.flows_Q[link] += 1
            network.flow_E[entry] = flow
            network.entry_FP[flow, place] = entry
            network.held_E[entry] = 0.0
            at = 0
            for other in range(path_FP.shape[1]):
                if other != place:
                    network.other_EO[entry, at] = path_FP[message, other]
                    at += 1
            for beside in range(2):
                cost = cost_2FP[beside, message, place]
                network.cost_2E[beside, entry] = cost
                network.most_cost_1[0] = max(network.most_cost_1[0], cost)
                if span_Q[link] > 0:
                    cell = network.row_Q[link] + path_FP[message, 1 - place] - network.near_Q[link]
                    network.cost_2D[beside, cell] += cost
                    network.away_D[cell] += beside  # once
            # places come in twos: sending port, receiving port
            network.beside_T[pair] += 1 - place % 2
            if network.beside_T[pair] == 1 and place % 2 == 0:
                network.pairs_Q[link] += 1
                network.pairs_Q[path_FP[message, place + 1]] += 1
            network.dirty_Q[link] = 1


@njit(cache=True)
def advance(network: Network, now: int, until: int, single: bool) -> int:
    """Runs from `now` on until somebody may leave a leg, or to `until`; `single`: or to the next end of a flow.

    Returns when that is; who may leave is in `leaves_N2`. Flows that end at `until` itself still stand then.
    """
    heights = network.heights
    _end_flows(network, now)
    while heights[LEAVES] == 0:
        _share(network, now)
        after = min(until, network.end_ns_Q.min())
        if after >= until:
            return until
        now = after
        if single:
            return now
        _end_flows(network, now)
    return now


@njit(cache=True)
def active(network: Network, now: int) -> tuple[IntArray, FloatArray, FloatArray]:
    """Slots of the flows that run after `advance` looked at `now`, their speeds and what is left of their time."""
    slot, speed, left = [0 for _ in range(0)], [0.0 for _ in range(0)], [0.0 for _ in range(0)]
    for link in range(len(network.flows_Q)):
        served = network.served_Q[link] + network.level_Q[link] * (now - network.since_Q[link])
        for entry in range(network.offset_Q[link], network.offset_Q[link] + network.flows_Q[link]):
            flow = network.flow_E[entry]
            if network.holder_F[flow] == link:
                slot.append(flow)
                speed.append(network.level_Q[link])
                left.append(network.end_F[flow] - served)
    return np.array(slot), np.array(speed), np.array(left)


@njit(cache=True)
def _count_down(network: Network, leg: int, rank: int) -> None:
    network.missing_XR[leg, rank] -= 1
    if network.missing_XR[leg, rank] == 0:
        height = network.heights[LEAVES]
        network.leaves_N2[height, 0], network.leaves_N2[height, 1] = leg, rank
        network.heights[LEAVES] += 1


@njit(cache=True)
def _end_flows(network: Network, now: int) -> None:
    """Takes away all flows that end by `now`."""
    end_ns_Q, first_Q, end_F, stack_N = network.end_ns_Q, network.first_Q, network.end_F, network.stack_N
    flow_E, holder_F, level_Q = network.flow_E, network.holder_F, network.level_Q
    # above the flows that have just been added
    below = top = network.heights[ADDED]
    for link in range(len(end_ns_Q)):
        if end_ns_Q[link] > now:
            continue
        duration = now - network.since_Q[link]
        served = network.served_Q[link] + level_Q[link] * (duration + SLACK_NS + SLACK * duration)
        first, start = np.inf, network.offset_Q[link]
        for entry in range(start, start + network.flows_Q[link]):
            flow = flow_E[entry]
            if holder_F[flow] == link:
                if end_F[flow] <= served:
                    stack_N[top] = flow
                    top += 1
                else:
                    first = min(first, end_F[flow])
        first_Q[link] = first
        end_ns_Q[link] = NEVER
        network.moved_Q[link] = True
    if top > below:
        _remove(network, below, top)


@njit(cache=True)
def _remove(network: Network, below: int, top: int) -> None:
    """Takes the flows stack_N[below:top] off their links."""
    flows_Q, offset_Q, pairs_Q, beside_T = network.flows_Q, network.offset_Q, network.pairs_Q, network.beside_T
    flow_E, other_EO, cost_2E, held_E = network.flow_E, network.other_EO, network.cost_2E, network.held_E
    path_FP, pair_FP, entry_FP, who_F3 = network.path_FP, network.pair_FP, network.entry_FP, network.who_F3
    near_Q, span_Q, row_Q = network.near_Q, network.span_Q, network.row_Q
    cost_2D, held_D, away_D = network.cost_2D, network.held_D, network.away_D
    level_Q, dirty_Q, missing_XR, heights = network.level_Q, network.dirty_Q, network.missing_XR, network.heights
    for index in range(below, top):
        flow = network.stack_N[index]
        for place in range(path_FP.shape[1]):
            link, entry = path_FP[flow, place], entry_FP[flow, place]
            if link == len(flows_Q):
                continue
            if span_Q[link] > 0:
                cell = row_Q[link] + path_FP[flow, 1 - place] - near_Q[link]
                held_D[cell] -= held_E[entry]
                away_D[cell] -= 1 - held_E[entry]
                empty = held_D[cell] + away_D[cell] == 0
                for beside in range(2):
                    cost_2D[beside, cell] = 0.0 if empty else cost_2D[beside, cell] - cost_2E[beside, entry]
            # the last entry moves to where this one was
            flows_Q[link] -= 1
            last = offset_Q[link] + flows_Q[link]
            moved = flow_E[last]
            flow_E[entry], held_E[entry] = moved, held_E[last]
            cost_2E[0, entry], cost_2E[1, entry] = cost_2E[0, last], cost_2E[1, last]
            for at in range(other_EO.shape[1]):
                other_EO[entry, at] = other_EO[last, at]
            for other in range(path_FP.shape[1]):
                if path_FP[moved, other] == link:
                    entry_FP[moved, other] = entry
            if place % 2 == 0:
                pair = pair_FP[flow, place]
                beside_T[pair] -= 1
                if beside_T[pair] == 0:
                    pairs_Q[link] -= 1
                    pairs_Q[path_FP[flow, place + 1]] -= 1
            # a link that is not full stays so
            dirty_Q[link] |= 1 if level_Q[link] < np.inf else 0
        network.holder_F[flow] = -1
        network.free_F[heights[FREE]] = flow
        heights[FREE] += 1
        for end in range(1, 3):
            leg, rank = who_F3[flow, 0], who_F3[flow, end]
            missing_XR[leg, rank] -= 1
            if missing_XR[leg, rank] == 0:
                network.leaves_N2[heights[LEAVES], 0], network.leaves_N2[heights[LEAVES], 1] = leg, rank
                heights[LEAVES] += 1


@njit(cache=True, error_model="numpy")
def _share(network: Network, now: int) -> None:
    """Solves the levels again and gives every flow to the link that holds it back."""
    # every use of a field would count its references again, at more cost than the use
    level_Q, served_Q, since_Q, first_Q = network.level_Q, network.served_Q, network.since_Q, network.first_Q
    flows_Q, offset_Q, end_ns_Q = network.flows_Q, network.offset_Q, network.end_ns_Q
    moved_Q, wrong_Q, old_Q = network.moved_Q, network.wrong_Q, network.old_Q
    flow_E, other_EO, held_E, span_Q = network.flow_E, network.other_EO, network.held_E, network.span_Q
    holder_F, end_F, links = network.holder_F, network.end_F, len(network.flows_Q)
    path_FP, entry_FP, stack_N, heights = network.path_FP, network.entry_FP, network.stack_N, network.heights
    old_Q[:] = level_Q
    flows, cells = 0, 0
    for link in range(links):
        flows += flows_Q[link]
        cells += span_Q[link] if flows_Q[link] > 0 else 0
    if 0 < cells <= DENSE * flows:
        solve_rows(
            network.near_Q,
            span_Q,
            network.row_Q,
            network.pairs_Q,
            network.cost_2D,
            network.order_Q,
            level_Q,
            network.dirty_Q,
            moved_Q,
            network.held_D,
            network.away_D,
            wrong_Q,
            network.used_Q,
            network.most_cost_1[0],
        )
    else:
        solve_levels(
            flows_Q,
            offset_Q,
            network.pairs_Q,
            other_EO,
            network.cost_2E,
            network.order_Q,
            level_Q,
            network.dirty_Q,
            moved_Q,
            held_E,
            wrong_Q,
            network.used_Q,
            network.most_cost_1[0],
            network.rest_N,
        )
    for link in range(links):
        if moved_Q[link]:
            if old_Q[link] < np.inf:
                served_Q[link] += old_Q[link] * (now - since_Q[link])
            if flows_Q[link] == 0:
                served_Q[link] = 0.0  # a clock that starts again keeps its digits
            since_Q[link] = now
    unsure = heights[ADDED]
    for link in range(links):
        if not wrong_Q[link]:
            continue
        wrong_Q[link] = False
        level = level_Q[link]
        for entry in range(offset_Q[link], offset_Q[link] + flows_Q[link]):
            least = np.inf
            for at in range(other_EO.shape[1]):
                least = min(least, level_Q[other_EO[entry, at]])
            low, high = (least, level) if held_E[entry] > 0 else (level, least)
            if low < high * (1 - SAME):
                stack_N[unsure] = flow_E[entry]
                unsure += 1
    for index in range(unsure):
        flow = stack_N[index]
        holder = lowest = holder_F[flow]
        for place in range(path_FP.shape[1]):
            link = path_FP[flow, place]
            # the padding at the end of level_Q, which -1 finds too, is infinite
            if level_Q[link] < level_Q[lowest] * (1 - SAME):
                lowest = link
        if lowest == holder:
            continue
        # from the clock of one link to that of another
        left = network.size_F[flow]
        if holder >= 0:
            left = end_F[flow] - served_Q[holder]
            if level_Q[holder] < np.inf:
                left -= level_Q[holder] * (now - since_Q[holder])
            if end_F[flow] <= first_Q[holder]:
                first_Q[holder] = -np.inf  # no longer known
                moved_Q[holder] = True
        holder_F[flow] = lowest
        end_F[flow] = served_Q[lowest] + level_Q[lowest] * (now - since_Q[lowest]) + left
        if end_F[flow] < first_Q[lowest]:
            first_Q[lowest] = end_F[flow]
            moved_Q[lowest] = True
        for place in range(path_FP.shape[1]):
            link = path_FP[flow, place]
            if link == links:
                continue
            held, entry = 1.0 if link == lowest else 0.0, entry_FP[flow, place]
            if span_Q[link] > 0:
                cell = network.row_Q[link] + path_FP[flow, 1 - place] - network.near_Q[link]
                network.held_D[cell] += held - held_E[entry]
                network.away_D[cell] -= held - held_E[entry]
            held_E[entry] = held
    heights[ADDED] = 0
    for link in range(links):
        if not moved_Q[link]:
            continue
        moved_Q[link] = False
        first = first_Q[link]
        if first == -np.inf:
            first = np.inf
            for entry in range(offset_Q[link], offset_Q[link] + flows_Q[link]):
                if holder_F[flow_E[entry]] == link:
                    first = min(first, end_F[flow_E[entry]])
            first_Q[link] = first
        end_ns_Q[link] = NEVER
        if first < np.inf:
            duration = (first - served_Q[link]) / level_Q[link]
            whole = int(np.ceil(duration - SLACK_NS - SLACK * duration))
            end_ns_Q[link] = since_Q[link] + max(0, whole)
