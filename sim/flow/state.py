"""The state of a network of flows: arrays that compiled code updates in place.

Legend: Q links (and one more, never full, that pads paths), F slots of flows, P places of a path, E entries (one for
each flow on each link, a link's together), O the other places of the path, D cells (see `span_Q`), X legs, R ranks,
T pairs of ports, N a stack. Times: nanoseconds.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sim.flow.topology import Topology

__all__ = ["ADDED", "FREE", "LEAVES", "NEVER", "Network", "open_network"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NEVER = np.iinfo(np.int64).max // 4
"""A time that no simulation reaches."""

MOST_CELLS = 2**24
"""Beyond this many cells (half a gigabyte) there are none."""

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
    free_F, stack_N     stacks: free slots; flows not yet held back by anybody (then scratch)
    missing_XR          what a rank still waits for in a leg: its own arrival, sends and receipts
    leaves_N2           stack of (leg, rank) that may go on
    near_Q, span_Q, row_Q   where all paths have two links: the links that those of this one lead to (first, how many)
                            and the first of as many cells
    cost_2D, held_D, away_D   by cell: cost of its flows, how many the link holds back, how many not
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
    dirty_Q: IntArray
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
    stack_N: IntArray
    missing_XR: IntArray
    leaves_N2: IntArray
    near_Q: IntArray
    span_Q: IntArray
    row_Q: IntArray
    cost_2D: FloatArray
    held_D: FloatArray
    away_D: FloatArray
    rest_N: FloatArray
    heights: IntArray


def open_network(topology: Topology, missing_XR: IntArray, streams: int) -> Network:
    """No flow yet. A rank has at most one leg on each of `streams` at a time. Memory O(streams R^2 P)."""
    links, places, ranks = topology.num_links, topology.places, missing_XR.shape[1]
    room_Q = topology.room_Q() * streams
    near_Q, span_Q = topology.neighbours_Q()
    if span_Q.sum() > MOST_CELLS:
        span_Q = np.zeros_like(span_Q)
    cells = int(span_Q.sum())
    slots, entries = ranks * ranks * streams, int(room_Q.sum())
    ints = np.int64
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
        dirty_Q=np.zeros(links + 1, dtype=ints),
        moved_Q=np.zeros(links, dtype=np.bool_),
        wrong_Q=np.zeros(links, dtype=np.bool_),
        used_Q=np.zeros(links + 1),
        most_cost_1=np.zeros(1),
        flow_E=np.zeros(entries, dtype=ints),
        other_EO=np.zeros((entries, places - 1), dtype=np.uint32),
        cost_2E=np.zeros((2, entries)),
        held_E=np.zeros(entries),
        path_FP=np.full((slots, places), links),
        pair_FP=np.zeros((slots, places), dtype=ints),
        entry_FP=np.zeros((slots, places), dtype=ints),
        size_F=np.zeros(slots),
        holder_F=np.full(slots, -1),
        end_F=np.zeros(slots),
        who_F3=np.zeros((slots, 3), dtype=ints),
        free_F=np.arange(slots)[::-1].copy(),
        stack_N=np.zeros(slots * (places + 1), dtype=ints),
        missing_XR=missing_XR,
        leaves_N2=np.zeros((slots + 2 * ranks, 2), dtype=ints),
        near_Q=near_Q,
        span_Q=span_Q,
        row_Q=np.cumsum(span_Q) - span_Q,
        cost_2D=np.zeros((2, cells)),
        held_D=np.zeros(cells),
        away_D=np.zeros(cells),
        rest_N=np.zeros(int(room_Q.max())),
        heights=np.zeros(3, dtype=ints),
    )
    network.heights[FREE] = slots
    return network
