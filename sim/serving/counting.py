"""One iteration counted: what every port carries and every slot computes, in every layer, in compiled code.

Legend: L layers, T tokens, K top-k, P slots, R ranks, N nodes, X legs, C link classes of a rank (0 inside the node,
1 its network port), D directions (0 sends, 1 receives).

The counts are those of `placer.core.dispatch.layer_traffic`, summed by port instead of kept by pair of ranks: that is
all that the closed form (placer.core.cost) asks for.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.modes import DISPATCH_MODES
from sim.serving.choosing import choose_layer_slots
from sim.serving.tables import SlotTables

__all__ = ["Counts", "count_iteration", "empty_counts", "legs_counted"]

PER_EXPERT, PER_RANK, PER_NODE, COHERENT, ALLGATHER = range(len(DISPATCH_MODES))

IntArray = npt.NDArray[np.int64]


class Counts(NamedTuple):
    """What `count_iteration` fills.

    copies_XDCLR, messages_XDCLR   through each rank's ports; per_node: across, inside; coherent: dispatch, combine;
                                   else the dispatch, whose way back is its mirror. Empty for allgather.
    between_XDLN, calls_XDLN       copies and messages through each node's uplink
    tokens_LP                      (token, expert) pairs of each slot
    home_LR                        tokens on each rank before each layer; last_R after the last one
    """

    copies_XDCLR: IntArray
    messages_XDCLR: IntArray
    between_XDLN: IntArray
    calls_XDLN: IntArray
    tokens_LP: IntArray
    home_LR: IntArray
    last_R: IntArray


def legs_counted(tables: SlotTables) -> int:
    """X, how many different legs a layer has under the tables' mode."""
    return {PER_NODE: 2, COHERENT: 2, ALLGATHER: 0}.get(tables.mode, 1)


def empty_counts(tables: SlotTables) -> Counts:
    """Zeros of the right shapes."""
    layers, ranks, nodes = len(tables.slot_LEN), len(tables.node_R), int(tables.node_R[-1]) + 1
    legs = legs_counted(tables)

    def zeros(*shape: int) -> IntArray:
        return np.zeros(shape, dtype=np.int64)

    return Counts(
        copies_XDCLR=zeros(legs, 2, 2, layers, ranks),
        messages_XDCLR=zeros(legs, 2, 2, layers, ranks),
        between_XDLN=zeros(legs, 2, layers, nodes),
        calls_XDLN=zeros(legs, 2, layers, nodes),
        tokens_LP=zeros(layers, len(tables.rank_P)),
        home_LR=zeros(layers, ranks),
        last_R=zeros(ranks),
    )


@njit(cache=True)
def count_iteration(
    tables: SlotTables,
    expert_LTK: npt.NDArray[np.integer],
    row_I: IntArray,
    source_I: IntArray,
    counts: Counts,
) -> None:
    """Adds to `counts` (zeros before) the iteration whose i-th token takes row row_I[i] and lives on source_I[i].

    Complexity: O(L (I K + R^2)).
    """
    ranks, nodes = len(tables.node_R), counts.between_XDLN.shape[3]
    mode, tokens = tables.mode, len(row_I)
    copies_XRR = np.zeros((2, ranks, ranks), dtype=np.int32)
    between_NN = np.zeros((nodes, nodes), dtype=np.int64)
    seen_R, seen_N = np.full(ranks, -1, dtype=np.int64), np.full(nodes, -1, dtype=np.int64)
    slot_IK = np.empty((tokens, expert_LTK.shape[2]), dtype=np.int32)
    location_I = source_I.copy()
    for layer in range(len(expert_LTK)):
        choose_layer_slots(tables, layer, expert_LTK[layer], row_I, location_I, slot_IK)
        _add_tokens(slot_IK, location_I, counts.tokens_LP[layer], counts.home_LR[layer])
        if mode == PER_EXPERT:
            _send_per_expert(slot_IK, location_I, tables.rank_P, copies_XRR[0])
        elif mode == PER_RANK:
            _send_per_rank(slot_IK, location_I, tables.rank_P, layer * tokens, seen_R, copies_XRR[0])
        elif mode == PER_NODE:
            _send_per_node(
                slot_IK, location_I, tables.rank_P, tables.node_R, layer * tokens, seen_R, seen_N, copies_XRR
            )
        elif mode == COHERENT:
            _send_coherent(slot_IK, location_I, tables.rank_P, layer * tokens, seen_R, copies_XRR)
        for leg in range(counts.copies_XDCLR.shape[0]):
            _by_port(tables.node_R, copies_XRR[leg], between_NN, leg, layer, counts)
    for token in range(tokens):
        counts.last_R[location_I[token]] += 1


@njit(cache=True)
def _add_tokens(slot_IK: npt.NDArray[np.int32], location_I: IntArray, tokens_P: IntArray, home_R: IntArray) -> None:
    for token in range(len(slot_IK)):
        home_R[location_I[token]] += 1
        for k in range(slot_IK.shape[1]):
            slot = slot_IK[token, k]
            if slot >= 0:
                tokens_P[slot] += 1


