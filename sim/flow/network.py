"""Flows that share links max-min fairly, advanced from one change of the set of flows to the next.

Legend: Q links (and one more, never full, that pads paths), F slots of flows, P places of a path, E entries (one for
each flow on each link, a link's together), O the other places of the path, X legs, R ranks. Times: nanoseconds.

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

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from sim.flow.levels import SAME, solve_levels
from sim.flow.topology import Topology

__all__ = ["NEVER", "Network", "active", "add", "advance", "open_network"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NEVER = np.iinfo(np.int64).max // 4
"""A time that no simulation reaches."""

SLACK_NS, SLACK = 1e-6, 1e-11
"""What rounding errors may add to a duration, absolutely and relatively, before it counts as another nanosecond."""

LEAVES, ADDED, FREE = range(3)


class Network(NamedTuple):
    """State of all links and flows; `add` and `advance` update it in place.

    flows_Q, offset_Q   flows on each link and where its entries begin
    pairs_Q             pairs of ports with flows on the link; beside_T how many flows each pair has
    level_Q, old_Q      speed of the flows that the link holds back, now and before
    served_Q, since_Q   its clock, and when it was read
    first_Q, end_ns_Q   the first end on that clock, and in nanoseconds
    order_Q             links in the order of their levels, roughly
    dirty_Q, moved_Q    whether the link's equation has changed, and whether its level has
    wrong_Q             whether flows on the link have to change their holder
    flow_E, other_EO, cost_2E     the flow, the rest of its path, its cost alone and beside others
    held_E              1 where the link holds the flow back
    path_FP, pair_FP, entry_FP    of each flow: links, pairs, entries
    size_F, holder_F, end_F       time alone, the link that holds it back, its end on that link's clock
    who_F3              leg, sender, receiver
    free_F, added_F     stacks: free slots, and flows not yet held back by anybody
    missing_XR          what a rank still waits for in a leg: its own arrival, sends and receipts
    leaves_N2           stack of (leg, rank) that may go on
    used_Q              at most so much of its time is used, where a link is not full
    most_cost_1         the highest cost of any flow on any link so far
    rest_N              scratch
    heights             heights of those stacks
    """

    flows_Q: IntArray
    offset_Q: IntArray
    pairs_Q: IntArray
    beside_T: IntArray
    level_Q: FloatArray
    old_Q: FloatArray
    served_Q: FloatArray
    since_Q: IntArray
    first_Q: FloatArray
    end_ns_Q: IntArray
    order_Q: IntArray
    dirty_Q: npt.NDArray[np.bool_]
    moved_Q: npt.NDArray[np.bool_]
    wrong_Q: npt.NDArray[np.bool_]
    used_Q: FloatArray
    most_cost_1: FloatArray
    flow_E: IntArray
    other_EO: npt.NDArray[np.uint32]
    cost_2E: FloatArray
    held_E: FloatArray
    path_FP: IntArray
    pair_FP: IntArray
    entry_FP: IntArray
    size_F: FloatArray
    holder_F: IntArray
    end_F: FloatArray
    who_F3: IntArray
    free_F: IntArray
    added_F: IntArray
    missing_XR: IntArray
    leaves_N2: IntArray
    rest_N: FloatArray
    heights: IntArray


def open_network(topology: Topology, missing_XR: IntArray, streams: int) -> Network:
    """No flow yet. A rank has at most one leg on each of `streams` at a time. Memory O(streams R^2 P)."""
    links, places, ranks = topology.num_links, topology.places, missing_XR.shape[1]
    room_Q = topology.room_Q() * streams
    slots, entries = ranks * ranks * streams, int(room_Q.sum())
    ints, floats = np.int64, np.float64
    network = Network(
        flows_Q=np.zeros(links, dtype=ints),
        offset_Q=np.cumsum(room_Q) - room_Q,
        pairs_Q=np.zeros(links, dtype=ints),
        beside_T=np.zeros(topology.num_pairs, dtype=ints),
        level_Q=np.full(links + 1, np.inf),
        old_Q=np.full(links + 1, np.inf),
        served_Q=np.zeros(links),
        since_Q=np.zeros(links, dtype=ints),
        first_Q=np.full(links, np.inf),
        end_ns_Q=np.full(links, NEVER),
        order_Q=np.arange(links),
        dirty_Q=np.zeros(links + 1, dtype=np.bool_),
        moved_Q=np.zeros(links, dtype=np.bool_),
        wrong_Q=np.zeros(links, dtype=np.bool_),
        used_Q=np.zeros(links + 1),
        most_cost_1=np.zeros(1),
        flow_E=np.zeros(entries, dtype=ints),
        other_EO=np.zeros((entries, places - 1), dtype=np.uint32),
        cost_2E=np.zeros((2, entries), dtype=floats),
        held_E=np.zeros(entries),
        path_FP=np.full((slots, places), links),
        pair_FP=np.zeros((slots, places), dtype=ints),
        entry_FP=np.zeros((slots, places), dtype=ints),
        size_F=np.zeros(slots),
        holder_F=np.full(slots, -1),
        end_F=np.zeros(slots),
        who_F3=np.zeros((slots, 3), dtype=ints),
        free_F=np.arange(slots)[::-1].copy(),
        added_F=np.zeros(slots, dtype=ints),
        missing_XR=missing_XR,
        leaves_N2=np.zeros((slots + 2 * ranks, 2), dtype=ints),
        rest_N=np.zeros(int(room_Q.max())),
        heights=np.zeros(3, dtype=ints),
    )
    network.heights[FREE] = slots
    return network


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
    links, heights = len(network.flows_Q), network.heights
    _count_down(network, leg, rank)
    for message in range(len(receiver_F)):
        if alone_ns_F[message] == 0:  # bytes that take no time
            _count_down(network, leg, rank)
            _count_down(network, leg, receiver_F[message])
            continue
        heights[FREE] -= 1
        flow = network.free_F[heights[FREE]]
        network.added_F[heights[ADDED]] = flow
        heights[ADDED] += 1
        network.size_F[flow] = alone_ns_F[message]
        network.holder_F[flow] = -1
        network.who_F3[flow, 0], network.who_F3[flow, 1], network.who_F3[flow, 2] = leg, rank, receiver_F[message]
        for place in range(path_FP.shape[1]):
            link, pair = path_FP[message, place], pair_FP[message, place]
            network.path_FP[flow, place], network.pair_FP[flow, place] = link, pair
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
            # places come in twos: sending port, receiving port
            network.beside_T[pair] += 1 - place % 2
            if network.beside_T[pair] == 1 and place % 2 == 0:
                network.pairs_Q[link] += 1
                network.pairs_Q[path_FP[message, place + 1]] += 1
            network.dirty_Q[link] = True


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
        for entry in range(network.offset_Q[link], network.offset_Q[link] + network.flows_Q[link]):
            flow = network.flow_E[entry]
            if network.holder_F[flow] == link:
                slot.append(flow)
                speed.append(network.level_Q[link])
                left.append(network.end_F[flow] - _clock(network, link, now))
    return np.array(slot), np.array(speed), np.array(left)


@njit(cache=True)
def _count_down(network: Network, leg: int, rank: int) -> None:
    network.missing_XR[leg, rank] -= 1
    if network.missing_XR[leg, rank] == 0:
        height = network.heights[LEAVES]
        network.leaves_N2[height, 0], network.leaves_N2[height, 1] = leg, rank
        network.heights[LEAVES] += 1


@njit(cache=True)
def _clock(network: Network, link: int, now: int) -> float:
    """Service that the link has given to each flow it holds back."""
    level = network.level_Q[link]
    if level == np.inf:
        return network.served_Q[link]
    return network.served_Q[link] + level * (now - network.since_Q[link])


@njit(cache=True)
def _end_flows(network: Network, now: int) -> None:
    """Takes away all flows that end by `now`."""
    end_ns_Q, first_Q, end_F = network.end_ns_Q, network.first_Q, network.end_F
    flow_E, holder_F = network.flow_E, network.holder_F
    for link in range(len(end_ns_Q)):
        if end_ns_Q[link] > now:
            continue
        slack = (SLACK_NS + SLACK * (now - network.since_Q[link])) * network.level_Q[link]
        ended, first = _clock(network, link, now) + slack, np.inf
        start = network.offset_Q[link]
        # from the last on, since a flow that goes is replaced by the last
        for entry in range(start + network.flows_Q[link] - 1, start - 1, -1):
            flow = flow_E[entry]
            if holder_F[flow] == link:
                if end_F[flow] <= ended:
                    _remove(network, flow)
                else:
                    first = min(first, end_F[flow])
        first_Q[link] = first
        end_ns_Q[link] = NEVER
        network.moved_Q[link] = True


@njit(cache=True)
def _remove(network: Network, flow: int) -> None:
    for place in range(network.path_FP.shape[1]):
        link, entry = network.path_FP[flow, place], network.entry_FP[flow, place]
        if link == len(network.flows_Q):
            continue
        network.flows_Q[link] -= 1
        last = network.offset_Q[link] + network.flows_Q[link]
        moved = network.flow_E[last]
        network.flow_E[entry] = moved
        network.held_E[entry] = network.held_E[last]
        for at in range(network.other_EO.shape[1]):
            network.other_EO[entry, at] = network.other_EO[last, at]
        network.cost_2E[0, entry], network.cost_2E[1, entry] = network.cost_2E[0, last], network.cost_2E[1, last]
        for other in range(network.path_FP.shape[1]):
            if network.path_FP[moved, other] == link:
                network.entry_FP[moved, other] = entry
        if place % 2 == 0:
            pair = network.pair_FP[flow, place]
            network.beside_T[pair] -= 1
            if network.beside_T[pair] == 0:
                network.pairs_Q[link] -= 1
                network.pairs_Q[network.path_FP[flow, place + 1]] -= 1
        # a link that is not full stays so
        network.dirty_Q[link] |= network.level_Q[link] < np.inf
    leg, sender, receiver = network.who_F3[flow]
    network.holder_F[flow] = -1
    network.free_F[network.heights[FREE]] = flow
    network.heights[FREE] += 1
    _count_down(network, leg, sender)
    _count_down(network, leg, receiver)


@njit(cache=True, error_model="numpy")
def _share(network: Network, now: int) -> None:
    """Solves the levels again and gives every flow to the link that holds it back."""
    # every use of a field would count its references again, at more cost than the use
    level_Q, served_Q, since_Q, first_Q = network.level_Q, network.served_Q, network.since_Q, network.first_Q
    flows_Q, offset_Q, end_ns_Q = network.flows_Q, network.offset_Q, network.end_ns_Q
    moved_Q, wrong_Q, old_Q = network.moved_Q, network.wrong_Q, network.old_Q
    flow_E, other_EO, held_E, rest_N = network.flow_E, network.other_EO, network.held_E, network.rest_N
    holder_F, end_F, links = network.holder_F, network.end_F, len(network.flows_Q)
    old_Q[:] = level_Q
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
        rest_N,
    )
    for link in range(links):
        if moved_Q[link]:
            if old_Q[link] < np.inf:
                served_Q[link] += old_Q[link] * (now - since_Q[link])
            if flows_Q[link] == 0:
                served_Q[link] = 0.0  # a clock that starts again keeps its digits
            since_Q[link] = now
    for index in range(network.heights[ADDED]):
        _hold(network, network.added_F[index], now)
    network.heights[ADDED] = 0
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
                _hold(network, flow_E[entry], now)
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


@njit(cache=True)
def _hold(network: Network, flow: int, now: int) -> None:
    """The flow goes from the clock of the link that held it back, if any, to that of the lowest link on its path."""
    level_Q, holder = network.level_Q, network.holder_F[flow]
    lowest = holder
    for place in range(network.path_FP.shape[1]):
        link = network.path_FP[flow, place]
        # the padding at the end of level_Q, which -1 finds too, is infinite
        if level_Q[link] < level_Q[lowest] * (1 - SAME):
            lowest = link
    if lowest == holder:
        return
    left = network.size_F[flow]
    if holder >= 0:
        left = network.end_F[flow] - _clock(network, holder, now)
        if network.end_F[flow] <= network.first_Q[holder]:
            network.first_Q[holder] = -np.inf  # no longer known
            network.moved_Q[holder] = True
    network.holder_F[flow] = lowest
    network.end_F[flow] = _clock(network, lowest, now) + left
    for place in range(network.path_FP.shape[1]):
        link = network.path_FP[flow, place]
        if link < len(network.flows_Q):
            network.held_E[network.entry_FP[flow, place]] = 1.0 if link == lowest else 0.0
    if network.end_F[flow] < network.first_Q[lowest]:
        network.first_Q[lowest] = network.end_F[flow]
        network.moved_Q[lowest] = True