@njit(cache=True)
def _send_per_expert(
    slot_IK: npt.NDArray[np.int32],
    location_I: IntArray,
    rank_P: npt.NDArray[np.int32],
    copies_RR: npt.NDArray[np.int32],
) -> None:
    for token in range(len(slot_IK)):
        home = location_I[token]
        for k in range(slot_IK.shape[1]):
            if slot_IK[token, k] >= 0:
                copies_RR[home, rank_P[slot_IK[token, k]]] += 1
    _keep_own(copies_RR)


@njit(cache=True)
def _send_per_rank(
    slot_IK: npt.NDArray[np.int32],
    location_I: IntArray,
    rank_P: npt.NDArray[np.int32],
    stamp: int,
    seen_R: IntArray,
    copies_RR: npt.NDArray[np.int32],
) -> None:
    """`seen_R[r] == stamp + token`: the token has visited rank r in this layer."""
    for token in range(len(slot_IK)):
        home = location_I[token]
        for k in range(slot_IK.shape[1]):
            if slot_IK[token, k] >= 0:
                rank = rank_P[slot_IK[token, k]]
                copies_RR[home, rank] += seen_R[rank] != stamp + token
                seen_R[rank] = stamp + token
    _keep_own(copies_RR)


@njit(cache=True)
def _send_per_node(
    slot_IK: npt.NDArray[np.int32],
    location_I: IntArray,
    rank_P: npt.NDArray[np.int32],
    node_R: npt.NDArray[np.int32],
    stamp: int,
    seen_R: IntArray,
    seen_N: IntArray,
    copies_XRR: npt.NDArray[np.int32],
) -> None:
    """Across to the rank of the same local index, then inside."""
    ranks_per_node = len(seen_R) // len(seen_N)
    for token in range(len(slot_IK)):
        home = location_I[token]
        for k in range(slot_IK.shape[1]):
            if slot_IK[token, k] < 0:
                continue
            rank = rank_P[slot_IK[token, k]]
            if seen_R[rank] == stamp + token:
                continue
            seen_R[rank] = stamp + token
            node, entry = node_R[rank], home
            if node != node_R[home]:
                entry = node * ranks_per_node + home % ranks_per_node
                copies_XRR[0, home, entry] += seen_N[node] != stamp + token
                seen_N[node] = stamp + token
            copies_XRR[1, entry, rank] += 1
    _keep_own(copies_XRR[1])


@njit(cache=True)
def _send_coherent(
    slot_IK: npt.NDArray[np.int32],
    location_I: IntArray,
    rank_P: npt.NDArray[np.int32],
    stamp: int,
    seen_R: IntArray,
    copies_XRR: npt.NDArray[np.int32],
) -> None:
    """Results meet on the rank of the first expert, where the token stays."""
    for token in range(len(slot_IK)):
        home, after = location_I[token], -1
        for k in range(slot_IK.shape[1]):
            if slot_IK[token, k] < 0:
                continue
            rank = int(rank_P[slot_IK[token, k]])
            if after < 0:
                after = rank
            if seen_R[rank] != stamp + token:
                seen_R[rank] = stamp + token
                copies_XRR[0, home, rank] += 1
                copies_XRR[1, rank, after] += 1
        if after >= 0:
            location_I[token] = after
    _keep_own(copies_XRR[0])
    _keep_own(copies_XRR[1])


@njit(cache=True)
def _keep_own(copies_RR: npt.NDArray[np.int32]) -> None:
    """What a rank would send to itself stays where it is."""
    for rank in range(len(copies_RR)):
        copies_RR[rank, rank] = 0


@njit(cache=True)
def _by_port(
    node_R: npt.NDArray[np.int32],
    copies_RR: npt.NDArray[np.int32],
    between_NN: IntArray,
    leg: int,
    layer: int,
    counts: Counts,
) -> None:
    """Sums one leg by port and clears it."""
    ranks, nodes = len(copies_RR), len(between_NN)
    for sender in range(ranks):
        for receiver in range(ranks):
            copies = copies_RR[sender, receiver]
            if copies == 0:
                continue
            copies_RR[sender, receiver] = 0
            link = 0 if node_R[sender] == node_R[receiver] else 1
            counts.copies_XDCLR[leg, 0, link, layer, sender] += copies
            counts.messages_XDCLR[leg, 0, link, layer, sender] += 1
            counts.copies_XDCLR[leg, 1, link, layer, receiver] += copies
            counts.messages_XDCLR[leg, 1, link, layer, receiver] += 1
            if link == 1:
                between_NN[node_R[sender], node_R[receiver]] += copies
    for sender in range(nodes):
        for receiver in range(nodes):
            copies = between_NN[sender, receiver]
            if copies == 0:
                continue
            between_NN[sender, receiver] = 0
            counts.between_XDLN[leg, 0, layer, sender] += copies
            counts.calls_XDLN[leg, 0, layer, sender] += 1
            counts.between_XDLN[leg, 1, layer, receiver] += copies
            counts.calls_XDLN[leg, 1, layer, receiver] += 1
